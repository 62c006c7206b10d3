"""``make cuda-check``: compiles every kernel of csrc/cuda for every architecture, with neither a GPU nor PyTorch.

Prints what each kernel needs, registers, shared memory, stack and spills, as the assembler says it; shared memory that
is asked for at launch is not in it (docs/cuda.md). The compiler and its flags are setup.py's.

Exit status: 0 where everything compiles without warnings, spills or stack, 1 where not, 77 where there is no nvcc.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
NO_COMPILER = 77

_BUILD = runpy.run_path(str(ROOT / "setup.py"), run_name="build")

# What ptxas -v says of a kernel.
_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Needs:
    """What a kernel needs on an architecture; bytes, but for registers."""

    kernel: str
    arch: str
    registers: int
    shared: int
    stack: int
    spills: int

    @property
    def is_good(self) -> bool:
        return self.stack == 0 and self.spills == 0


def compile_for(nvcc: str, source: Path, arch: str) -> tuple[list[Needs], str]:
    """What the kernels in a source need on an architecture, and the compiler's complaints; empty where it has none."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-cubin", *_BUILD["CUDA_FLAGS"], f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        command += ["-Xptxas=-v", str(source), "-o", str(Path(folder) / "kernels.cubin")]
        done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    complaints = [line for line in lines if "warning" in line.lower() or "error" in line.lower()]
    if done.returncode and not complaints:
        complaints = [f"nvcc exits with status {done.returncode}", *lines]
    return resources(done.stderr), "\n".join(complaints)


def resources(report: str) -> list[Needs]:
    """What ptxas reports of the kernels."""
    found = list(_ENTRY.finditer(report))
    names = demangled([match["name"] for match in found])
    return [
        Needs(
            kernel=name,
            arch=match["arch"],
            registers=int(match["registers"]),
            shared=int(static[1]) if (static := re.search(r"(\d+) bytes smem", match["rest"])) else 0,
            stack=int(match["stack"]),
            spills=int(match["stores"]) + int(match["loads"]),
        )
        for match, name in zip(found, names, strict=True)
    ]


def demangled(names: list[str]) -> list[str]:
    """C++'s names without namespaces and arguments, where there is a program to tell them."""
    if not names or shutil.which("c++filt") is None:
        return names
    told = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"^void |hicl::cuda::|\(.*", "", name) for name in told]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compile csrc/cuda for every architecture and print what kernels need."
    )
    parser.add_argument("--archs", default=" ".join(_BUILD["ARCHS"]), help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the table there too")
    arguments = parser.parse_args()
    if not arguments.archs.split() or not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in arguments.archs.split()):
        parser.error(f"--archs: expected architectures as nvcc names them, as '80 90a', got {arguments.archs[:60]!r}")
    if arguments.json is not None and (arguments.json.is_dir() or not arguments.json.resolve().parent.is_dir()):
        parser.error(f"--json: expected a file in a folder that is there, got {arguments.json}")
    nvcc = _BUILD["find_nvcc"]()
    if nvcc is None:
        print("cuda-check: left out: no nvcc (looked in CUDA_HOME, on the PATH and in /usr/local/cuda)")
        return NO_COMPILER

    jobs = [(source, arch) for source in sorted(SOURCES.glob("*.cu")) for arch in arguments.archs.split()]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        results = list(pool.map(lambda job: compile_for(nvcc, *job), jobs))
    table = sorted((needs for kernels, _ in results for needs in kernels), key=lambda needs: (needs.kernel, needs.arch))
    complaints = [text for _, text in results if text]
    width = max((len(needs.kernel) for needs in table), default=0)
    print(f"{'kernel':<{width}}  {'arch':<8}{'registers':>9}{'shared':>8}{'stack':>7}{'spills':>8}")
    for needs in table:
        print(
            f"{needs.kernel:<{width}}  {needs.arch:<8}{needs.registers:>9}{needs.shared:>8}{needs.stack:>7}"
            f"{needs.spills:>8}{'' if needs.is_good else '  <--'}"
        )
    print(*complaints, sep="\n", end="\n" if complaints else "")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(needs) for needs in table], indent=2) + "\n")
    bad = sum(not needs.is_good for needs in table) + len(complaints)
    print(f"{len(jobs)} compilations, {len(table)} kernels, {bad} problems")
    return 1 if bad or not table else 0


if __name__ == "__main__":
    sys.exit(main())
