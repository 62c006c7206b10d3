"""``make sanitize``: the tests of csrc/cpu with an extension built for AddressSanitizer and UndefinedBehaviorSanitizer.

The extension is built a second time, into build/sanitize, and stands in for the one beside the package in processes of
their own, one for every instruction set that the processor has row kernels for. The BLAS isn't instrumented: in this
build every operand of a product is looked over before (csrc/cpu/sanitizer.h), and each part of a workspace is memory of
its own, with an end that the sanitizer knows.

    python tools/sanitize.py            every test of the C++ backend's operators
    python tools/sanitize.py --quick    the sweep over sizes and budgets, and wrong arguments: every operator, both types
    python tools/sanitize.py tests/...  these tests

Exit status: 0 where nothing was found, 1 where something was, 77 where the compiler has no sanitizers.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "sanitize"
SANITIZERS = "-fsanitize=address,undefined"
NO_SANITIZER = 77

# Little optimisation compiles in half the time; a report ends the process.
FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all"
QUICK = ["tests/ops/test_block_edges.py", "tests/ops/test_wrong_operands.py", "-m", "not slow"]
# What is traced reaches the same C++ by a way that takes many times as long.
FULL = [
    "tests/ops",
    "tests/test_pairs.py",
    "-k",
    "(cpp or block_edges or wrong_operands or test_pairs) and not compile",
]
LEVELS = ("plain", "avx2", "avx512")  # of HICL_FAST_CPU; a processor that has one has those before it


def compiler() -> str:
    return shlex.split(os.environ.get("CXX", ""))[0] if os.environ.get("CXX") else shutil.which("c++") or "g++"


def runtime(name: str) -> str:
    """Where a library of the compiler's is; empty where there is none."""
    found = subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if Path(found).is_absolute() else ""


def build() -> None:
    environment = {**os.environ, "CXX": f"{compiler()} {SANITIZERS}", "CXXFLAGS": FLAGS}
    environment |= {"HICL_FAST_BUILD": "require", "HICL_FAST_CUDA": "0"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext"]
    command += ["--build-temp", str(FOLDER / "objects"), "--build-lib", str(FOLDER)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def load() -> None:
    """The sanitized extension as hicl_fast._C, before anything else asks for that."""
    import torch  # noqa: F401  its libraries are what the extension is linked to

    path = next((FOLDER / "hicl_fast").glob("_C*"))
    spec = importlib.util.spec_from_file_location("hicl_fast._C", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["hicl_fast._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """This module is a plugin of the pytest that it starts: before a conftest imports hicl_fast, which loads its own."""
    load()


def environment(preload: str) -> dict[str, str]:
    # Python and PyTorch leave what they allocate once for the end of the process.
    sanitizers = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return {**os.environ, **sanitizers, "LD_PRELOAD": preload, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}


def levels(environment: dict[str, str]) -> tuple[str, ...]:
    """Of row kernels that the processor has."""
    program = "from tools import sanitize; sanitize.load(); import torch; print(torch.ops.hicl_fast_cpp.capability())"
    command, unset = [sys.executable, "-c", program], {**environment, "HICL_FAST_CPU": ""}
    widest = subprocess.run(command, cwd=ROOT, env=unset, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    return LEVELS[: LEVELS.index(widest) + 1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a minute or two instead of all")
    options, asked = parser.parse_known_args()
    libraries = [
        runtime(name) for name in ("libasan.so", "libstdc++.so")
    ]  # the second, whose exceptions the first watches
    if not all(libraries):
        print(f"{compiler()} has no sanitizers: nothing was run", file=sys.stderr)
        return NO_SANITIZER
    build()
    preloaded = environment(":".join(libraries))
    tests, status = asked or (QUICK if options.quick else FULL), 0
    for level in levels(preloaded):
        print(f"row kernels: {level}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "--capture=sys", "-p", "tools.sanitize", *tests]
        status |= subprocess.run(command, cwd=ROOT, env={**preloaded, "HICL_FAST_CPU": level}).returncode != 0
    return status


if __name__ == "__main__":
    sys.exit(main())
