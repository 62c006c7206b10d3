"""Where the tests of this folder run: on a GPU or, where HICL_FAST_GPU_TESTS_DEVICE=cpu says so, on the CPU.

On the CPU the backend ``torch`` stands in for the GPU's, and csrc/cuda runs in the emulator of tests/cuda. Whatever fails
there is no GPU's fault: it is found without one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

import hicl_fast

ENVIRONMENT = "HICL_FAST_GPU_TESTS_DEVICE"
DEVICE = os.environ.get(ENVIRONMENT) or "cuda"
if DEVICE not in ("cpu", "cuda"):
    raise ValueError(f"{ENVIRONMENT}: expected cpu or cuda, got {DEVICE!r}")
IS_GPU = DEVICE == "cuda"
IS_HERE = not IS_GPU or torch.cuda.is_available()

# The losses' backends; ``cuda`` has tests of its own.
BACKENDS = (
    [s.name for s in hicl_fast.backends() if s.available and s.name not in ("cpp", "cuda")] if IS_GPU else ["torch"]
)

# PyTorch's own kernels are not ours to check.
SANITIZED_BACKENDS = [name if name == "torch" else pytest.param(name, marks=pytest.mark.sanitizer) for name in BACKENDS]

needs_gpu = pytest.mark.skipif(not IS_GPU, reason="is about what only a GPU has")


def sanitized(*cases: tuple[object, ...], all_of: list[tuple[object, ...]]) -> list[object]:
    """All cases, those given first marked for compute-sanitizer, under which a test takes seconds: of each kind, one."""
    assert set(cases) <= set(all_of)
    return [pytest.param(*case, marks=pytest.mark.sanitizer) if case in cases else case for case in all_of]


def first_on_the_cpu(count: int, *sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All sizes on a GPU; on the CPU, where the others would take minutes, the first ``count``."""
    return list(sizes if IS_GPU else sizes[:count])


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """On a GPU an error where the host waits for it."""
    if not IS_GPU:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
