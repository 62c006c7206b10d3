"""Which sequence a segment belongs to."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_of_segments(offsets: Tensor, num_segments: int) -> Tensor:  # (B + 1,) int64 -> (S,) int64
    """Sequence b's number in its rows ``offsets[b]:offsets[b + 1]``.

    A search and not ``repeat_interleave``: that writes past the end of its result where offsets fall, which nobody has
    checked where they are on a device or in a batch of ``vmap``.
    """
    segments = torch.arange(num_segments, device=offsets.device)
    return torch.searchsorted(offsets[1:].contiguous(), segments, right=True)
