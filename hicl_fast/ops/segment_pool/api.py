"""Weighted means over ragged sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from hicl_fast import _checks as check
from hicl_fast.ops.segment_pool import operator as op


def segment_pool(
    segments: Tensor,  # (S, D)
    offsets: Tensor,  # (B + 1,) int64
    weights: Tensor | None = None,  # (S,)
    *,
    backend: str = "auto",
) -> Tensor:
    r"""Weighted mean of the segments of each sequence: HiCL's aggregation (arXiv 2310.09720).

    .. math:: H_b = \sum_j w_{bj} h_{bj} \Big/ \sum_j w_{bj}

    Args:
        segments: (S, D) float64, float32, bfloat16 or float16; sequence b owns rows ``offsets[b]:offsets[b + 1]``.
        offsets: (B + 1,) int64 on the segments' device: starts at 0, rises, ends at S. Values are checked where they
            are in host memory; a GPU is not waited for.
        weights: (S,) for example the number of tokens of each segment, integer or floating point; gets a gradient if
            it asks for one. Finite and not negative, which is checked in host memory. Default: all ones. A sequence
            whose weights sum to zero gets a zero row.
        backend: ``"auto"``, ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Returns:
        (B, D) in the type of ``segments``; sums are kept in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        hicl_fast.BackendError: the backend asked for is not there or does not do this call.
    """
    check.floating_matrix("segments", segments, "(S, D)")
    if not isinstance(offsets, Tensor) or offsets.dtype != torch.int64:
        raise TypeError(f"offsets: expected an int64 tensor of shape (B + 1,), got {check.describe(offsets)}")
    if offsets.dim() != 1 or offsets.shape[0] < 2:
        raise ValueError(f"offsets: expected shape (B + 1,) with B ≥ 1, got {check.describe(offsets)}")
    check.same_device("offsets", offsets, segments)
    if weights is not None:
        if not isinstance(weights, Tensor):
            raise TypeError(
                f"weights: expected a tensor of shape ({segments.shape[0]},), got {check.describe(weights)}"
            )
        if weights.shape != segments.shape[:1]:
            raise ValueError(
                f"weights: expected shape ({segments.shape[0]},), one for each segment, got {check.describe(weights)}"
            )
        if weights.dtype.is_complex:
            raise TypeError(f"weights: expected integers or floating point, got {check.describe(weights)}")
        check.same_device("weights", weights, segments)
    return op.apply(segments, offsets, weights, backend)
