"""HNCSE's positive mixing: plain PyTorch on any device, vectorised over rows, with no wait for the device.

The search over weights
-----------------------
A candidate (w1, w2) mixes every row that lies within the threshold. The rank of row i's positive is its place among its
own p' and the row's *original* negatives, rank_i = 1 + #{j : s_ij ≥ cos(q_i, p'_i)}; the other rows' mixtures don't
enter. The row's hardest negative alone decides which candidates have the lowest mean rank: a row within the threshold
has d1 > d2, so weights (1, 0) have rank 1 in every row; hence the lowest mean rank is 1, and a candidate reaches it
where cos(q_i, p'_i) > d2_i, the largest s_ij, in every row. Should rounding leave no such candidate, those with the
fewest rows below their hardest negative are taken. Among them the largest mean margin, cos(q_i, p'_i) − d2_i, wins.

cos(q, p') = (w1 ‖p‖ d1 + w2 ‖n‖ d2) / ‖w1 p + w2 n‖, so a few numbers a row are enough for all the candidates.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from hicl_fast.ops.common.autograd import holds_values
from hicl_fast.ops.common.constants import GRID_STEPS, NORM_FLOOR, SMALLEST_SUM
from hicl_fast.ops.common.numbers import sum_type
from hicl_fast.ops.common.unit_rows import UnitRows, row_dot

Weights = tuple[float, float] | Literal["search"]


def apply(query: Tensor, positive: Tensor, negative: Tensor, threshold: float, weights: Weights) -> Tensor:
    """(N, D) each -> (N, D) in the positive's type; gradients reach positive and negative."""
    dtype = sum_type(query, positive, negative)
    with torch.no_grad():
        w1, w2 = _row_weights(query.to(dtype), positive.to(dtype), negative.to(dtype), threshold, weights)
    return (w1[:, None] * positive.to(dtype) + w2[:, None] * negative.to(dtype)).to(positive.dtype)


def _row_weights(q: Tensor, p: Tensor, n: Tensor, threshold: float, weights: Weights) -> tuple[Tensor, Tensor]:
    """Each row's w1 and w2, (N,) each."""
    unit_q, unit_p, unit_n = (UnitRows.of(x, x.dtype) for x in (q, p, n))
    d1, d2 = row_dot(unit_q.rows, unit_p.rows), row_dot(unit_q.rows, unit_n.rows)

    # Where d1 ≤ 0 a ratio to it says nothing.
    is_narrow = (d1 > 0) & (d1 > d2) & ((d1 - d2) / d1 <= threshold)
    total = d1 + d2
    is_behind = (d1 > 0) & (d1 <= d2) & (total > SMALLEST_SUM)

    one, zero = torch.ones_like(d1), torch.zeros_like(d1)
    w1 = torch.where(is_behind, d1 / total, one)
    w2 = torch.where(is_behind, d2 / total, zero)
    if weights == "search":
        narrow_w1, narrow_w2 = _search(d1, d2, unit_p, unit_n, is_narrow)
    else:
        narrow_w1, narrow_w2 = weights[0] * one, weights[1] * one
    return torch.where(is_narrow, narrow_w1, w1), torch.where(is_narrow, narrow_w2, w2)


def _search(d1: Tensor, d2: Tensor, p: UnitRows, n: UnitRows, is_narrow: Tensor) -> tuple[Tensor, Tensor]:
    """The best w1 and w2 for the rows that are narrow; (N,) each -> (1,) each."""
    # A tensor that is made inside a transform is of no use outside.
    candidates = (_kept_candidates if holds_values(d1) else _candidates)(d1.device, d1.dtype)
    w1, w2 = candidates[:, :, None]  # (C, 1) each
    # As multiples of the longer of w1 p and w2 n, whose squares may leave the type's range. A zero row counts as the floor.
    p_factor, n_factor = (torch.where(x.factor == 0, 1 / NORM_FLOOR, x.factor) for x in (p, n))  # 1 / ‖·‖
    longer = torch.maximum(w1 * n_factor, w2 * p_factor)  # (C, N) of w1 ‖p‖ and w2 ‖n‖, times both factors
    w1, w2 = w1 * n_factor / longer, w2 * p_factor / longer
    pp, nn, pn = row_dot(p.rows, p.rows), row_dot(n.rows, n.rows), row_dot(p.rows, n.rows)
    squared = w1.square() * pp + w2.square() * nn + 2 * w1 * w2 * pn  # (C, N)
    floor = NORM_FLOOR * p_factor * n_factor / longer
    margin = (w1 * d1 + w2 * d2) / torch.maximum(squared.clamp_min(0.0).sqrt(), floor) - d2
    num_behind = (is_narrow & (margin <= 0)).sum(dim=1)  # (C,) Σ rank − number of rows
    total_margin = torch.where(is_narrow, margin, 0.0).sum(dim=1)
    best = torch.where(num_behind == num_behind.min(), total_margin, -torch.inf).argmax(keepdim=True)
    chosen = candidates.index_select(1, best)  # indexing with [] would wait for the device
    return chosen[0], chosen[1]


def _directions() -> list[tuple[float, float]]:
    """The directions in the grid over [0, 2]², each once: multiples of the same weights have the same cosines.

    The multiple kept is the one whose larger weight is nearest to 1.
    """
    nearest: dict[tuple[int, int], tuple[int, int]] = {}
    steps = [(a, b) for a in range(GRID_STEPS + 1) for b in range(GRID_STEPS + 1) if a or b]
    for a, b in sorted(steps, key=lambda step: (abs(max(step) - GRID_STEPS // 2), step)):
        divisor = math.gcd(a, b)
        nearest.setdefault((a // divisor, b // divisor), (a, b))
    return [(a * 2 / GRID_STEPS, b * 2 / GRID_STEPS) for a, b in nearest.values()]


CANDIDATES = _directions()  # (w1, w2)


def _candidates(device: torch.device, dtype: torch.dtype) -> Tensor:  # (2, C)
    return torch.tensor(CANDIDATES, dtype=dtype, device=device).T.contiguous()


@functools.lru_cache(maxsize=8)
def _kept_candidates(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Kept, since a device would be waited for each time they are copied to it; the same for every later caller,
    whatever mode the first one is in."""
    with _disable_current_modes(), torch.inference_mode(False):
        return _candidates(device, dtype)
