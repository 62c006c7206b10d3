"""The equations as plain PyTorch: readable, any dtype, differentiable by autograd. Every test measures against these.

They build the N×M matrix of similarities, so their memory grows with the square of the batch; train with
:mod:`hicl_fast.functional` instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hicl_fast.ops.common.constants import SameGroup
from hicl_fast.ops.hard_negatives.reference import hard_negatives
from hicl_fast.ops.info_nce.reference import info_nce, normalise
from hicl_fast.ops.log_sum_exp.reference import log_sum_exp
from hicl_fast.ops.mixed_negatives.reference import mixed_negative_logits
from hicl_fast.ops.paradigm.reference import paradigm
from hicl_fast.ops.paradigm.settings import PairStatistics
from hicl_fast.ops.positive_mixing.reference import positive_mixing
from hicl_fast.ops.segment_pool.reference import segment_pool

__all__ = [
    "PairStatistics",
    "hard_negatives",
    "hicl_loss",
    "info_nce",
    "log_sum_exp",
    "mixed_negative_logits",
    "normalise",
    "paradigm",
    "positive_mixing",
    "segment_pool",
]


def hicl_loss(
    segments: Tensor,  # (S, D)
    segments_positive: Tensor,  # (S, D)
    offsets: Tensor | None = None,  # (B + 1,) int64
    lengths: Tensor | None = None,  # (S,)
    *,
    temperature: float | Tensor = 0.05,
    local_weight: float = 0.3,
    global_weight: float | None = None,
    same_sequence: SameGroup = "exclude",
    pooling: str = "length",
    sequence_group: Tensor | None = None,  # (B,) int64
    global_loss: Callable[..., Tensor] = info_nce,
) -> Tensor:
    """``local_weight · InfoNCE(segments) + global_weight · InfoNCE(pooled sequences)``; see :class:`hicl_fast.FusedHiCLLoss`.

    ``global_loss`` may mix hard negatives into the InfoNCE of sequences.
    """
    groups = {} if sequence_group is None else {"query_group": sequence_group, "key_group": sequence_group}
    if offsets is None:
        return global_loss(segments, segments_positive, temperature=temperature, **groups)
    if global_weight is None:
        global_weight = 1.0 - local_weight
    weights = lengths if pooling == "length" else None
    sequence = torch.arange(len(offsets) - 1, device=offsets.device) if sequence_group is None else sequence_group
    sequence = torch.repeat_interleave(sequence, offsets.diff())
    local_loss = info_nce(
        segments,
        segments_positive,
        temperature=temperature,
        query_group=sequence,
        key_group=sequence,
        same_group=same_sequence,
    )
    between_sequences = global_loss(
        segment_pool(segments, offsets, weights),
        segment_pool(segments_positive, offsets, weights),
        temperature=temperature,
        **groups,
    )
    return local_weight * local_loss + global_weight * between_sequences
