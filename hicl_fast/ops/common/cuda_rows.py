"""What the large-batch path does row by row, through csrc/cuda/rows.cpp: the functions of kernels/rows.py over other kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from hicl_fast.kernels.rows import Partners, Rows

_operators = torch.ops.hicl_fast_cuda


def normalise(x: Tensor, floor: float, unit: Tensor | None = None) -> Rows:
    """The rows of x (N, D), contiguous, with their inverse norms; writes the unit rows to ``unit`` (N, D) if given."""
    with torch._C._AutoDispatchBelowAutograd():
        inverse = _operators.normalise_rows(x, floor, unit)
    return Rows(x, inverse, x)  # of a row that is too long for its products, the inverse norm is NaN


def scale_rows(rows: Rows, factor: Tensor) -> Tensor:
    """``factor[:, None]`` times the unit rows, in the rows' type, rounded once; (N, D), (N,) float32 -> (N, D)."""
    with torch._C._AutoDispatchBelowAutograd():
        return _operators.scale_rows(rows.x, factor * rows.inverse)


def positive_similarity(query: Rows, key: Rows, target: Tensor) -> Tensor:
    """The cosine of each query with its target, (N,) float32; NaN where the target is no key."""
    with torch._C._AutoDispatchBelowAutograd():
        return _operators.positive_similarity(query.x, query.inverse, key.x, key.inverse, target)


def gradient(
    product: Tensor,  # (N, D) float32
    factor: Tensor,  # (N,) float32 of the product; may be an expanded scalar
    rows: Rows,  # (N, D)
    partners: Partners | None,
    floor: float,
    out: Tensor,  # (N, D) float32; may be the product
) -> None:
    """The gradient with respect to the rows as they came, from that with respect to the unit rows."""
    other = other_inverse = coefficient = partner = begin = None
    if partners is not None:
        other, other_inverse = partners.other.x, partners.other.inverse
        coefficient, partner, begin = partners.coefficient.contiguous(), partners.index, partners.begin
    with torch._C._AutoDispatchBelowAutograd():
        _operators.norm_gradient(
            product, factor, rows.x, rows.inverse, floor, other, other_inverse, coefficient, partner, begin, out
        )
