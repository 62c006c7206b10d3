"""The benchmark of hard-negative mixing, on batches small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import hard_negatives
import pytest
import torch
from torch import Tensor

SMALL = ["--batch-sizes", "12", "--dim", "16", "-k", "4", "--num-mixed", "5", "--seconds", "2", "--device", "cpu"]


def test_all_ways_compute_the_same(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    hard_negatives.main([*SMALL, *files])
    rows = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    for name in ("hicl_fast torch", "eager", "authors' loop"):
        assert rows[name]["error"] < 1e-5 and rows[name]["median"] > 0
    assert rows[hard_negatives.PLAIN]["ratio"] == 1
    assert (tmp_path / "out.png").is_file()


def test_a_wrong_way_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_mixtures(query: Tensor, key: Tensor, pairs: Tensor) -> Tensor:
        return hard_negatives.plain(query, key, "torch")

    monkeypatch.setitem(hard_negatives.RIVALS, "eager", without_mixtures)
    with pytest.raises(RuntimeError, match="wrong: relative error"):
        hard_negatives.main([*SMALL, "--backends", "torch", "--rivals", "eager"])


def test_large_batches_leave_the_loop_out() -> None:
    args = hard_negatives.parse(SMALL)
    assert "s a step" in hard_negatives.hindrance("authors' loop", 1024, args, torch.device("cpu"))
