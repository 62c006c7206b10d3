"""The benchmark of hard-negative mixing, on batches small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import hard_negatives
import pytest
import torch
from report import exit_status
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
    rows = hard_negatives.main([*SMALL, "--backends", "torch", "--rivals", "eager"])
    row = next(row for row in rows if row["name"] == "eager")
    assert row["skipped"].startswith("wrong: relative error") and "median" not in row
    assert exit_status(rows) == 0  # it is not this library's


def test_what_is_wrong_with_ours_is_said_and_fails_it_at_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("an illegal memory access\nand a stack")

    monkeypatch.setattr(hard_negatives, "fused", broken)
    monkeypatch.setattr(hard_negatives, "plain", broken)
    file = tmp_path / "out.json"
    rows = hard_negatives.main([*SMALL, "--backends", "torch", "--rivals", "eager", "--json", str(file)])
    said = {row["name"]: row.get("skipped") for row in json.loads(file.read_text())["rows"]}
    assert said["hicl_fast torch"] == said[hard_negatives.PLAIN] == "RuntimeError: an illegal memory access"
    assert said["eager"] is said["selection: torch"] is None  # timed, though there is nothing to compare them with
    assert exit_status(rows) == 1


def test_large_batches_leave_the_loop_out() -> None:
    args = hard_negatives.parse(SMALL)
    assert "s a step" in hard_negatives.hindrance("authors' loop", 1024, args, torch.device("cpu"))
