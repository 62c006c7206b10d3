"""Hard negatives through csrc/cpu/hard_negatives.cpp, which brings queries and keys to the type of the sums itself."""

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
    target, query_group, key_group = (None if x is None else x.contiguous() for x in (target, query_group, key_group))
    return torch.ops.hicl_fast_cpp.hard_negatives(query, key, k, target, query_group, key_group, exclude_target)
