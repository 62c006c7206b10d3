"""HICL_FAST_CPU: which row kernels the backend cpp takes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import hicl_fast
from hicl_fast.ops.backends import cpp

if not any(status.name == "cpp" and status.available for status in hicl_fast.backends()):
    pytest.skip("the C++ extension was not built", allow_module_level=True)

SHOW = "import hicl_fast; print(next(s.detail for s in hicl_fast.backends() if s.name == 'cpp'))"


def said(asked: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HICL_FAST_CPU": asked}
    return subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, env=environment)


def test_the_narrowest_can_be_asked_for() -> None:
    assert cpp.row_kernel_sets()[0] == "plain"
    assert said("plain").stdout == "row kernels for plain\n"


def test_a_set_that_the_processor_has_not_is_refused() -> None:
    done = said("avx1024")
    assert done.returncode != 0
    expected = (
        f"HICL_FAST_CPU: expected one of {', '.join(cpp.row_kernel_sets())}, which this processor has, got 'avx1024'"
    )
    assert done.stderr.splitlines()[-1] == f"ValueError: {expected}"
