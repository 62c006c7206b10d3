"""Ragged weighted pooling through csrc/cpu/segment_pool.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from hicl_fast.ops.common.numbers import sum_type


def forward(segments: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:  # (S, D), (B + 1,), (S,) -> (B, D)
    h, offsets, w = _ready(segments, offsets, weights)
    return torch.ops.hicl_fast_cpp.segment_pool(h, offsets, w).to(segments.dtype)


def backward(
    segments: Tensor, offsets: Tensor, weights: Tensor | None, pooled_grad: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    h, offsets, w = _ready(segments, offsets, weights)
    want_weights = wanted[1] and weights is not None
    segments_grad, weights_grad = torch.ops.hicl_fast_cpp.segment_pool_backward(
        h, offsets, w, pooled_grad.to(h.dtype).contiguous(), wanted[0], want_weights
    )
    return segments_grad.to(segments.dtype), weights_grad.to(segments.dtype if weights is None else weights.dtype)


def _ready(segments: Tensor, offsets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Contiguous, in the type the sums are kept in."""
    dtype = sum_type(segments, weights)
    w = None if weights is None else weights.detach().to(dtype).contiguous()
    return segments.detach().to(dtype).contiguous(), offsets.contiguous(), w
