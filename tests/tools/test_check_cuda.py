"""tools/check_cuda.py: what it reads out of the assembler's report, and that csrc/cuda passes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import check_cuda

ROOT = Path(__file__).resolve().parents[2]
REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4hicl4cuda5firstIfEEvPT_' for 'sm_90a'
ptxas info    : Function properties for _ZN4hicl4cuda5firstIfEEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 31 registers, used 1 barriers, 2176 bytes smem
ptxas info    : Compiling entry function 'second' for 'sm_80'
ptxas info    : Function properties for second
    16 bytes stack frame, 20 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 128 registers, used 0 barriers, 16 bytes cumulative stack size, 544 bytes cmem[0]
"""


def test_the_assemblers_report_is_read() -> None:
    first, second = check_cuda.resources(REPORT)
    assert (first.arch, first.registers, first.shared, first.stack, first.spills) == ("sm_90a", 31, 2176, 0, 0)
    assert first.is_good and "first" in first.kernel
    assert (second.arch, second.registers, second.shared, second.stack, second.spills) == ("sm_80", 128, 0, 16, 48)
    assert not second.is_good


def run_check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/check_cuda.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def test_without_nvcc_it_says_so(tmp_path: Path) -> None:
    done = run_check(CUDA_HOME=str(tmp_path))
    assert done.returncode == check_cuda.NO_COMPILER
    assert done.stdout.count("\n") == 1 and "no nvcc" in done.stdout


@pytest.mark.slow
def test_every_kernel_compiles_for_every_architecture_without_spills(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    done = run_check("--json", str(table))
    if done.returncode == check_cuda.NO_COMPILER:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout
    kernels = json.loads(table.read_text())
    assert {needs["arch"] for needs in kernels} == {"sm_80", "sm_90a", "sm_100"}
    assert len({needs["kernel"] for needs in kernels}) * 3 == len(kernels)
    print(f"\n{done.stdout}")
