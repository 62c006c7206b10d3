"""Hard negatives through kernels/hard_negatives.py. Memory beside the inputs grows with N · k alone."""

from __future__ import annotations

import torch
from torch import Tensor

from hicl_fast.kernels.hard_negatives import NO_VALUE, hardest
from hicl_fast.kernels.rows import normalise
from hicl_fast.ops.common.constants import NORM_FLOOR, Groups, Special
from hicl_fast.ops.common.triton import multiplied_as, on_device
from hicl_fast.ops.info_nce.problem import KindOfColumn

_LOW = 0xFFFFFFFF
_LARGEST = 0x7FFFFFFF


def forward(
    query: Tensor,  # (N, D)
    key: Tensor,  # (M, D)
    k: int,
    target: Tensor | None,  # (N,) int64
    query_group: Tensor | None,  # (N,) int64
    key_group: Tensor | None,  # (M,) int64
    exclude_target: bool,
) -> tuple[Tensor, Tensor]:  # (N, k), (N, k) int64
    dtype, precision = multiplied_as("default", query, key)
    if exclude_target and target is None:
        target = torch.arange(query.shape[0], device=query.device)
    with on_device(query):
        queries, keys = (normalise(x.to(dtype).contiguous(), NORM_FLOOR) for x in (query, key))
        columns = KindOfColumn(
            "key",
            key,
            wants_gradient=False,
            special=Special.POSITIVE if exclude_target else Special.NOTHING,
            special_column=target,
            groups=Groups.ORDINARY if key_group is None else Groups.EXCLUDED,
            query_group=None if query_group is None else query_group[:, None],
            group=None if key_group is None else key_group[:, None],
        ).contiguous()
        return unpacked(hardest(queries, keys, columns, k, precision))


def unpacked(keys: Tensor) -> tuple[Tensor, Tensor]:  # (N, k) int64 -> (N, k) float32, (N, k) int64
    """Similarities and columns of keys; −∞ and −1 where there is none."""
    rising = (keys >> 32).to(torch.int32)
    similarity = torch.where(rising >= 0, rising, rising ^ _LARGEST).view(torch.float32)
    index = _LARGEST - (keys & _LOW)
    missing = rising == NO_VALUE
    return similarity.masked_fill(missing, -torch.inf), index.masked_fill(missing, -1)
