"""Hard-negative mixing of small batches through csrc/cuda/mixed_negatives.cpp: one launch forward, two backward."""

from __future__ import annotations

import torch
from torch import Tensor

# Of what rows add to their negatives' gradients: more rows than that holds come one after another.
ADDITION_BYTES = 64 << 20


def forward(
    query: Tensor,  # (N, D)
    bank: Tensor,  # (B, D)
    index: Tensor,  # (N, k)
    pairs: Tensor,  # (N, m, 2)
    alpha: float,
) -> tuple[Tensor, Tensor]:  # (N, m), (N, m): cosines, 1 / ‖g‖
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.hicl_fast_cuda.mixed_negatives(*_ready(query, bank, index, pairs), alpha)


def backward(
    query: Tensor,
    bank: Tensor,
    index: Tensor,
    pairs: Tensor,
    alpha: float,
    cosine: Tensor,  # (N, m)
    inverse_norm: Tensor,  # (N, m)
    cosine_grad: Tensor,  # (N, m)
    wanted: list[bool],  # of query, bank
) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        query_grad, bank_grad = torch.ops.hicl_fast_cuda.mixed_negatives_backward(
            *_ready(query, bank, index, pairs),
            alpha,
            cosine.contiguous(),
            inverse_norm.contiguous(),
            cosine_grad.to(torch.float32).contiguous(),
            *wanted,
            ADDITION_BYTES,
        )
    return query_grad.to(query.dtype), bank_grad.to(bank.dtype)


def _ready(query: Tensor, bank: Tensor, index: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contiguous, vectors in one type. They are multiplied as they are; sums are float32."""
    dtype = torch.promote_types(query.dtype, bank.dtype)
    q, b = (x.detach().to(dtype).contiguous() for x in (query, bank))
    return q, b, index.contiguous(), pairs.contiguous()
