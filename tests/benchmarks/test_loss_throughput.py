"""The throughput benchmark, on batches small enough for a test."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import loss_throughput
import measure
import pytest
import rivals
import torch
from torch import Tensor

from hicl_fast import reference

SMALL = ["--batch-sizes", "8", "33", "--dim", "24", "--seconds", "0.2", "--device", "cpu"]


def test_table_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    loss_throughput.main([*SMALL, "--backends", "torch", "--rivals", "eager", "simcse broadcast", *files])
    written = json.loads((tmp_path / "out.json").read_text())
    assert {"date", "commit", "device", "torch", "threads"} <= written["machine"].keys()
    timed = {(row["batch"], row["name"]) for row in written["rows"] if "median" in row}
    limits = (loss_throughput.LIMIT, loss_throughput.SYMMETRIC_LIMIT)
    names = (*limits, "hicl_fast torch", "hicl_fast torch symmetric", "eager", "simcse broadcast")
    assert {(n, name) for n in (8, 33) for name in names} <= timed
    for row in written["rows"]:
        assert row["fastest"] <= row["median"] <= row["slowest"]
        assert row["memory"] is not None
        if row["name"] not in limits:
            assert row["error"] < 1e-4
        of_batch = {r["name"]: r["median"] for r in written["rows"] if r["batch"] == row["batch"]}
        assert row["ratio"] == row["median"] / of_batch[limits["symmetric" in row["name"] or row["name"] == limits[1]]]
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


def test_rivals_on_gpus_are_called_as_they_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what has the arguments of inf-cl 1.2.1, cut-cross-entropy 25.1.1, memeff 0.3.1 and siglip-kernel 0.1.2."""

    def cal_flash_loss(q: Tensor, k: Tensor, labels: None = None, scale: float = 1.0, head_dim: int = 256) -> Tensor:
        q, k = (x.view(len(x), -1, head_dim).flatten(1) for x in (scale * q, k))
        return torch.nn.functional.cross_entropy(q @ k.T, torch.arange(len(q)), reduction="none")

    def linear_cross_entropy(
        e: Tensor, c: Tensor, targets: Tensor, filter_eps: str | None = "high", impl: str = "cce"
    ) -> Tensor:
        assert filter_eps is None and impl == "cce"
        return torch.nn.functional.cross_entropy(e @ c.T, targets)

    class Memeff:
        def __init__(self, temperature: float = 0.07, margin: float = 0.1, stable: bool = True) -> None:
            self.temperature, self.factor = temperature, 2.0 if stable else 1.0  # of its gradients, unless told
            assert margin >= 2  # beyond which no negative is left out

        def __call__(self, query: Tensor, key: Tensor) -> Tensor:
            return self.factor * reference.info_nce(query, key, temperature=self.temperature)

    class MemeffClip(Memeff):
        def __init__(self, temperature: float = 0.07, stable: bool = True) -> None:
            super().__init__(temperature, 2.0, stable)

        def __call__(self, query: Tensor, key: Tensor) -> Tensor:
            return self.factor * reference.info_nce(query, key, temperature=self.temperature, symmetric=True)

    def fused_siglip_loss(img: Tensor, txt: Tensor, log_temperature: Tensor, bias: Tensor) -> Tensor:
        logits = img @ txt.T * log_temperature.exp() + bias
        targets = torch.eye(len(img))
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(img)

    memeff = SimpleNamespace(MemoryEfficientQwen3Loss=Memeff, MemoryEfficientCLIPLoss=MemeffClip)
    monkeypatch.setitem(sys.modules, "memeff", memeff)
    monkeypatch.setitem(sys.modules, "siglip_kernel", SimpleNamespace(fused_siglip_loss=fused_siglip_loss))
    monkeypatch.setitem(sys.modules, "inf_cl", SimpleNamespace(cal_flash_loss=cal_flash_loss))
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", SimpleNamespace(linear_cross_entropy=linear_cross_entropy))
    batch = loss_throughput.make_batch(8, 384, torch.device("cpu"), torch.float32, 0.05)
    checked = ("inf-cl", "cut-cross-entropy", "memeff", "memeff-clip", "siglip-kernel")
    for rival in rivals.RIVALS:
        if rival.name in checked:
            loss_throughput.check(rival, rival.make(batch), batch)  # raises where it is wrong
    odd = loss_throughput.make_batch(8, 24, torch.device("cpu"), torch.float32, 0.05)
    with pytest.raises(rivals.Missing, match="multiples of 64"):
        rivals._inf_cl(odd)


def test_another_loss_says_so_and_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is checked against itself in float64, and not against InfoNCE."""
    sigmoid = rivals.Rival("other", rivals._sigmoid_loss, other_loss="sigmoid loss", exact=rivals._sigmoid_loss)
    taken_for_it = rivals.Rival("alleged", rivals._eager, other_loss="sigmoid loss", exact=rivals._sigmoid_loss)
    monkeypatch.setattr(loss_throughput, "RIVALS", [sigmoid, taken_for_it])
    rows = loss_throughput.main([*SMALL, "--backends", "torch", "--rivals", "other", "alleged"])
    of_name = {(row["batch"], row["name"]): row for row in rows}
    for n in (8, 33):
        row = of_name[n, "other: sigmoid loss"]
        assert row["median"] > 0 and row["error"] < 1e-4 and row["ratio"] is None
        assert of_name[n, "alleged: sigmoid loss"]["skipped"].startswith("wrong: relative error")
    assert all(row["ratio"] for row in rows if "median" in row and "sigmoid" not in row["name"])


def test_a_step_that_would_take_too_long_is_left_out() -> None:
    rows = loss_throughput.main([*SMALL, "--backends", "torch", "--rivals", "none", "--longest-step", "1e-9"])
    skipped = {(row["batch"], row["name"]) for row in rows if "skipped" in row}
    assert skipped == {(33, "hicl_fast torch"), (33, "hicl_fast torch symmetric")}
    assert all("would take about" in row["skipped"] for row in rows if "skipped" in row)


def test_the_limit_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = loss_throughput.make_batch(33, 24, torch.device("cpu"), torch.float32, 0.05)
    made: list[Tensor] = []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x: made.append(empty_like(x)) or made[-1])  # type: ignore[func-returns-value]
    for memory in (1 << 30, 33 * 4 * 10):
        monkeypatch.setattr(loss_throughput, "LIMIT_BYTES", memory)
        loss_throughput.limit_step(batch, 4)()
    for whole, in_chunks in zip(made[:2], made[2:], strict=True):
        torch.testing.assert_close(in_chunks, whole, rtol=1e-5, atol=1e-3)


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
