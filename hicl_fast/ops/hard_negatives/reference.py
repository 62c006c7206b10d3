"""Hard negatives, as the definition stands."""

from __future__ import annotations

import torch
from torch import Tensor

from hicl_fast.ops.info_nce.reference import normalise


def hard_negatives(
    query: Tensor,  # (N, D)
    key: Tensor,  # (M, D)
    k: int,
    *,
    target: Tensor | None = None,  # (N,) int64; −1: the row has none
    query_group: Tensor | None = None,  # (N,) int64
    key_group: Tensor | None = None,  # (M,) int64
    exclude_target: bool = True,
) -> tuple[Tensor, Tensor]:  # (N, k), (N, k) int64
    """The k largest ``s_ij`` of each row i over j ≠ t_i outside the row's group, and where they are.

    Larger first, equal values by lower index, NaN before numbers. A row with fewer candidates than k has −inf and −1
    in the places that are left over.
    """
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
    similarity = normalise(query.detach().to(dtype)) @ normalise(key.detach().to(dtype)).T
    columns = torch.arange(key.shape[0], device=key.device)
    left_out = torch.zeros_like(similarity, dtype=torch.bool)
    if exclude_target:
        rows = torch.arange(query.shape[0], device=query.device) if target is None else target
        left_out = left_out | (rows[:, None] == columns)
    if query_group is not None and key_group is not None:
        left_out = left_out | (query_group[:, None] == key_group)
    best = similarity.masked_fill(left_out, -torch.inf).sort(dim=1, descending=True, stable=True)
    value, index = best.values[:, :k], best.indices[:, :k]
    return value, index.masked_fill(value == -torch.inf, -1)
