"""Hard negatives of small batches through csrc/cuda/hard_negatives.cpp: two launches."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    query: Tensor,  # (N, D)
    key: Tensor,  # (M, D)
    k: int,
    target: Tensor | None,  # (N,) int64
    query_group: Tensor | None,  # (N,) int64
    key_group: Tensor | None,  # (M,) int64
    exclude_target: bool,
) -> tuple[Tensor, Tensor]:  # (N, k), (N, k) int64
    dtype = torch.promote_types(query.dtype, key.dtype)
    indices = (None if x is None else x.contiguous() for x in (target, query_group, key_group))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.hicl_fast_cuda.hard_negatives(
            query.detach().to(dtype).contiguous(), key.detach().to(dtype).contiguous(), k, *indices, exclude_target
        )
