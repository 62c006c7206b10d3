"""The code that docs/integrations.md and the docstrings show runs, with stand-ins for what only a reader has."""

from __future__ import annotations

import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import ROOT
from tests.integrations.conftest import TEXTS

DOCUMENT = "docs/integrations.md"


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    st = pytest.importorskip("sentence_transformers")
    return st.SentenceTransformer(str(model_folder), device="cpu")


@pytest.fixture
def patched() -> Iterator[None]:
    yield
    importlib.import_module("hicl_fast.integrations.sentence_transformers").unpatch()


def test_the_document(model: Any, patched: None) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / DOCUMENT).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        exec(compile(block, DOCUMENT, "exec"), {"torch": torch, "model": model})


class Trainer:
    """A step of a trainer on columns of texts."""

    def __init__(self, model: Any, train_dataset: list[list[str]], loss: nn.Module) -> None:
        self.columns = [
            dict((getattr(model, "preprocess", None) or model.tokenize)(column)) for column in train_dataset
        ]
        self.loss = loss

    def train(self) -> None:
        self.loss(self.columns, None).backward()


class Cache:
    """GradCache's constructor and call."""

    def __init__(self, models: list[nn.Module], chunk_sizes: int, loss_fn: nn.Module) -> None:
        self.models, self.loss_fn = models, loss_fn

    def __call__(self, *columns: torch.Tensor) -> None:
        self.loss_fn(*(model(x) for model, x in zip(self.models, columns, strict=True))).backward()


@pytest.mark.parametrize("name", ["sentence_transformers", "grad_cache", "open_clip"])
def test_the_docstrings(name: str, request: pytest.FixtureRequest) -> None:
    if name == "open_clip":
        module = pytest.importorskip("tests.integrations.test_open_clip").fused
    else:
        module = importlib.import_module(f"hicl_fast.integrations.{name}")
    names: dict[str, Any] = {"rank": 0, "world_size": 1, "GradCache": Cache, "encoder": nn.Linear(4, 3)}
    names |= {"queries": torch.randn(5, 4), "passages": torch.randn(5, 4), "logit_scale": torch.tensor(2.0)}
    names |= {"image_features": torch.randn(5, 4, requires_grad=True), "text_features": torch.randn(5, 4)}
    if name == "sentence_transformers":
        hicl_fast = importlib.import_module("hicl_fast")
        names |= {"model": request.getfixturevalue("model"), "SentenceTransformerTrainer": Trainer}
        names |= {"HardNegativeMixing": hicl_fast.HardNegativeMixing, "documents": [[" ".join(TEXTS), *TEXTS]]}
        names |= {"texts": [TEXTS * 2], "pairs": [TEXTS[:4], TEXTS[4:]]}
    examples = [
        (cls.__name__, example.source)
        for cls in vars(module).values()
        if isinstance(cls, type) and cls.__module__.startswith("hicl_fast.integrations")
        for example in doctest.DocTestParser().get_examples(cls.__doc__ or "")
    ]
    assert examples
    names |= {cls: getattr(module, cls) for cls, _ in examples}
    for cls, source in examples:
        exec(compile(source, f"{name}.{cls}", "exec"), names)
