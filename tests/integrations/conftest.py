"""A small random model that needs no network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers model with dropout, two layers of 256 dimensions."""
    scratch = pytest.importorskip("hicl_fast.trainer.scratch")
    folder = tmp_path_factory.mktemp("scratch")
    torch.manual_seed(0)
    scratch.write_scratch_model(TEXTS * 2, folder)
    return folder
