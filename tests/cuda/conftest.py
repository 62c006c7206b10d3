"""The ``cuda`` backend on the CPU, emulated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hicl_fast.backend import cuda, registry
from tests.cuda import emulation


def _forget_choices() -> None:
    for function in (registry._status, registry._refusal, registry._preferred):
        function.cache_clear()


@pytest.fixture(scope="session")
def _operators(tmp_path_factory: pytest.TempPathFactory) -> None:
    if emulation.COMPILER is None:
        pytest.skip("no C++ compiler")
    registry.backends()  # loads the extension, if there is one
    if hasattr(torch.ops.hicl_fast_cuda, "segment_pool"):
        pytest.skip("the extension has the real kernels under the emulated ones' names")
    sources = sorted([*emulation.SOURCES.glob("*.cu"), *emulation.SOURCES.glob("*.cpp")])
    torch.ops.load_library(emulation.build(tmp_path_factory.mktemp("cuda"), sources, "emulated.so"))


@pytest.fixture
def emulated(_operators: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """backend="cuda" takes tensors on the CPU."""
    monkeypatch.setattr(cuda, "DEVICE_TYPE", "cpu")
    _forget_choices()
    yield
    _forget_choices()


@pytest.fixture(params=[0, 1, 7], ids=["ascending", "descending", "shuffled"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """In which order warps and lanes run."""
    monkeypatch.setenv("HICL_EMULATION_ORDER", str(request.param))
    return request.param
