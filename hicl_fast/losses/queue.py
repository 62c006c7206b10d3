"""A first-in, first-out store of embeddings of earlier batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hicl_fast import _checks as check


class NegativeQueue(nn.Module):
    """The last ``size`` rows that were pushed, detached, for use as negatives of later batches (MoCo, arXiv 1911.05722).

    The rows and the count are buffers: they follow the module's device and are saved in its ``state_dict``, so that a
    resumed run goes on with the same negatives. Storage is allocated by the first push, which fixes D, type and device.

    Args:
        size: number of rows kept, at least 1.

    Example:
        >>> queue = NegativeQueue(4096)
        >>> loss = HF.info_nce(query, key, bank=queue.rows())
        >>> queue.push(key)
    """

    storage: Tensor  # (size, D) once something was pushed, (0, 0) before
    pushed: Tensor  # () int64, on the CPU: rows ever pushed

    def __init__(self, size: int) -> None:
        super().__init__()
        check.whole_number("size", size, 1)
        self.size = size
        self.register_buffer("storage", torch.empty(0, 0))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return min(self.size, self._count())

    def rows(self) -> Tensor | None:
        """The stored rows (len(self), D) in no particular order; ``None`` while there are none."""
        return self.storage[: len(self)] if len(self) else None

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Store the rows (N, D) in place of the oldest. Of more than ``size`` rows the last are kept."""
        check.floating_matrix("rows", rows, "(N, D)")
        rows = rows.detach()[-self.size :]
        if self.storage.numel() == 0:
            self.storage = rows.new_zeros(self.size, rows.shape[1])
        if rows.shape[1] != self.storage.shape[1]:
            raise ValueError(
                f"rows: expected length {self.storage.shape[1]}, as pushed before, got {check.describe(rows)}"
            )
        # A new tensor, not an edit: the old one may be saved for a backward pass that is still to come.
        storage, begin = self.storage.clone(), self._count() % self.size
        until_end = min(self.size - begin, rows.shape[0])
        storage[begin : begin + until_end] = rows[:until_end].to(storage.dtype)
        storage[: rows.shape[0] - until_end] = rows[until_end:].to(storage.dtype)
        self.storage = storage
        self.pushed = self.pushed + rows.shape[0]

    def _count(self) -> int:
        return int(self.pushed)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Move the rows, but keep the count in host memory: reading it must not wait for a device."""
        module = super()._apply(fn, recurse)
        self.pushed = self.pushed.cpu()
        return module

    def _load_from_state_dict(self, state_dict, prefix, *args):  # type: ignore[no-untyped-def]
        saved = state_dict.get(prefix + "storage")
        if saved is not None and saved.numel() and saved.shape[0] != self.size:
            raise ValueError(f"storage: expected {self.size} rows, as this queue keeps, got {check.describe(saved)}")
        if saved is not None:
            self.storage = torch.empty_like(saved, device=self.storage.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"size={self.size}"
