"""Builds the package and, inside it, the C++ extension hicl_fast._C from csrc/. All else is in pyproject.toml.

csrc/cuda goes into it where PyTorch is built for CUDA and there is nvcc to compile it; no GPU is needed for that.

Environment variables:
    HICL_FAST_BUILD   auto     (default) build the extension; where there is no C++ compiler, warn and go on without it
                      require  an error where the extension can't be built
                      skip     don't build it
    HICL_FAST_CUDA    auto     (default) the CUDA kernels where PyTorch is built for CUDA; without nvcc, warn and go on
                      1        the CUDA kernels, whatever PyTorch is built for; an error without nvcc
                      0        no CUDA kernels
    HICL_FAST_ARCHS   the GPUs to compile for; default: those of "80 90a 100" that nvcc knows
    CUDA_HOME         where CUDA is, with bin/nvcc; default: the nvcc on the PATH, else /usr/local/cuda
    CXX               the C++ compiler; default: the first of c++, g++, clang++
    CXXFLAGS          flags added to the compiler's
    LDFLAGS           flags and files added to the linker's, before the libraries
    MAX_JOBS          compilations at a time; default: one a core
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, ExecError, PlatformError

ROOT = Path(__file__).resolve().parent
EXTENSION = "hicl_fast._C"
MODES = ("auto", "require", "skip")
CUDA_MODES = ("auto", "1", "0")

# One binary for every PyTorch from 2.10 on (the stable ABI) and every Python from 3.10 on (the limited API).
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000"]
COMPILE_FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", *DEFINES]
TORCH_LIBRARIES = ["-ltorch_cpu", "-lc10"]

# Sources named for an instruction set are compiled for it; the code in them runs only where the processor has it.
INSTRUCTION_SETS = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}

CUDA_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
CUDA_LIBRARIES = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]  # nothing of CUDA is needed to load the extension
ARCHS = ("80", "90a", "100")
CUDA_ABOUT = Path("csrc/cuda/about.cpp")

# What the compiler is tried on first: that it runs, knows C++17 and finds Python's and PyTorch's headers.
PROBE = "#include <Python.h>\n#include <torch/csrc/stable/library.h>\n"


def build_mode() -> str:
    mode = os.environ.get("HICL_FAST_BUILD", "auto")
    if mode not in MODES:
        raise PlatformError(f"HICL_FAST_BUILD: expected one of {', '.join(MODES)}, got {mode!r}")
    return mode


def find_compiler() -> list[str] | None:
    """The C++ compiler's command, or None where there is none."""
    asked = shlex.split(os.environ.get("CXX", ""))
    if asked:
        return asked if shutil.which(asked[0]) else None
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def without_extension(reason: str) -> None:
    """Says that the package goes without the extension, or stops where that was ruled out."""
    if build_mode() == "require":
        raise PlatformError(f"hicl-fast: {reason}; HICL_FAST_BUILD=require needs the C++ extension")
    sys.stderr.write(f"hicl-fast: WARNING: {reason}: going on without the C++ backend `cpp`; `torch` does its work\n")


def source_digest() -> str:
    """Of all that the extension is made of, in hexadecimal; the linker puts it into the file as its build id."""
    digest = hashlib.sha1()
    for path in sorted([ROOT / "setup.py", *(ROOT / "csrc").rglob("*.*")]):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def flags_of(source: Path) -> list[str] | None:
    """The flags for a source's instruction set, or None where this machine's processors don't have it."""
    for suffix, flags in INSTRUCTION_SETS.items():
        if source.stem.endswith(suffix):
            return flags if platform.machine() in ("x86_64", "AMD64") else None
    return []


def sources() -> list[Path]:
    found = [ROOT / "csrc" / "module.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    if wants_cuda():
        found += sorted([*(ROOT / "csrc" / "cuda").glob("*.cpp"), *(ROOT / "csrc" / "cuda").glob("*.cu")])
    return [path.relative_to(ROOT) for path in found if flags_of(path) is not None]


def wants_cuda() -> bool:
    """Whether the CUDA kernels are built; says so where they should be and can't."""
    mode = os.environ.get("HICL_FAST_CUDA", "auto")
    if mode not in CUDA_MODES:
        raise PlatformError(f"HICL_FAST_CUDA: expected one of {', '.join(CUDA_MODES)}, got {mode!r}")
    if mode == "0" or (mode == "auto" and not torch_has_cuda()):
        return False
    if find_nvcc() is not None:
        return True
    reason = "no nvcc found (looked in CUDA_HOME, on the PATH and in /usr/local/cuda)"
    if mode == "1":
        raise PlatformError(f"hicl-fast: {reason}; HICL_FAST_CUDA=1 needs the CUDA compiler")
    sys.stderr.write(f"hicl-fast: WARNING: {reason}: going on without the CUDA kernels; `triton` does their work\n")
    return False


def torch_has_cuda() -> bool:
    """What PyTorch's version.py says, without the seconds that importing PyTorch takes."""
    return re.search(r"^cuda\b.*=\s*['\"]", (torch_folder() / "version.py").read_text(), re.MULTILINE) is not None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def gpu_flags(nvcc: str) -> list[str]:
    """Machine code for every architecture, and PTX of the first for GPUs of which nvcc has no machine code."""
    archs = os.environ.get("HICL_FAST_ARCHS", "").split()
    if not archs:
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
        archs = [arch for arch in ARCHS if f"compute_{arch.rstrip('a')}" in known]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}"]


