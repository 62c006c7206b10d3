"""Rows scaled to length 1, and the way back for gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hicl_fast.ops.problem import NORM_FLOOR


@dataclass(frozen=True)
class UnitRows:
    """``x̂ = x / max(‖x‖, 1e-12)``; a zero row stays zero."""

    rows: Tensor  # (N, D)
    norm: Tensor  # (N,) of the rows as they came

    @staticmethod
    def of(x: Tensor, dtype: torch.dtype) -> UnitRows:
        rows = x.to(dtype).contiguous()
        norm = torch.linalg.vector_norm(rows, dim=1)
        return UnitRows(rows * _inverse(norm)[:, None], norm)

    @cached_property
    def inverse_norm(self) -> Tensor:
        """(N,) 0 for a zero row."""
        return _inverse(self.norm)

    @cached_property
    def is_tiny(self) -> Tensor:
        """(N,) rows below the floor: their length is held constant."""
        return self.norm < NORM_FLOOR

    def gradient(self, unit_grad: Tensor, rows: slice = slice(None)) -> Tensor:
        """``(I − x̂ x̂ᵀ) g / ‖x‖`` of some rows, in place of ``g`` (R, D), the gradient with respect to the unit rows."""
        unit = self.rows[rows]
        along = row_dot(unit_grad, unit).masked_fill_(self.is_tiny[rows], 0.0)
        return unit_grad.addcmul_(unit, along[:, None], value=-1).mul_(self.inverse_norm[rows][:, None])


def _inverse(norm: Tensor) -> Tensor:
    return torch.where(norm == 0, 0.0, norm.clamp_min(NORM_FLOOR).reciprocal())


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    """(N, D), (N, D) -> (N,)"""
    return torch.linalg.vecdot(x, y)
