"""HNCSE's positive mixing (arXiv 2411.12156), as the equation stands."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hicl_fast.ops.common.constants import GRID_STEPS, SMALLEST_SUM
from hicl_fast.ops.info_nce.reference import normalise


def positive_mixing(
    query: Tensor,  # (N, D)
    positive: Tensor,  # (N, D)
    negative: Tensor,  # (N, D)
    *,
    threshold: float = 0.1,
    weights: tuple[float, float] | Literal["search"] = (1.0, 0.1),
) -> Tensor:  # (N, D)
    """``p' = w1 p + w2 n`` row by row, by how d1 = cos(q, p) compares with d2 = cos(q, n), n the hardest negative."""
    d1 = (normalise(query) * normalise(positive)).sum(dim=-1).detach()
    d2 = (normalise(query) * normalise(negative)).sum(dim=-1).detach()
    narrow = [bool(0 < a and b < a and (a - b) / a <= threshold) for a, b in zip(d1, d2, strict=True)]
    if weights == "search":
        weights = _search(query[narrow], positive[narrow], negative[narrow])
    mixed = []
    for i, (p, n) in enumerate(zip(positive, negative, strict=True)):
        if narrow[i]:
            mixed.append(weights[0] * p + weights[1] * n)
        elif 0 < d1[i] <= d2[i] and d1[i] + d2[i] > SMALLEST_SUM:
            total = d1[i] + d2[i]
            mixed.append(d1[i] / total * p + d2[i] / total * n)
        else:
            mixed.append(p)
    return torch.stack(mixed)


def _search(query: Tensor, positive: Tensor, negative: Tensor) -> tuple[float, float]:
    """The weights of lowest mean rank, and among those of largest mean margin; see ``hicl_fast.ops.positive_mixing.operator``."""
    q, p, n = query.detach(), positive.detach(), negative.detach()
    hardest = (normalise(q) * normalise(n)).sum(dim=-1)
    best, best_weights = (-float("inf"), -float("inf")), (1.0, 0.0)
    # Multiples of the same weights have the same cosines: the multiple whose larger weight is nearest to 1 comes first.
    steps = [(a, b) for a in range(GRID_STEPS + 1) for b in range(GRID_STEPS + 1) if a or b]
    for a, b in sorted(steps, key=lambda step: (abs(max(step) - GRID_STEPS // 2), step)):
        similarity = (normalise(q) * normalise(a / 10 * p + b / 10 * n)).sum(dim=-1)
        margin = similarity - hardest
        rank = 1.0 + (margin <= 0).double()
        score = (-float(rank.sum()), float(margin.sum()))
        if score[0] > best[0] or (score[0] == best[0] and score[1] > best[1] + 1e-12):
            best, best_weights = score, (a / 10, b / 10)
    return best_weights
