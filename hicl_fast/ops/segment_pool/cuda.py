"""Ragged weighted pooling through csrc/cuda/segment_pool.cpp."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(segments: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:  # (S, D), (B + 1,), (S,) -> (B, D)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.hicl_fast_cuda.segment_pool(segments.contiguous(), offsets.contiguous(), _ready(weights))


def backward(
    segments: Tensor, offsets: Tensor, weights: Tensor | None, pooled_grad: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    want_weights = wanted[1] and weights is not None
    with torch._C._AutoDispatchBelowAutograd():
        segments_grad, weights_grad = torch.ops.hicl_fast_cuda.segment_pool_backward(
            segments.contiguous(),
            offsets.contiguous(),
            _ready(weights),
            pooled_grad.to(segments.dtype).contiguous(),
            wanted[0],
            want_weights,
        )
    return segments_grad, weights_grad.to(segments.dtype if weights is None else weights.dtype)


def _ready(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.to(torch.float32).contiguous()
