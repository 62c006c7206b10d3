"""Row statistics of cosine similarities, as the equations stand."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from hicl_fast.ops.common.constants import SameGroup
from hicl_fast.ops.info_nce.reference import largest, log_sum, logits_of_rows


class RowLogits(NamedTuple):
    negative: Tensor  # (N,)
    positive: Tensor  # (N,)
    similarity: Tensor  # (N,) the positive's, detached
    hardest: Tensor  # (N,) largest similarity among the negatives, detached; −inf where there is none


def log_sum_exp(
    query: Tensor,  # (N, D)
    key: Tensor,  # (M, D)
    *,
    target: Tensor | None = None,  # (N,) int64
    temperature: float | Tensor = 0.05,
    negatives: Tensor | None = None,  # (P, D)
    hard_negative_weight: float = 0.0,
    negatives_group: Tensor | None = None,  # (P,) int64
    bank: Tensor | None = None,  # (B, D)
    extra_logits: Tensor | None = None,  # (N, E)
    own_negatives: Tensor | None = None,  # (H, D)
    own_offsets: Tensor | None = None,  # (N + 1,) int64
    own_group: Tensor | None = None,  # (H,) int64
    own_hardness: float = 0.0,
    in_batch: bool = True,
    limit: Tensor | None = None,  # (N,)
    false_negative_margin: float = math.inf,
    false_negative_ratio: float = math.inf,
    key_hardness: float = 0.0,
    negatives_hardness: float = 0.0,
    bank_hardness: float = 0.0,
    query_group: Tensor | None = None,  # (N,) int64
    key_group: Tensor | None = None,  # (M,) int64
    bank_group: Tensor | None = None,  # (B,) int64
    same_group: SameGroup = "exclude",
    margin: float = 0.0,
) -> RowLogits:
    """``negative_i = log Σ_{j ≠ t_i} exp ℓ_ij`` and ``positive_i = ℓ_{i,t_i}``.

    The arguments are those of :func:`hicl_fast.functional.log_sum_exp`, which checks them and computes the same without the
    N×M matrix.
    """
    logits = logits_of_rows(
        query,
        key,
        target,
        query_group,
        key_group,
        negatives=negatives,
        hard_negative_weight=hard_negative_weight,
        negatives_group=negatives_group,
        bank=bank,
        bank_group=bank_group,
        extra_logits=extra_logits,
        own_negatives=own_negatives,
        own_offsets=own_offsets,
        own_group=own_group,
        own_hardness=own_hardness,
        in_batch=in_batch,
        limit=limit,
        false_negative_margin=false_negative_margin,
        false_negative_ratio=false_negative_ratio,
        key_hardness=key_hardness,
        negatives_hardness=negatives_hardness,
        bank_hardness=bank_hardness,
        temperature=temperature,
        same_group=same_group,
        margin=margin,
    )
    return RowLogits(log_sum(logits.negative), logits.positive, logits.similarity.detach(), largest(logits.competing))
