"""``make wheel``: one wheel for an index, with the kernels for CPUs and for NVIDIA's GPUs, built without a GPU.

Compiles with the pinned nvcc of requirements/cuda.txt, or with CUDA_HOME's where that is set, links for systems as old as
those that PyTorch's own wheels are for, and checks the result: its tag and what it needs (auditwheel), the GPUs that it has
code for (cuobjdump), its metadata (twine). HICL_FAST_CUDA=0 builds for CPUs only; nothing else does.

Exit status: 0 where dist/ has the new wheel, 1 where it has none or an earlier one still.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from tools import old_systems

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
TOOLS = ROOT / ".venv" / "wheel"  # where the Makefile installs requirements/wheel.txt and requirements/cuda.txt
GLIBC = (2, 28)  # PyTorch's own wheels' since 2.6
EXTENSION = "hicl_fast/_C.abi3.so"
OF_PYTORCH = ("libtorch_cpu.so", "libc10.so")  # in the extension's process before it is loaded, and never in the wheel

_BUILD = runpy.run_path(str(ROOT / "setup.py"), run_name="build")


class Failure(Exception):
    """A sentence for whoever runs ``make wheel``."""


def main() -> int:
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder:
            cuda, compiler = cuda_environment(), _compiler()
            built = compiled(compiler, cuda, Path(folder))
            wheel = tagged(built)
            codes = checked(compiler, wheel, Path(folder))
    except Failure as failure:
        print(f"make wheel: {failure}", file=sys.stderr)
        return 1
    print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 1e6:.1f} MB, {time.monotonic() - started:.0f} s")
    print(f"compiled in: CPU kernels; {f'CUDA kernels for {codes}' if codes else 'no CUDA kernels (HICL_FAST_CUDA=0)'}")
    return 0


def wants_cuda() -> bool:
    return os.environ.get("HICL_FAST_CUDA") != "0"


def cuda_environment() -> dict[str, str]:
    """What tells setup.py to build the CUDA kernels, and where nvcc is."""
    if not wants_cuda():
        return {"HICL_FAST_CUDA": "0"}
    home = os.environ.get("CUDA_HOME") or str(_installed_cuda())
    if shutil.which("nvcc", path=str(Path(home) / "bin")) is None:
        raise Failure(f"no nvcc in {home}/bin; HICL_FAST_CUDA=0 make wheel builds a wheel without the CUDA kernels")
    return {"HICL_FAST_CUDA": "1", "CUDA_HOME": home}


def compiled(compiler: list[str], cuda: dict[str, str], folder: Path) -> Path:
    """The wheel as setuptools builds it, for this machine alone."""
    for left in (ROOT / "build").glob("lib*"):
        shutil.rmtree(left)  # what an earlier build left there would go into the wheel
    flags = old_systems.link_flags(compiler, GLIBC, folder / "old_systems")
    environment = {"HICL_FAST_BUILD": "require", **cuda, "LDFLAGS": shlex.join(flags)}
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        ".",
    ]
    _run(command, **environment)
    return next(folder.glob("*.whl"))


def tagged(built: Path) -> Path:
    """The wheel under the tags of the systems that it loads on, in dist/; an error where one is newer than GLIBC."""
    DIST.mkdir(exist_ok=True)
    for old in DIST.glob("*.whl"):
        old.unlink()
    wanted = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{platform.machine()}"
    excluded = [option for library in OF_PYTORCH for option in ("--exclude", library)]
    _run([*_tool("auditwheel"), "repair", "--plat", wanted, *excluded, "--wheel-dir", str(DIST), str(built)])
    return next(DIST.glob("*.whl"))


def checked(compiler: list[str], wheel: Path, folder: Path) -> str:
    """The GPUs that the wheel has code for; an error where something in it is not as it should be."""
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if re.search(r"\.so(\.|$)", name)]
        extension = Path(archive.extract(EXTENSION, folder))
    if libraries != [EXTENSION]:
        raise Failure(f"the wheel holds libraries of others: {', '.join(libraries)}")
    if unversioned := old_systems.unversioned(compiler, extension):
        raise Failure(f"the extension takes whatever version there is of {', '.join(sorted(unversioned))}")
    codes = gpu_codes(extension)
    if wants_cuda() and (missing := set(_wanted_codes()) - set(codes)):
        raise Failure(f"the extension has no code for {', '.join(sorted(missing))}; it has {' '.join(codes) or 'none'}")
    _run([*_tool("twine"), "check", "--strict", str(wheel)])
    return " ".join(codes)


def gpu_codes(extension: Path) -> list[str]:
    """What cuobjdump finds in the extension: sm_80 is machine code, compute_80 PTX, in every one of its parts."""
    cuobjdump = _installed_cuda() / "bin" / "cuobjdump"
    command = [str(cuobjdump), "--list-elf", "--list-ptx", str(extension)]
    listed = subprocess.run(command, capture_output=True, text=True).stdout
    files = re.findall(r"\.(\w+)\.(cubin|ptx)$", listed, re.MULTILINE)
    found = [arch if kind == "cubin" else arch.replace("sm_", "compute_") for arch, kind in files]
    parts = len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    return [code for code in dict.fromkeys(found) if found.count(code) == parts]


def _wanted_codes() -> list[str]:
    archs = os.environ.get("HICL_FAST_ARCHS", "").split() or list(_BUILD["ARCHS"])
    return [*(f"sm_{arch}" for arch in archs), f"compute_{archs[0]}"]


def _compiler() -> list[str]:
    compiler = _BUILD["find_compiler"]()
    if sys.platform != "linux" or compiler is None:
        raise Failure("it needs Linux and a C++ compiler; `pip install --no-build-isolation .` installs without either")
    return compiler


def _installed_cuda() -> Path:
    """The folder that NVIDIA's packages share."""
    return next((TOOLS / "lib").glob("python*/site-packages/nvidia/cu*"), TOOLS / "cuda")


def _tool(name: str) -> list[str]:
    return [str(TOOLS / "bin" / "python"), "-m", name]


def _run(command: list[str], **environment: str) -> None:
    path = f"{TOOLS / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"  # auditwheel calls patchelf
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise Failure(f"this failed: {shlex.join(command)}\n{done.stdout}")


if __name__ == "__main__":
    sys.exit(main())
