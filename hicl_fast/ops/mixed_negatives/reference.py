"""HNCSE's mixtures of hard negatives (arXiv 2411.12156), as the equation stands."""

from __future__ import annotations

import torch
from torch import Tensor

from hicl_fast.ops.common.constants import NORM_FLOOR
from hicl_fast.ops.info_nce.reference import normalise


def mixed_negative_logits(
    query: Tensor,  # (N, D)
    bank: Tensor,  # (B, D)
    index: Tensor,  # (N, k) int64
    pairs: Tensor,  # (N, m, 2) int64
    *,
    alpha: float = 0.5,
    temperature: float | Tensor = 0.05,
) -> Tensor:  # (N, m)
    """``cos(query_i, α n_a + (1 − α) n_b) / temperature``, n = ``bank[index[i]]`` as it is, unnormalised.

    A mixture of length below NORM_FLOOR has no direction: its logit is 0 and so is the logit's gradient.
    """
    dtype = torch.promote_types(torch.promote_types(query.dtype, bank.dtype), torch.float32)
    rows = torch.arange(index.shape[0], device=index.device)[:, None]
    first, second = bank.to(dtype)[index[rows, pairs.unbind(-1)[0]]], bank.to(dtype)[index[rows, pairs[..., 1]]]
    mixture = alpha * first + (1 - alpha) * second  # (N, m, D)
    vanishes = torch.linalg.vector_norm(mixture, dim=-1, keepdim=True) < NORM_FLOOR
    direction = normalise(torch.where(vanishes, torch.zeros_like(mixture), mixture))
    return torch.einsum("nd,nmd->nm", normalise(query.to(dtype)), direction) / temperature
