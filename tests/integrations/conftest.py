"""A small random model that needs no network, and how large tensors get."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.conftest import clusters as clusters

TEXTS = [
    "a quick brown fox jumps over the lazy dog",
    "the weather is lovely today",
    "he drove his car to work every single morning",
    "two people are playing chess in the park",
    "rain fell on the quiet town all day long",
    "she walked to the office instead",
    "a small boat crosses the wide river slowly",
    "children sing in the old church",
]


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            self.elements = max(self.elements, x.numel() if isinstance(x, Tensor) else 0)
        return out


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers model with dropout, two layers of 256 dimensions."""
    scratch = pytest.importorskip("hicl_fast.trainer.scratch")
    folder = tmp_path_factory.mktemp("scratch")
    torch.manual_seed(0)
    scratch.write_scratch_model(TEXTS * 2, folder)
    return folder
