"""Ragged weighted pooling, as the equation stands."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_pool(
    segments: Tensor,  # (S, D)
    offsets: Tensor,  # (B + 1,) int64
    weights: Tensor | None = None,  # (S,)
) -> Tensor:  # (B, D)
    """``H_b = Σ_j w_bj h_bj / Σ_j w_bj`` over the rows ``offsets[b]:offsets[b + 1]``; ones where no weights are given.

    A sequence whose weights sum to zero gets a zero row and gradient zero.
    """
    dtype = torch.promote_types(segments.dtype, torch.float32)
    if weights is None:
        weights = torch.ones(segments.shape[0], device=segments.device)
    dtype = torch.promote_types(dtype, weights.dtype) if weights.dtype.is_floating_point else dtype
    h, w = segments.to(dtype), weights.to(dtype)
    pooled = []
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        total = w[begin:end].sum()
        share = w[begin:end] / torch.where(total == 0, torch.ones_like(total), total)
        mean = (share[:, None] * h[begin:end]).sum(dim=0)
        pooled.append(torch.where(total == 0, torch.zeros_like(mean), mean))
    return torch.stack(pooled).to(segments.dtype)
