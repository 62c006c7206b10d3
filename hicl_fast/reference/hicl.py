"""HiCL's hierarchical loss, as the equations stand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hicl_fast.reference.info_nce import SameGroup, info_nce
from hicl_fast.reference.segment_pool import segment_pool


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
