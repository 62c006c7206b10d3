"""Row statistics of cosine similarities, as the equations stand."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from hicl_fast.ops.info_nce.reference import largest, log_sum, logits_of_rows


class RowLogits(NamedTuple):
    negative: Tensor  # (N,)
    positive: Tensor  # (N,), or of every target (T,) with target_offsets
    similarity: Tensor  # likewise, the positive's, detached
    hardest: Tensor  # (N,) largest similarity among the negatives, detached; −inf where there is none


def log_sum_exp(query: Tensor, key: Tensor, **options: Any) -> RowLogits:
    """``negative_i = log Σ_{j ≠ t_i} exp ℓ_ij`` and ``positive_i = ℓ_{i,t_i}``.

    What :func:`hicl_fast.functional.log_sum_exp` checks and computes without the N×M matrix.

    Args:
        query: (N, D)
        key: (M, D)
        options: of :func:`hicl_fast.ops.info_nce.reference.logits_of_rows`.
    """
    logits = logits_of_rows(query, key, **options)
    return RowLogits(log_sum(logits.negative), logits.positive, logits.similarity.detach(), largest(logits.competing))
