"""The ``cuda`` backend on the CPU, emulated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cuda import emulation


@pytest.fixture(scope="session")
def _operators() -> None:
    emulation.load()


@pytest.fixture
def emulated(_operators: None) -> Iterator[None]:
    """backend="cuda" takes tensors on the CPU."""
    with emulation.on_the_cpu():
        yield


@pytest.fixture(params=[0, 1, 7], ids=["ascending", "descending", "shuffled"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """In which order warps and lanes run."""
    monkeypatch.setenv("HICL_EMULATION_ORDER", str(request.param))
    return request.param
