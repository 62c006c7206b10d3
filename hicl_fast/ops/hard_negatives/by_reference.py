"""Hard negatives as plain PyTorch, for calls inside ``torch.func`` and forward mode, which no backend knows of.

It is the reference's definition with the reference's cost: the matrix of similarities is built.
"""

from __future__ import annotations

from torch import Tensor

from hicl_fast.ops.hard_negatives import reference


def hard_negatives(
    query: Tensor,  # (N, D)
    key: Tensor,  # (M, D)
    k: int,
    target: Tensor | None,  # (N,) int64
    query_group: Tensor | None,  # (N,) int64
    key_group: Tensor | None,  # (M,) int64
    *,
    exclude_target: bool = True,
) -> tuple[Tensor, Tensor]:  # (N, k), (N, k) int64
    return reference.hard_negatives(
        query,
        key,
        k,
        target=target,
        query_group=query_group,
        key_group=key_group,
        exclude_target=exclude_target,
    )
