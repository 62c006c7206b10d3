"""Builds csrc/cuda for the CPU, over tests/cuda/emulator.h: the kernels, their launchers and the operators as they are."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hicl_fast.ops.backends import cuda, registry

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
EMULATOR = Path(__file__).with_name("emulator.h")
TORCH = Path(torch.__file__).parent
COMPILER = shutil.which("c++") or shutil.which("g++")

# Fortified longjmp takes a jump to another stack for an attack.
FLAGS = ["-std=c++17", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += ["-U_FORTIFY_SOURCE", "-fno-strict-aliasing", f"-I{SOURCES}", f"-I{TORCH / 'include'}"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DHICL_CUDA_KEY=CPU"]


def build(folder: Path, sources: list[Path], name: str) -> Path:
    """A shared library of the sources; those named .cu have the emulator in front of them."""

    def compile_one(source: Path) -> str:
        target = folder / f"{source.name}.o"
        emulated = ["-x", "c++", "-include", str(EMULATOR)] if source.suffix == ".cu" else []
        subprocess.run([str(COMPILER), *FLAGS, *emulated, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / name
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl"]
    subprocess.run([str(COMPILER), "-shared", *objects, *libraries, "-o", str(library)], check=True)
    return library


def built() -> Path:
    """The library of all sources: built once for all processes and runs of tests, until something that it is made of changes."""
    sources = sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cpp")])
    made_of = [*sources, *SOURCES.glob("*.*h"), *SOURCES.parent.glob("*.h"), EMULATOR, *EMULATOR.parent.glob("*.h")]
    digest = hashlib.sha256(f"{COMPILER} {FLAGS} {torch.__version__}".encode())
    for path in sorted(set(made_of)):
        digest.update(path.read_bytes())
    kept = ROOT / "build" / "emulated"
    library = kept / f"{digest.hexdigest()[:16]}.so"
    kept.mkdir(parents=True, exist_ok=True)
    with (kept / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the second process waits for the first one's
        if not library.exists():
            for old in kept.glob("*.so"):
                old.unlink()
            with tempfile.TemporaryDirectory(dir=kept) as folder:
                build(Path(folder), sources, library.name).replace(library)
    return library


def load() -> None:
    """Registers the emulated operators; skips the test where that can't be."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    registry.backends()  # loads the extension, if there is one
    if hasattr(torch.ops.hicl_fast_cuda, "segment_pool"):
        pytest.skip("the extension has the real kernels under the emulated ones' names")
    torch.ops.load_library(built())


@contextlib.contextmanager
def on_the_cpu(*, preferred: bool = False) -> Iterator[None]:
    """backend="cuda" takes tensors on the CPU, with a GPU's order of preference if ``preferred``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "DEVICE_TYPE", "cpu")
        if preferred:
            patch.setitem(registry.PREFERENCE, "cpu", registry.PREFERENCE["cuda"])
        _forget_choices()
        yield
    _forget_choices()


def _forget_choices() -> None:
    for function in (registry._status, registry._refusal, registry._preferred):
        function.cache_clear()
