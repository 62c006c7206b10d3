"""Every example runs, and what it trains gets better."""

from __future__ import annotations

import importlib.util
import runpy

import pytest

from tests.conftest import ROOT

PACKAGES = {
    "lightning_simcse": "lightning",
    "sentence_transformers_hnm": "sentence_transformers",
    "sentence_transformers_trainer": "datasets",
    "simcse": "tokenizers",
    "duplicate_texts": "tokenizers",
    "hicl_long_documents": "tokenizers",
}


@pytest.mark.parametrize(
    "name",
    [
        "simcse",
        "duplicate_texts",
        "sentence_transformers_hnm",
        "sentence_transformers_trainer",
        "hicl_long_documents",
        "clip_symmetric",
        "lightning_simcse",
    ],
)
def test_example(name: str) -> None:
    package = PACKAGES.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    losses = runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]()
    assert all(loss == loss for loss in losses)
    assert losses[-1] < losses[0]
