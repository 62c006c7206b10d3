"""Ragged weighted pooling through kernels/segment_pool.py."""

from __future__ import annotations

import torch
from torch import Tensor

from hicl_fast.kernels import segment_pool as kernels
from hicl_fast.ops.common.triton import on_device


def forward(segments: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:  # (S, D), (B + 1,), (S,) -> (B, D)
    with on_device(segments):
        return kernels.pool_segments(segments.detach().contiguous(), offsets.contiguous(), _ready(weights))


def backward(
    segments: Tensor, offsets: Tensor, weights: Tensor | None, pooled_grad: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    h, offsets, w = segments.detach().contiguous(), offsets.contiguous(), _ready(weights)
    grad = pooled_grad.contiguous()
    segments_grad, weights_grad = segments.new_empty(0), segments.new_empty(0)
    with on_device(segments):
        if wanted[0]:
            segments_grad = kernels.segments_gradient(h, offsets, w, grad)
        if wanted[1] and w is not None:
            weights_grad = kernels.weights_gradient(h, offsets, w, grad)
    return segments_grad, weights_grad


def _ready(weights: Tensor | None) -> Tensor | None:
    if weights is None:
        return None
    weights = weights.detach().contiguous()
    return weights.to(torch.uint8) if weights.dtype == torch.bool else weights
