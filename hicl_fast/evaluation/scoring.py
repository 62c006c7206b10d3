"""Spearman correlation of cosine similarities with gold scores, by SentEval's "all" rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hicl_fast.evaluation.senteval import TASKS, Task, find_root, read_task

Encode = Callable[[list[str]], Tensor]  # n texts -> (n, D)


def evaluate(
    encode: Encode, data_dir: str | Path, tasks: Sequence[str] = TASKS, *, progress: bool = True
) -> dict[str, float | None]:
    """The score of each task, in the order asked for; None where the task's files are missing.

    Args:
        encode: gives (n, D) floating-point embeddings for n texts.
        data_dir: SentEval's data folder, which holds ``downstream/STS`` and ``downstream/SICK``.
        tasks: names out of :data:`hicl_fast.evaluation.TASKS` and ``"STS-B dev"``.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: ``data_dir`` is not such a folder.
        ValueError: a file of a task is malformed; names the file and line.
    """
    from tqdm import tqdm  # not needed by those who only read tasks

    root = find_root(data_dir)
    bar = tqdm(tasks, desc="evaluation", unit="task", leave=False, disable=not progress)
    found = {name: read_task(root, name) for name in tasks}
    return {name: None if (task := found[name]) is None else score_task(encode, task) for name in bar}


def score_task(encode: Encode, task: Task) -> float:
    """Spearman's ρ × 100 between the pairs' cosine similarities and their gold scores."""
    embeddings = encode(task.first + task.second).detach().cpu()
    first, second = embeddings.double().chunk(2)
    return 100.0 * spearman(F.cosine_similarity(first, second), torch.tensor(task.gold, dtype=torch.float64))


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation of x (n,) and y (n,), equal values sharing their mean rank; NaN where either is constant or has NaN."""
    if x.isnan().any() or y.isnan().any():
        return float("nan")
    ranks = torch.stack([_ranks(x), _ranks(y)])
    return float(torch.corrcoef(ranks)[0, 1])


def average(scores: Mapping[str, float | None]) -> float | None:
    """The mean of the seven tasks, or None where one is missing: a mean over fewer would not compare."""
    found = [scores.get(name) for name in TASKS]
    return sum(score for score in found if score is not None) / len(TASKS) if None not in found else None


def table(scores: Mapping[str, float | None]) -> str:
    """The scores, and the average where all seven tasks were asked for, as a Markdown table of one row."""
    cells = dict(scores)
    if set(TASKS) <= set(scores):
        cells["avg"] = average(scores)
    values = ["missing" if value is None else f"{value:.2f}" for value in cells.values()]
    return "\n".join("| " + " | ".join(row) + " |" for row in (list(cells), ["---"] * len(cells), values))


def _ranks(x: Tensor) -> Tensor:
    _, group, size = torch.unique(x, return_inverse=True, return_counts=True)
    mean_rank = size.cumsum(0) - (size.double() - 1) / 2
    return mean_rank[group]
