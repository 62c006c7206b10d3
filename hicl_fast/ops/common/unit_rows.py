"""Rows scaled to length 1, and the way back for gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from hicl_fast.ops.common.autograd import holds_values
from hicl_fast.ops.common.constants import NORM_FLOOR


class Squares(NamedTuple):
    """Lengths whose squares, and sums of them, stay within a type's range, and what brings others there."""

    least: float  # far below NORM_FLOOR
    most: float
    grow: float  # for rows that are shorter
    # For rows that are longer: above NORM_FLOOR still, and so are their products with others in the range.
    shrink: float


def shrink_of(dtype: torch.dtype) -> float:
    """The power of two by which rows are multiplied whose squared length overflows in ``dtype``."""
    return 2.0 ** -(math.frexp(torch.finfo(dtype).max)[1] // 2 + 16)


def _squares(dtype: torch.dtype) -> Squares:
    exponent = math.frexp(torch.finfo(dtype).max)[1]
    least, most, grow = 2.0 ** -(3 * exponent // 8), 2.0 ** (exponent // 2 - 1), 2.0 ** (3 * exponent // 4)
    return Squares(least, most, grow, shrink_of(dtype))


SQUARES = {dtype: _squares(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


@dataclass(frozen=True)
class UnitRows:
    """``x̂ = x / max(‖x‖, 1e-12)``; a zero row stays zero. Right for rows of any length that the type can hold."""

    rows: Tensor  # (N, D)
    factor: Tensor  # (N,) 1 / max(‖x‖, 1e-12), 0 for a zero row

    @staticmethod
    def of(x: Tensor, dtype: torch.dtype) -> UnitRows:
        rows = x.to(dtype).contiguous()
        norm = torch.linalg.vector_norm(rows, dim=1)
        power = _into_range(norm) if x.dtype != torch.float16 else None  # all of float16 is within float32's squares
        if power is None:
            factor = _inverse(norm, NORM_FLOOR)
            return UnitRows(rows * factor[:, None], factor)
        rows = rows * power[:, None]
        factor = _inverse(torch.linalg.vector_norm(rows, dim=1), NORM_FLOOR * power)
        return UnitRows(rows.mul_(factor[:, None]), factor * power)

    @cached_property
    def is_tiny(self) -> Tensor:
        """(N,) rows below the floor: their length is held constant."""
        return self.factor >= 1 / NORM_FLOOR

    def gradient(self, unit_grad: Tensor, rows: slice = slice(None)) -> Tensor:
        """``(I − x̂ x̂ᵀ) g / ‖x‖`` of some rows, in place of ``g`` (R, D), the gradient with respect to the unit rows."""
        unit = self.rows[rows]
        along = row_dot(unit_grad, unit).masked_fill_(self.is_tiny[rows], 0.0)
        return unit_grad.addcmul_(unit, along[:, None], value=-1).mul_(self.factor[rows][:, None])


def shortened(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The rows of x (..., D), those multiplied by ``shrink_of`` whose squares would overflow, and (...,) by what.

    ``None`` where that is 1 for all, as far as the host knows without waiting.
    """
    norm = torch.linalg.vector_norm(x.detach(), dim=-1)
    limits = SQUARES[x.dtype]
    is_long = ~(norm < limits.most)
    if x.is_cpu and holds_values(x) and not is_long.any():
        return x, None
    shrink = torch.where(is_long, norm.new_full((), limits.shrink), norm.new_ones(()))
    return x * shrink[..., None], shrink


def _into_range(norm: Tensor) -> Tensor | None:
    """(N,) powers of two that bring rows of these lengths into the squares' range. A device isn't waited for."""
    limits = SQUARES[norm.dtype]
    is_long, is_short = ~(norm < limits.most), norm < limits.least
    if norm.is_cpu and holds_values(norm) and not (is_long | is_short).any():
        return None
    one = norm.new_ones(())
    return torch.where(is_long, one * limits.shrink, torch.where(is_short, one * limits.grow, one))


def _inverse(norm: Tensor, floor: float | Tensor) -> Tensor:
    return torch.where(norm == 0, 0.0, norm.clamp_min(floor).reciprocal())


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    """(N, D), (N, D) -> (N,)"""
    return torch.linalg.vecdot(x, y)