def cuda_build(nvcc: str) -> str:
    """What the CUDA kernels are built with and for, as the extension tells it: sm_ is machine code, compute_ PTX."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\S+),", said)
    return " ".join(
        [f"CUDA {release[1] if release else '?'}:", *(flag.rpartition("code=")[2] for flag in gpu_flags(nvcc))]
    )


def cuda_library_folders(nvcc: str) -> list[str]:
    """Where nvcc's own CUDA lies, which it tells; it may be a link or a script somewhere else."""
    told = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    home = re.search(r"^#\$ TOP=(.*)$", told, re.MULTILINE)
    top = Path(home[1].strip()) if home else Path(nvcc).resolve().parents[1]
    return [f"-L{folder}" for folder in (top / "lib64", top / "lib", *top.glob("targets/*/lib")) if folder.is_dir()]


def torch_folder() -> Path:
    """PyTorch's folder, found without the seconds that importing it takes."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        raise PlatformError(
            "hicl-fast builds against the PyTorch already installed, and this Python has none. Install torch, then\n"
            "    pip install --no-build-isolation .\n"
            "(HICL_FAST_BUILD=skip installs without the C++ backend)"
        )
    return Path(spec.origin).parent


def extensions() -> list[Extension]:
    if build_mode() == "skip":
        return []
    if find_compiler() is None:
        without_extension(f"no C++ compiler found (looked for {os.environ.get('CXX') or 'c++, g++, clang++'})")
        return []
    return [Extension(EXTENSION, [str(path) for path in sources()], py_limited_api=True)]


def command_for(source: Path, compile_command: list[str]) -> list[str]:
    """The compiler and its flags for a source."""
    if source.suffix == ".cu":
        nvcc = str(find_nvcc())
        return [nvcc, *CUDA_FLAGS, *gpu_flags(nvcc)]
    command = [*compile_command, *(flags_of(source) or [])]
    return [*command, f'-DHICL_CUDA_BUILD="{cuda_build(str(find_nvcc()))}"'] if source == CUDA_ABOUT else command


def run(command: list[str], title: str) -> None:
    sys.stdout.write(f"{title}\n")  # one write: several threads report here
    if subprocess.run(command).returncode != 0:
        raise CompileError(
            f"failed: {shlex.join(command)}\n"
            "(HICL_FAST_CUDA=0 builds without the CUDA kernels, HICL_FAST_BUILD=skip installs without the C++ backend)"
        )


class BuildExtension(build_ext):
    """Compiles each source with flags of its own, several at a time, and only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        if compiler is None:
            raise ExecError("hicl-fast: no C++ compiler found")
        torch = torch_folder()
        includes = [f"-I{torch / 'include'}", f"-I{sysconfig.get_path('include')}", "-Icsrc"]
        compile_command = [*compiler, *COMPILE_FLAGS, *includes, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        failure = self.probe(compile_command)
        if failure:
            without_extension(f"the C++ compiler {shlex.join(compiler)} does not build PyTorch extensions ({failure})")
            ext.optional = True  # setuptools then doesn't look for the file
            return
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(lambda source: self.compile(compile_command, Path(source)), ext.sources))
        libraries = [*shlex.split(os.environ.get("LDFLAGS", "")), *TORCH_LIBRARIES]
        if any(source.endswith(".cu") for source in ext.sources):
            libraries += [*cuda_library_folders(str(find_nvcc())), *CUDA_LIBRARIES]
        target = Path(self.get_ext_fullpath(ext.name))
        self.link([*compiler, f"-L{torch / 'lib'}"], objects, libraries, target)

    def probe(self, compile_command: list[str]) -> str:
        """The compiler's first complaint about PROBE; empty where it has none."""
        try:
            tried = subprocess.run(
                [*compile_command, "-fsyntax-only", "-x", "c++", "-"], input=PROBE, capture_output=True, text=True
            )
        except OSError as error:
            return str(error)
        if tried.returncode == 0:
            return ""
        lines = tried.stderr.splitlines()
        complaints = [line for line in lines if "error" in line.lower()] or lines
        return complaints[0].strip() if complaints else f"it exits with status {tried.returncode}"

    def compile(self, compile_command: list[str], source: Path) -> Path:
        """Compiles a source where it, or how it is to be compiled, has changed."""
        target = Path(self.build_temp) / source.with_name(f"{source.name}.o")
        command = [*command_for(source, compile_command), "-c", str(source), "-o", str(target)]
        how = target.with_suffix(".command")  # so that the objects of other architectures are not taken for these
        prerequisites = [source, ROOT / "setup.py", *source.parent.glob("*.h"), *source.parent.glob("*.cuh")]
        prerequisites += (ROOT / "csrc").glob("*.h")
        is_same = target.exists() and how.exists() and how.read_text() == shlex.join(command)
        if self.force or not is_same or target.stat().st_mtime < max(p.stat().st_mtime for p in prerequisites):
            target.parent.mkdir(parents=True, exist_ok=True)
            how.unlink(missing_ok=True)
            run(command, f"compile {source}")
            how.write_text(shlex.join(command))
        return target

    def link(self, linker: list[str], objects: list[Path], libraries: list[str], target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        if sys.platform == "linux":
            shared.append(
                f"-Wl,--build-id=0x{source_digest()}"
            )  # tells whether a file that is there is of these sources
        run([*linker, *shared, *map(str, objects), *libraries, "-o", str(target)], f"link {target}")


if __name__ == "__main__":  # tools/check_cuda.py reads the settings above
    os.chdir(ROOT)
    # kernels/ lies beside the package and is installed inside it.
    setup(
        packages=[
            *find_packages(include=["hicl_fast", "hicl_fast.*"]),
            "hicl_fast.kernels",
            *(f"hicl_fast.kernels.{name}" for name in find_packages("kernels")),
        ],
        package_dir={"hicl_fast": "hicl_fast", "hicl_fast.kernels": "kernels"},
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
