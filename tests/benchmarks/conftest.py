"""The benchmarks are programs, not a package: their folder is where they find each other."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture(scope="module", autouse=True)
def _nothing_else_is_garbage() -> Iterator[None]:
    """What earlier tests have made is not looked through before each measurement of memory."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
