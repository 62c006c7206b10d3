"""Importing hicl_fast imports none of the libraries, and a missing library is named."""

from __future__ import annotations

import subprocess
import sys

PACKAGES = {
    "sentence_transformers": ("sentence_transformers", "sentence-transformers"),
    "open_clip": ("open_clip", "open_clip_torch"),
    "pytorch_metric_learning": ("pytorch_metric_learning", "pytorch-metric-learning"),
}


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_what_is_imported_when() -> None:
    """In one process, since starting one takes longer than all that is looked at."""
    libraries = [package for package, _ in PACKAGES.values()] + ["transformers"]
    said = run(
        f"""
import importlib, sys
import hicl_fast, hicl_fast.integrations.grad_cache, hicl_fast.integrations.simcse
print([name for name in {libraries} if name in sys.modules])
for integration, (package, _) in {PACKAGES}.items():
    sys.modules[package] = None  # what import then finds is nothing
    try:
        importlib.import_module("hicl_fast.integrations." + integration)
    except ImportError as error:
        print(error)
"""
    ).splitlines()
    assert said[0] == "[]"
    assert len(said) == 1 + len(PACKAGES)
    for line, (integration, (_, distribution)) in zip(said[1:], PACKAGES.items(), strict=True):
        assert line.startswith(f"hicl_fast.integrations.{integration} needs {distribution}") and "pip install" in line
