"""A first-in, first-out store of embeddings of earlier batches."""

from __future__ import annotations

import torch
from torch import Tensor

from hicl_fast import _checks as check
from hicl_fast.losses.state import Stateful
from hicl_fast.ops.common.autograd import unwrapped

NOBODY = torch.iinfo(torch.int64).min  # the group of a row that was pushed without one


class NegativeQueue(Stateful):
    """The last ``size`` rows that were pushed, detached, for use as negatives of later batches (MoCo, arXiv 1911.05722).

    Each row keeps the group that it was pushed with, so that a text's own embedding of the last epoch is not its negative
    in this one. Rows, groups and the count follow the module's device and are saved in its ``state_dict``, so that a
    resumed run goes on with the same negatives; they are no buffers: under ``DistributedDataParallel`` each process keeps
    its own. Storage is allocated by the first push, which fixes D, type and device.

    Args:
        size: number of rows kept, at least 1.

    Example:
        >>> queue = NegativeQueue(4096)
        >>> loss = HF.info_nce(query, key, bank=queue.rows(), query_group=ids, key_group=ids, bank_group=queue.groups())
        >>> queue.push(key, ids)
    """

    STATE = ("storage", "pushed", "group")
    ADDED = ("group",)

    storage: Tensor  # (size, D) once something was pushed, (0, 0) before
    group: Tensor  # (size,) or (size, G) int64 once something was pushed with groups, (0,) before
    pushed: int  # rows ever pushed

    def __init__(self, size: int) -> None:
        super().__init__()
        check.whole_number("size", size, 1)
        self.size = size
        self.storage, self.group = torch.empty(0, 0), torch.empty(0, dtype=torch.int64)
        self.pushed = 0

    def __len__(self) -> int:
        return min(self.size, self.pushed)

    @torch.compiler.disable
    def rows(self) -> Tensor | None:
        """The stored rows (len(self), D) in no particular order; ``None`` while there are none."""
        return self.storage[: len(self)] if len(self) else None

    @torch.compiler.disable
    def groups(self) -> Tensor | None:
        """The stored rows' groups (len(self),) int64, or (len(self), G), in the order of :meth:`rows`.

        ``None`` while none has one.

        A row that was pushed without a group has −2⁶³ and counts as nobody's.
        """
        return self.group[: len(self)] if len(self.group) and len(self) else None

    @torch.compiler.disable
    def check_fits(self, name: str, rows: Tensor, group: Tensor | None) -> None:
        """Raise ``ValueError`` where rows (N, D) and groups, (N,) or (N, G), have not the D and the G of what is stored."""
        if len(self) and isinstance(rows, Tensor) and rows.dim() == 2 and rows.shape[1] != self.storage.shape[1]:
            raise ValueError(
                f"{name}: expected rows of length {self.storage.shape[1]}, as the queue has, got {check.describe(rows)}"
            )
        if group is None or not len(self.group) or not isinstance(group, Tensor):
            return
        if group[:1].numel() != self.group[:1].numel():
            raise ValueError(
                f"{name}_group: expected shape {(len(group), *self.group.shape[1:])}, as the queue has, "
                f"got {check.describe(group)}"
            )

    @torch.compiler.disable
    @torch.inference_mode(False)  # what is kept must be of use to training, whatever mode it comes from
    @torch.no_grad()
    def push(self, rows: Tensor, group: Tensor | None = None) -> None:
        """Store the rows (N, D), and their groups, (N,) int64 or (N, G), in place of the oldest.

        Of more than ``size`` the last are kept. The first groups fix how many relations there are.
        """
        if isinstance(rows, Tensor):
            rows = unwrapped(rows)
        check.floating_matrix("rows", rows, "(N, D)")
        if isinstance(group, Tensor):
            group = unwrapped(group)
        if group is not None:
            check.ids("group", group, len(rows), "a group for each row", rows)
            if len(self.group) and group[:1].numel() == self.group[:1].numel():  # (N,) and (N, 1) are the same
                group = group.reshape(len(rows), *self.group.shape[1:])
            elif len(self.group):
                raise ValueError(
                    f"group: expected shape {(len(rows), *self.group.shape[1:])}, as pushed before, "
                    f"got {check.describe(group)}"
                )
        if self.storage.numel() == 0:
            self.storage = rows.new_zeros(self.size, rows.shape[1])
        if rows.shape[1] != self.storage.shape[1]:
            raise ValueError(
                f"rows: expected length {self.storage.shape[1]}, as pushed before, got {check.describe(rows)}"
            )
        if group is not None and len(self.group) == 0:
            self.group = group.new_full((self.size, *group.shape[1:]), NOBODY)
        self.storage = self._with_latest(self.storage, rows)
        if len(self.group):
            nobody = self.group.new_full((len(rows), *self.group.shape[1:]), NOBODY)
            self.group = self._with_latest(self.group, nobody if group is None else group)
        self.pushed += min(len(rows), self.size)

    def _with_latest(self, kept: Tensor, latest: Tensor) -> Tensor:
        """A new tensor, not an edit: the old one may be saved for a backward pass that is still to come."""
        latest, kept, begin = latest[-self.size :].to(kept.dtype), kept.clone(), self.pushed % self.size
        until_end = min(self.size - begin, len(latest))
        kept[begin : begin + until_end] = latest[:until_end]
        kept[: len(latest) - until_end] = latest[until_end:]
        return unwrapped(kept)

    def _take(self, name: str, saved: Tensor) -> None:
        if name != "pushed" and saved.numel() and saved.shape[0] != self.size:
            raise ValueError(f"{name}: expected {self.size} rows, as this queue keeps, got {check.describe(saved)}")
        if name == "storage":  # groups, if any were saved, come after the rows
            self.group = self.group[:0]
        super()._take(name, saved)

    def extra_repr(self) -> str:
        return f"size={self.size}"
