"""Hard negatives through kernels/hard_negatives.py. Memory beside the inputs grows with N · k alone."""

from __future__ import annotations

import torch
from torch import Tensor

from hicl_fast.kernels import launch
from hicl_fast.kernels.hard_negatives import NO_VALUE
from hicl_fast.ops.common.constants import NORM_FLOOR
from hicl_fast.ops.common.device import on_device
from hicl_fast.ops.info_nce.problem import Problem
from hicl_fast.ops.info_nce.triton_operands import operand_type

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
    dtype, precision = operand_type(_products_of(query, key))
    if exclude_target and target is None:
        target = torch.arange(query.shape[0], device=query.device)
    with on_device(query):
        rows, vectors = (launch.normalise(x.to(dtype).contiguous(), NORM_FLOOR) for x in (query, key))
        columns = launch.Columns(
            vectors,
            special=launch.POSITIVE if exclude_target else launch.NOTHING,
            special_column=None if target is None else target.contiguous(),
            own_bias=0.0,
            groups=launch.ORDINARY if key_group is None else launch.EXCLUDED,
            query_group=None if query_group is None else query_group.contiguous(),
            key_group=None if key_group is None else key_group.contiguous(),
        )
        return _unpacked(launch.hardest(rows, columns, k, precision=precision))


def _unpacked(keys: Tensor) -> tuple[Tensor, Tensor]:  # (N, k) int64 -> (N, k) float32, (N, k) int64
    rising = (keys >> 32).to(torch.int32)
    similarity = torch.where(rising >= 0, rising, rising ^ _LARGEST).view(torch.float32)
    index = _LARGEST - (keys & _LOW)
    missing = rising == NO_VALUE
    return similarity.masked_fill(missing, -torch.inf), index.masked_fill(missing, -1)


def _products_of(query: Tensor, key: Tensor) -> Problem:
    """A problem of these operands and nothing else, in the precision that PyTorch's own products have."""
    return Problem(query, key, scale=torch.ones(()))
