"""Numbers by row: the positive's similarity with its margin, and what a row's logits weigh in what is differentiated."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hicl_fast.ops.common.constants import ANGLE_CLAMP
from hicl_fast.ops.common.unit_rows import UnitRows, row_dot
from hicl_fast.ops.info_nce.problem import Problem


def with_margin(positive: Tensor, margin: float) -> tuple[Tensor, Tensor | float]:  # (N,) -> (N,), (N,)
    """``cos(θ + u)`` of a positive's similarity s = cos θ, and its derivative ``sin(θ + u) / sin θ``, both expanded in s."""
    if margin == 0.0:
        return positive, 1.0
    limit = 1 - ANGLE_CLAMP
    s = positive.clamp(-limit, limit)
    sine = ((1 - s) * (1 + s)).sqrt()
    derivative = math.cos(margin) + s / sine * math.sin(margin)
    return s * math.cos(margin) - sine * math.sin(margin), torch.where(positive.abs() <= limit, derivative, 0.0)


def limits(problem: Problem, positive: Tensor, rows: slice = slice(None)) -> Tensor | None:  # (R,) -> (R,)
    """What the columns of each of some rows may be similar at most, by the similarity of its positive; ``None``: anything."""
    if not problem.has_limit:
        return None
    found = torch.full_like(positive, torch.inf) if problem.limit is None else problem.limit[rows].to(positive.dtype)
    found = torch.minimum(found, positive + problem.false_negative_margin)
    if problem.false_negative_ratio == math.inf:
        return found
    return torch.where(positive > 0, torch.minimum(found, positive * problem.false_negative_ratio), found)


@torch.no_grad()
def limits_of(problem: Problem) -> Tensor | None:  # (N,)
    """:func:`limits`, for whoever hasn't the positives' similarities at hand."""
    if min(problem.false_negative_margin, problem.false_negative_ratio) == math.inf:
        return problem.limit
    query, key, target = problem.query, problem.key, problem.target
    positives = key[: len(query)] if target is None else key[target]
    similarity = row_dot(UnitRows.of(query, problem.dtype).rows, UnitRows.of(positives, problem.dtype).rows)
    return limits(problem, similarity)


class RowWeights(NamedTuple):
    """The derivatives of what is differentiated by what a row's logits come to, (N,) each.

    With L = log Σ e^ℓ over a row's columns but its positive: a column gets ``negative`` · e^(ℓ − L), whatever they are of.
    """

    negative: Tensor  # by L; 0 where a row has no negative
    positive: Tensor  # by the positive's logit
    column: Tensor | None = None  # by the log-sum-exp down column i, in a symmetric loss
    shift: Tensor | None = (
        None  # by the positive's logit minus the mean logit of all positives, where there are several
    )

    def contiguous(self) -> RowWeights:
        """Each in memory of its own: what autograd hands on may be one number, expanded."""
        column, shift = (None if x is None else x.contiguous() for x in (self.column, self.shift))
        return RowWeights(self.negative.contiguous(), self.positive.contiguous(), column, shift)

    @classmethod
    def of_loss(
        cls,
        loss_grad: Tensor,  # (N,)
        negative_lse: Tensor,  # (N,)
        column_lse: Tensor,  # (N,), or (0,)
        positive_logit: Tensor,  # (N,)
        *,
        has_several_positives: bool,
    ) -> RowWeights:
        """Of ``log(1 + e^(L − positive))``, plus the shift or the mean with the same down the columns."""
        is_symmetric = column_lse.numel() > 0
        negative = _share(negative_lse, positive_logit) * loss_grad
        if not is_symmetric:
            return cls(negative, -negative, shift=loss_grad if has_several_positives else None)
        negative, column = negative / 2, _share(column_lse, positive_logit) * (loss_grad / 2)
        return cls(negative, -(negative + column), column)


def _share(lse: Tensor, positive_logit: Tensor) -> Tensor:
    """Of the columns but the positive in a whole softmax."""
    return torch.exp(lse - torch.logaddexp(lse, positive_logit))
