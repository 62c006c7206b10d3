"""Which processes share a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from hicl_fast import _checks as check

# PyTorch 2.13 has renamed them, and warns of the older names, which are all that earlier releases have.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Gather = bool | Literal["ring"]


@dataclass(frozen=True)
class Ranks:
    """The processes of a group as one of them sees them."""

    process_group: dist.ProcessGroup | None  # None: all processes
    rank: int
    size: int

    def host_device(self) -> torch.device:
        """Where a header is exchanged: host memory if the group has a backend for it, so that no device is waited for."""
        if "cpu" in str(dist.get_backend_config(self.process_group)):
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def smallest(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        told = torch.tensor(number, device=self.host_device())
        dist.all_reduce(told, dist.ReduceOp.MIN, group=self.process_group)
        return int(told)

    def neighbour(self, distance: int) -> int:
        """The global rank of the process so many places further round the ring."""
        place = (self.rank + distance) % self.size
        return place if self.process_group is None else dist.get_global_rank(self.process_group, place)


def ranks_of(process_group: dist.ProcessGroup | None = None) -> Ranks:
    """The processes of a group; one process where ``torch.distributed`` has not been initialised.

    Raises:
        ValueError: this process is not in the group.
    """
    check_process_group(process_group)
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks(None, 0, 1)
    rank = dist.get_rank(process_group)
    if rank < 0:
        raise ValueError("process_group: expected a group that this process belongs to, got one without it")
    return Ranks(process_group, rank, dist.get_world_size(process_group))


def check_process_group(process_group: object) -> None:
    """A group, ``None``, or what ``new_group`` gives a process that is not in the group."""
    if process_group is None or not dist.is_available() or process_group is dist.GroupMember.NON_GROUP_MEMBER:
        return
    check.instance("process_group", process_group, dist.ProcessGroup)


def check_gather(gather: Gather, process_group: dist.ProcessGroup | None) -> Gather:
    """``gather`` as a loss's constructor takes it; a process group alone means ``True``."""
    check.one_of("gather", gather, (False, True, "ring"))
    check_process_group(process_group)
    return True if process_group is not None and gather is False else gather
