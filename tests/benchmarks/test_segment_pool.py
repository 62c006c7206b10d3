"""The pooling benchmark, on inputs small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import segment_pool
import torch
from torch import Tensor

SMALL = ["--num-segments", "200", "--dim", "24", "--seconds", "0.1", "--device", "cpu", "--backends", "torch"]


def test_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    segment_pool.main([*SMALL, "--json", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    names = [f"{name}{part}" for name in ("hicl_fast torch", "eager") for part in ("", " + backward", " + both")]
    expected = {(kind, name) for kind in segment_pool.LENGTHS for name in (segment_pool.COPY, *names)}
    assert {(row["lengths"], row["name"]) for row in rows} == expected
    for row in rows:
        assert row["fastest"] <= row["median"] <= row["slowest"]
        if row["name"] == segment_pool.COPY:
            assert row["ratio"] == pytest.approx(1)
        else:
            assert row["error"] < 1e-5
    assert "x copy" in capsys.readouterr().out


def test_bytes_that_are_moved() -> None:
    rows = {row["name"]: row for row in segment_pool.main(SMALL) if row["lengths"] == "sequences of 8"}
    segments, pooled = 200 * 24 * 4, 25 * 24 * 4
    assert rows[segment_pool.COPY]["bytes"] == 2 * segments
    assert rows["eager"]["bytes"] == segments + pooled
    assert rows["eager + both"]["bytes"] == 3 * segments + 2 * pooled


def test_pooling_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def unweighted(segments: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        return segment_pool.HF.segment_pool(segments, offsets, torch.ones_like(weights), backend="torch")

    monkeypatch.setattr(segment_pool, "eager", unweighted)
    rows = segment_pool.main(SMALL)
    wrong = {row["name"] for row in rows if row.get("skipped", "").startswith("wrong: relative error")}
    assert wrong == {"eager", "eager + backward", "eager + both"}
    assert all("median" in row for row in rows if row["name"].startswith("hicl_fast"))
