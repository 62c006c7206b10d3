"""Spearman's ρ, the scores of a task and what a missing task looks like."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hicl_fast.evaluation import TASKS, Task, average, evaluate, score_task, spearman, table


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=40))
def test_spearman_with_ties_equals_scipy(pairs: list[tuple[int, int]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    if x.unique().numel() == 1 or y.unique().numel() == 1:
        assert math.isnan(spearman(x, y))
    else:
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_spearman_of_nan_is_nan() -> None:
    assert math.isnan(spearman(torch.tensor([1.0, math.nan, 3.0]), torch.tensor([1.0, 2.0, 3.0])))


def angle(text: str) -> Tensor:
    return torch.tensor([math.cos(float(text)), math.sin(float(text))])


def encode(texts: list[str]) -> Tensor:
    """Texts that are numbers become unit vectors at that angle."""
    return torch.stack([angle(text) for text in texts])


def test_score_is_a_rank_correlation_of_cosines() -> None:
    gold = [5.0, 4.0, 2.0, 1.0]
    in_order = Task("t", ["0"] * 4, ["0.1", "0.2", "0.3", "0.4"], gold)
    one_swap = Task("t", ["0"] * 4, ["0.2", "0.1", "0.3", "0.4"], gold)
    assert score_task(encode, in_order) == pytest.approx(100.0)
    assert score_task(encode, one_swap) == pytest.approx(80.0)


def test_missing_tasks_are_missing_and_never_zero(tmp_path: Path) -> None:
    folder = tmp_path / "STS" / "STS12-en-test"
    folder.mkdir(parents=True)
    (folder / "STS.input.x.txt").write_text("0\t0.1\n0\t0.5\n0\t0.9\n")
    (folder / "STS.gs.x.txt").write_text("5\n3\n1\n")
    scores = evaluate(encode, tmp_path, progress=False)
    assert list(scores) == list(TASKS)
    assert scores["STS12"] == pytest.approx(100.0)
    assert all(scores[name] is None for name in TASKS[1:])
    assert average(scores) is None
    assert table(scores).splitlines()[-1] == "| 100.00 |" + " missing |" * 7  # six tasks and their average


def test_average_is_of_the_seven_tasks() -> None:
    scores: dict[str, float | None] = {name: float(index) for index, name in enumerate(TASKS)}
    assert average({**scores, "STS-B dev": 1000.0}) == pytest.approx(3.0)
