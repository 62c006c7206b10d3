"""The throughput benchmark, on batches small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import loss_throughput
import measure
import pytest
import rivals
import torch
from torch import Tensor

SMALL = ["--batch-sizes", "8", "33", "--dim", "24", "--seconds", "2", "--device", "cpu"]


def test_table_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    loss_throughput.main([*SMALL, "--backends", "torch", "--rivals", "eager", "simcse broadcast", *files])
    written = json.loads((tmp_path / "out.json").read_text())
    assert {"date", "commit", "device", "torch", "threads"} <= written["machine"].keys()
    timed = {(row["batch"], row["name"]) for row in written["rows"] if "median" in row}
    names = (loss_throughput.LIMIT, "hicl_fast torch", "eager", "simcse broadcast")
    assert {(n, name) for n in (8, 33) for name in names} <= timed
    for row in written["rows"]:
        assert row["fastest"] <= row["median"] <= row["slowest"]
        if row["name"] != loss_throughput.LIMIT:
            assert row["error"] < 1e-4 and row["memory"] is not None
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "x limit" in capsys.readouterr().out


def test_a_rival_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def almost(batch: rivals.Batch) -> rivals.Loss:
        def loss(query: Tensor, key: Tensor) -> Tensor:
            logits = torch.nn.functional.normalize(query) @ torch.nn.functional.normalize(key).T
            return torch.nn.functional.cross_entropy(logits / (1.01 * batch.temperature), batch.labels)

        return loss

    monkeypatch.setattr(loss_throughput, "RIVALS", [rivals.Rival("almost", almost)])
    rows = loss_throughput.main([*SMALL, "--backends", "torch", "--rivals", "almost"])
    (row, _) = (row for row in rows if row["name"] == "almost")
    assert "median" not in row and row["skipped"].startswith("wrong: relative error")


def test_a_rival_too_large_for_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_throughput, "available_bytes", lambda device: 100)
    rows = loss_throughput.main([*SMALL, "--backends", "torch", "--rivals", "eager"])
    assert all("GB are free" in row["skipped"] for row in rows if row["name"] == "eager")


def test_unknown_rivals_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        loss_throughput.main([*SMALL, "--rivals", "nobody"])
    assert "expected none or some of" in capsys.readouterr().err


def test_steps_are_timed_in_turn() -> None:
    order: list[str] = []
    steps = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    timings = measure.time_in_turn(steps, 0.0, torch.device("cpu"), "")
    assert timings["a"].rounds >= 3
    assert order[-6:] == ["a", "b"] * 3


def test_peak_memory_of_a_step() -> None:
    peak = measure.peak_bytes(lambda: torch.ones(8_000_000).sum(), torch.device("cpu"))
    assert 30e6 < peak < 60e6
