"""The ``cuda`` backend of these tests: the GPU's, or the emulated one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hicl_fast.ops.backends import registry
from tests.cuda import emulation
from tests.gpu.device import IS_GPU


@pytest.fixture(scope="session")
def cuda_backend() -> Iterator[None]:
    if IS_GPU:
        if not registry.is_available("cuda"):
            pytest.skip("the extension has no CUDA kernels")
        yield
        return
    emulation.load()
    with emulation.on_the_cpu(preferred=True):
        yield
