"""What every objective of the gradient paradigm is made of, as a backend offers it.

Two streaming passes sweep over blocks of the similarities ``s_ij = x_i·y_j`` of unit rows and leave the diagonal out:
:meth:`Engine.statistics` keeps numbers of each row (one product), :meth:`Engine.combine` sums rows by normalised weights
(two products). Two passes over N×D numbers stand before and after them: :meth:`Engine.views` normalises the inputs,
:meth:`Engine.gradient` puts an input's gradient together and takes it back through the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hicl_fast.ops.common.unit_rows import UnitRows

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


class Views(NamedTuple):
    """The two views, normalised."""

    u: UnitRows  # (N, D)
    v: UnitRows  # (N, D)
    positive: Tensor  # (N,) u_i·v_i


class Term(NamedTuple):
    """``factor_i · rows[source_i]``, a part of the gradient with respect to unit row ``target_i``; None: to or of i."""

    rows: Tensor  # (N, D)
    factor: Tensor  # (N,)
    source: Tensor | None = None  # (N,) int64
    target: Tensor | None = None  # (N,) int64; a row may be the target of many, or of none


class Engine(Protocol):
    """What a backend's module for the paradigm defines. All matrices are (N, D) in the type of the sums.

    ``views`` and ``gradient`` are plain PyTorch in ``hicl_fast.ops.paradigm.torch``, for any backend to take over.
    """

    def views(self, u: Tensor, v: Tensor, dtype: torch.dtype) -> Views: ...

    def gradient(self, unit: UnitRows, terms: Sequence[Term]) -> Tensor:
        """(N, D) with respect to the rows that ``unit`` was made of: ``(I − x̂ x̂ᵀ) g / ‖x‖``, g the terms' sum."""

    def statistics(self, x: Tensor, y: Tensor, temperature: float | None, columns: bool) -> Statistics: ...

    def combine(self, x: Tensor, y: Tensor, t: Tensor, weight: str, parameter: float) -> Combination:
        """``weight`` and ``parameter``: ``"softmax"`` with τ, or ``"power"`` with p: max(s, 1e-4)^p."""

    def combine_by(self, x: Tensor, y: Tensor, t: Tensor, weights: RowWeights) -> tuple[Tensor, Tensor]:
        """(N, D) sums by weights as they come, whose diagonal is ignored, and (N,) the weights' sums."""
