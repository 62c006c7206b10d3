"""Ragged weighted pooling in plain PyTorch: one pass over the segments, no loop over sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from hicl_fast.ops.common.numbers import sum_type
from hicl_fast.ops.segment_pool.sequences import sequence_of_segments


def forward(segments: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:  # (S, D), (B + 1,), (S,) -> (B, D)
    dtype = sum_type(segments, weights)
    share, _, sequence = _shares(segments, offsets, weights, dtype)
    pooled = segments.new_zeros(offsets.shape[0] - 1, segments.shape[1], dtype=dtype)
    pooled.index_add_(0, sequence, segments.to(dtype) * share[:, None])
    return pooled.to(segments.dtype)


def backward(
    segments: Tensor, offsets: Tensor, weights: Tensor | None, pooled_grad: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    """``∂/∂h_j = w_j / W_b · g_b`` and ``∂/∂w_j = g_b · (h_j − H_b) / W_b``."""
    dtype = sum_type(segments, weights)
    share, inverse_total, sequence = _shares(segments, offsets, weights, dtype)
    grad = pooled_grad.to(dtype)[sequence]  # (S, D)
    nothing = segments.new_empty(0)
    segments_grad = (share[:, None] * grad).to(segments.dtype) if wanted[0] else nothing
    weights_grad = nothing.clone()
    if weights is not None and wanted[1]:
        h = segments.to(dtype)
        pooled = torch.zeros_like(pooled_grad, dtype=dtype).index_add_(0, sequence, h * share[:, None])
        weights_grad = ((grad * (h - pooled[sequence])).sum(dim=1) * inverse_total).to(weights.dtype)
    return segments_grad, weights_grad


def _shares(
    segments: Tensor, offsets: Tensor, weights: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Each segment's share w / W of its sequence, 1 / W (0 where W = 0), and its sequence's index; (S,) each."""
    num_segments = segments.shape[0]
    sequence = sequence_of_segments(offsets, num_segments)
    w = segments.new_ones(num_segments, dtype=dtype) if weights is None else weights.to(dtype)
    total = torch.zeros(offsets.shape[0] - 1, dtype=dtype, device=w.device).index_add_(0, sequence, w)
    inverse_total = torch.where(total == 0, 0.0, 1.0 / total)[sequence]
    return w * inverse_total, inverse_total, sequence
