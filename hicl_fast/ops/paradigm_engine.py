"""The two streaming passes that every objective of the gradient paradigm is made of, as a backend offers them.

Both sweep over blocks of the similarities ``s_ij = x_i·y_j`` of unit rows and leave the diagonal out:
:meth:`Engine.statistics` keeps numbers of each row (one product), :meth:`Engine.combine` sums rows by normalised weights
(two products). What an objective adds is O(N·D).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hicl_fast.ops.problem import NORM_FLOOR

RowWeights = Callable[[Tensor, slice], Tensor]  # similarities (R, N) of some rows -> their weights (R, N)


class Statistics(NamedTuple):
    """Of each row's similarities off the diagonal; the first of several largest counts, NaN is the largest."""

    hardest: Tensor  # (N,) the largest
    nearest: Tensor  # (N,) int64, its column
    lse: Tensor  # (N,) log Σ e^(s/τ); empty where no temperature was given
    column_hardest: Tensor  # (N,) the same down the columns; empty where they weren't asked for
    column_index: Tensor  # (N,) int64


class Combination(NamedTuple):
    """``rows_i = Σ_{j≠i} W_ij t_j`` with ``Σ_j W_ij = 1``."""

    rows: Tensor  # (N, D)
    log_total: Tensor  # (N,) log of the sum that the weights were divided by
    hardest: Tensor  # (N,)
    nearest: Tensor  # (N,) int64


class Engine(Protocol):
    """What a backend's module for the paradigm defines. All matrices are (N, D) in the type of the sums."""

    def statistics(self, x: Tensor, y: Tensor, temperature: float | None, columns: bool) -> Statistics: ...

    def combine(self, x: Tensor, y: Tensor, t: Tensor, weight: str, parameter: float) -> Combination:
        """``weight`` and ``parameter``: ``"softmax"`` with τ, or ``"power"`` with p: max(s, 1e-4)^p."""

    def combine_by(self, x: Tensor, y: Tensor, t: Tensor, weights: RowWeights) -> tuple[Tensor, Tensor]:
        """(N, D) sums by weights as they come, whose diagonal is ignored, and (N,) the weights' sums."""


@dataclass(frozen=True)
class UnitRows:
    """Rows scaled to length 1; a zero row stays zero."""

    rows: Tensor  # (N, D)
    inverse_norm: Tensor  # (N, 1) 0 for a zero row
    has_constant_norm: Tensor  # (N, 1) rows below the floor

    @staticmethod
    def of(x: Tensor, dtype: torch.dtype) -> UnitRows:
        rows = x.detach().to(dtype).contiguous()
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        inverse = torch.where(norm == 0, 0.0, norm.clamp_min(NORM_FLOOR).reciprocal())
        return UnitRows(rows * inverse, inverse, norm < NORM_FLOOR)

    def gradient(self, unit_grad: Tensor) -> Tensor:
        """``(I − x̂ x̂ᵀ) g / ‖x‖``, in place of ``g`` (N, D)."""
        along = row_dot(unit_grad, self.rows)[:, None].masked_fill_(self.has_constant_norm, 0.0)
        return unit_grad.addcmul_(self.rows, along, value=-1).mul_(self.inverse_norm)


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    """(N, D), (N, D) -> (N,) without a product (N, D) in memory."""
    return torch.linalg.vecdot(x, y)
