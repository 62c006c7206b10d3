"""Ragged weighted pooling as plain PyTorch, for derivatives that no backend has: second ones, forward mode, ``torch.func``.

It has the reference's result without the reference's loop over sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hicl_fast.ops.common.numbers import sum_type
from hicl_fast.ops.segment_pool.sequences import sequence_of_segments


def segment_pool(
    segments: Tensor, offsets: Tensor, weights: Tensor | None
) -> Tensor:  # (S, D), (B + 1,), (S,) -> (B, D)
    """:func:`hicl_fast.reference.segment_pool` without its loop over sequences."""
    dtype, num_sequences = sum_type(segments, weights), len(offsets) - 1
    h = segments.to(dtype)
    w = torch.ones_like(h[:, 0]) if weights is None else weights.to(dtype)
    sequence = sequence_of_segments(offsets, len(segments))
    weighted = h.new_zeros(num_sequences, h.shape[1]).index_add(0, sequence, w[:, None] * h)
    total = w.new_zeros(num_sequences).index_add(0, sequence, w)
    is_zero = total == 0
    return torch.where(is_zero[:, None], 0.0, weighted / total.masked_fill(is_zero, 1.0)[:, None]).to(segments.dtype)
