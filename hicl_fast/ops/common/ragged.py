"""Lists of different lengths in one tensor, a list for each row: offsets (N + 1,) say where each begins and ends."""

from __future__ import annotations

import torch
from torch import Tensor

from hicl_fast.ops.common.autograd import readable


def row_of_each(offsets: Tensor, total: int) -> Tensor:  # (N + 1,) int64 -> (total,) int64
    """The row that each of all lists' members is of; ``total``, which no device is asked for, is how many there are."""
    count = offsets.diff()
    rows = torch.arange(count.shape[0], device=count.device)
    return torch.repeat_interleave(rows, count, output_size=total)


def check_offsets(name: str, offsets: Tensor, total: int, what: str, *, least: int = 0) -> None:
    """Raise ``ValueError`` where they don't rise from 0 to ``total``, the number of ``what``, by ``least`` at least.

    Looks at host memory only.
    """
    if (offsets := readable(offsets)) is None or offsets.dim() != 1:  # type: ignore[assignment]
        return
    first, last, count = int(offsets[0]), int(offsets[-1]), offsets.diff()
    if first != 0 or last != total:
        raise ValueError(f"{name}: expected offsets from 0 to the number of {what}, {total}, got {first} to {last}")
    if (count < 0).any():
        at = int((count < 0).nonzero()[0])
        raise ValueError(f"{name}: expected rising offsets, got {int(offsets[at])} and then {int(offsets[at + 1])}")
    if (count < least).any():
        at = int((count < least).nonzero()[0])
        raise ValueError(
            f"{name}: expected at least {least} of the {what} for each query, got {int(count[at])} for query {at}"
        )
