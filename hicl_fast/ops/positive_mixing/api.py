"""Positives mixed with hard negatives (HNCSE)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from hicl_fast import _checks as check
from hicl_fast.ops.positive_mixing import operator


def positive_mixing(
    query: Tensor,  # (N, D)
    positive: Tensor,  # (N, D)
    negative: Tensor,  # (N, D)
    *,
    threshold: float = 0.1,
    weights: tuple[float, float] | Literal["search"] = (1.0, 0.1),
) -> Tensor:
    r"""Each row's positive mixed with its hardest negative: HNCSE's positive mixing (arXiv 2411.12156).

    With d1 = cos(query, positive) and d2 = cos(query, negative), row by row,

    .. math:: p' = \begin{cases}
              w_1 p + w_2 n & d_1 > d_2 \text{ and } (d_1 - d_2) / d_1 \le \mathrm{threshold} \\
              \frac{d_1}{d_1 + d_2} p + \frac{d_2}{d_1 + d_2} n & d_1 \le d_2 \text{ and } d_1 + d_2 > 10^{-6} \\
              p & \text{otherwise, and wherever } d_1 \le 0 \end{cases}

    on the vectors as they come, unnormalised. The weights are constants: gradients flow to p and n through the last
    operation alone, and none to query.

    ``weights="search"`` takes the one pair (w1, w2) of the grid over [0, 2]², step 0.1, with which the rows of the
    first case have the lowest mean rank of their positive, and among those the largest mean margin
    cos(q, p') − d2. The rank is p's place among p' and the row's *original* negatives (other rows' mixtures don't
    enter): 1 + the number of negatives at least as similar as p'. Since (1, 0) gives rank 1 in every such row, the
    lowest mean rank is 1, and reached where p' is more similar than the hardest negative in every row: that negative
    is all the search needs. Weights that are multiples of each other give the same cosines; the multiple whose larger
    weight is nearest to 1 is taken.

    Args:
        query: (N, D) float64, float32, bfloat16 or float16.
        positive: (N, D) row i's positive.
        negative: (N, D) row i's hardest negative.
        threshold: of (d1 − d2) / d1, at least 0; no unit.
        weights: (w1, w2) or ``"search"``.

    Returns:
        (N, D) p', in the type of ``positive``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check.floating_matrix("query", query, "(N, D)")
    for name, value in (("positive", positive), ("negative", negative)):
        check.floating_matrix(name, value, "(N, D)", like=query)
        if value.shape != query.shape:
            raise ValueError(f"{name}: expected shape {tuple(query.shape)}, as query has, got {check.describe(value)}")
    check_options(threshold, weights)
    return operator.apply(query, positive, negative, float(threshold), weights)


def check_options(threshold: float, weights: tuple[float, float] | Literal["search"]) -> None:
    check.non_negative_number("threshold", threshold)
    if isinstance(weights, str) and weights == "search":
        return
    is_pair = isinstance(weights, (tuple, list)) and len(weights) == 2
    if not (is_pair and all(check.is_number(weight) and check.is_finite(weight) for weight in weights)):
        raise ValueError(f"weights: expected a pair of finite numbers or 'search', got {check.describe(weights)}")
