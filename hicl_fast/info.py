"""``python -m hicl_fast.info``: what hicl_fast finds on this machine, and for each missing backend why.

``collect`` gathers it, ``render`` writes it as text; ``--json`` prints what ``collect`` returns.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import torch

import hicl_fast
from hicl_fast._command import Parser, command
from hicl_fast.ops.backends import extension

# How a missing backend is had; beside the reason, which the backend itself gives.
REMEDIES = {
    "torch": "reinstall PyTorch",
    "cpp": "with a C++ compiler installed: `make build` in a checkout, else "
    "`HICL_FAST_BUILD=require pip install --no-build-isolation --force-reinstall --no-deps .`",
    "cuda": "an NVIDIA GPU, PyTorch for CUDA and nvcc, then "
    "`HICL_FAST_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps .` in a checkout",
    "triton": "Linux with `pip install 'hicl-fast[triton]'`, and a GPU that PyTorch sees; "
    "TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests",
}


def collect() -> dict[str, Any]:
    """Everything found: strings, numbers and lists only, in the order in which it is printed."""
    return {
        "package": f"hicl_fast {hicl_fast.__version__} ({Path(hicl_fast.__file__).parent})",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__} ({_torch_build()})",
        "triton": _version("triton") or "not installed",
        "compiled_in": extension.compiled(),
        "compiler": _compiler() or "none found",
        "cpu": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "devices": _devices(),
        "backends": [_backend(status) for status in hicl_fast.backends()],
    }


def render(found: dict[str, Any]) -> str:
    """The text for a person: the facts, then a table of backends with a line of help under each missing one."""
    facts = [(name.replace("_", " "), value) for name, value in found.items() if name not in ("devices", "backends")]
    facts += [("devices", "; ".join(found["devices"]) or "the CPU only")]
    lines = [f"{name:<15}{value}" for name, value in facts]
    lines += ["", "backend   available"]
    for backend in found["backends"]:
        available, remedy = backend["available"], backend["remedy"]
        said = [backend["detail"] if available else backend["reason"], f"To get it: {remedy}" if remedy else ""]
        margin = f"{backend['name']:<10}{'yes' if available else 'no':<12}"
        for text in filter(None, said):
            lines += textwrap.wrap(text, 120, initial_indent=margin, subsequent_indent=" " * len(margin))
            margin = " " * len(margin)
    return "\n".join(lines)


def _backend(status: hicl_fast.BackendStatus) -> dict[str, Any]:
    return {**dataclasses.asdict(status), "remedy": "" if status.available else _remedy(status.name)}


def _remedy(backend: str) -> str:
    if backend == "cuda" and extension.cuda_kernels():
        return "an NVIDIA GPU from sm_80 on and PyTorch for CUDA; the kernels are compiled in, nvcc isn't needed"
    return REMEDIES[backend]


def _torch_build() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _compiler() -> str:
    """The first line that the C++ compiler prints of itself; empty where there is none."""
    asked = os.environ.get("CXX", "").split()
    command = asked or next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), [])
    if not command:
        return ""
    try:
        said = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f"{' '.join(command)}: {said.splitlines()[0]}" if said else ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return ["mps"] if torch.backends.mps.is_available() else []
    return [f"cuda:{index} {_device(index)}" for index in range(torch.cuda.device_count())]


def _device(index: int) -> str:
    of = torch.cuda.get_device_properties(index)
    return f"{of.name}, compute capability {of.major}.{of.minor}, {of.total_memory / 2**30:.0f} GiB"


@command()
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m hicl_fast.info", description="What hicl_fast finds here.")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    arguments = parser.parse_args(argv)
    found = collect()
    print(json.dumps(found, indent=2) if arguments.json else render(found))


if __name__ == "__main__":
    main()
