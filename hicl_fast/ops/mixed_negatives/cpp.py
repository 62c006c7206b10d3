"""Hard-negative mixing through csrc/cpu/mixed_negatives.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from hicl_fast.ops.common.numbers import sum_type


def forward(
    query: Tensor,  # (N, D)
    bank: Tensor,  # (B, D)
    index: Tensor,  # (N, k)
    pairs: Tensor,  # (N, m, 2)
    alpha: float,
) -> tuple[Tensor, Tensor]:  # (N, m), (N, m): cosines, 1 / ‖g‖
    return torch.ops.hicl_fast_cpp.mixed_negatives(*_ready(query, bank, index, pairs), alpha)


def backward(
    query: Tensor,
    bank: Tensor,
    index: Tensor,
    pairs: Tensor,
    alpha: float,
    cosine: Tensor,
    inverse_norm: Tensor,
    cosine_grad: Tensor,  # (N, m)
    wanted: list[bool],  # of query, bank
) -> tuple[Tensor, Tensor]:
    upstream = cosine_grad.to(cosine.dtype).contiguous()
    query_grad, bank_grad = torch.ops.hicl_fast_cpp.mixed_negatives_backward(
        *_ready(query, bank, index, pairs), alpha, cosine.contiguous(), inverse_norm.contiguous(), upstream, *wanted
    )
    return query_grad.to(query.dtype), bank_grad.to(bank.dtype)


def _ready(query: Tensor, bank: Tensor, index: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contiguous, in the type the sums are kept in."""
    dtype = sum_type(query, bank)
    q, b = (x.detach().to(dtype).contiguous() for x in (query, bank))
    return q, b, index.contiguous(), pairs.contiguous()
