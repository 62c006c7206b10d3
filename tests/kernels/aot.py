"""Compiles kernels for GPUs that need not be there, and reads what the code needs and which instructions it holds."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes a program
_MATRIX_INSTRUCTIONS = r"\b(?:HGMMA|HMMA|UTCHMMA|QGMMA|UTCQMMA)\b"
_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Resources:
    """What one program needs of a multiprocessor."""

    registers: int  # a thread
    spills: int  # NVIDIA: instructions that access a thread's stack; AMD: registers
    shared: int  # bytes
    matrix_instructions: int


def compile_for(
    arch: str,
    kernel: Any,
    types: dict[str, str],  # of pointers and floats: "*bf16", "fp32"; what is not named is an i32
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int = 1,
) -> Any:
    """The compiled kernel; pointers and integers as they most often are, divisible by 16."""
    signature, values, divisible = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(position,)] = "constexpr", constants[name]
            continue
        signature[name] = types.get(name, "i32")
        if signature[name].startswith("*") or signature[name] == "i32":
            divisible[(position,)] = [["tt.divisibility", 16]]
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(ASTSource(kernel, signature, values, divisible), target=TARGETS[arch], options=options)


def resources_of(compiled: Any) -> Resources:
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]

        def said(what: str) -> int:
            found = re.search(rf"\.{what}:\s*(\d+)", text)
            assert found, what
            return int(found[1])

        return Resources(said("vgpr_count"), said("vgpr_spill_count"), shared, text.count("v_mfma_"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, usage
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return Resources(int(registers[1]), spills, shared, len(re.findall(_MATRIX_INSTRUCTIONS, code)))


def _cuobjdump(option: str, file: str) -> str:
    command = [str(_NVIDIA_TOOLS / "cuobjdump"), option, file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
