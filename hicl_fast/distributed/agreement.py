"""What the ranks tell each other before they exchange rows, so that they fail together and in words."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
import torch.distributed as dist

from hicl_fast.distributed.ranks import Ranks, all_gather_single

_MATRICES = 4  # whose numbers of rows a header has room for
_ABSENT = "nothing"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Shares:
    """How many rows of a joined matrix each rank has, in the order of ranks."""

    counts: tuple[int, ...]
    rank: int

    @property
    def own(self) -> int:
        return self.counts[self.rank]

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def largest(self) -> int:
        return max(self.counts)

    @property
    def first(self) -> int:
        """Where this rank's rows begin in the joined matrix."""
        return sum(self.counts[: self.rank])

    @property
    def slices(self) -> list[slice]:
        """Each rank's rows of the joined matrix."""
        ends = list(accumulate(self.counts))
        return [slice(end - count, end) for end, count in zip(ends, self.counts, strict=True)]


def attempt(prepare: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    """What ``prepare`` returns or raises: a rank that fails must still take part in :func:`agree`."""
    try:
        return prepare(), None
    except Exception as failure:  # whatever it is, the other ranks have to hear of it
        return None, failure


@torch.compiler.disable
def agree(
    ranks: Ranks, rows: Mapping[str, int], terms: Mapping[str, object], failure: Exception | None = None
) -> dict[str, Shares]:
    """Exchange a header of a few integers; see that all ranks mean the same.

    All ranks call this at the same place, also one that can't go on. A group without a backend for host memory (NCCL
    alone) exchanges the header on its device and waits for it: sizes have to be known before buffers can be made.

    Args:
        ranks: the processes.
        rows: at most 4 names of matrices, and this rank's number of rows of each.
        terms: what has to be the same on all ranks, by name: types, row lengths, options. Compared by ``str``.
        failure: why this rank can't go on, or ``None``.

    Returns:
        For each name in ``rows`` how many rows each rank has.

    Raises:
        ValueError: on every rank, if one fails or terms differ, with each rank's words.
        Exception: ``failure``, where there is one process only.
    """
    if ranks.size == 1:
        if failure is not None:
            raise failure
        return {name: Shares((count,), 0) for name, count in rows.items()}
    described = {"matrices": ", ".join(rows), **{name: str(value) for name, value in terms.items()}}
    counts = list(rows.values()) + [0] * (_MATRICES - len(rows))
    own = torch.tensor([failure is not None, _digest(described), *counts], device=ranks.host_device())
    table = own.new_empty(ranks.size * len(own))
    all_gather_single(table, own, group=ranks.process_group)
    headers = table.reshape(ranks.size, -1).tolist()
    if any(failed for failed, *_ in headers) or len({digest for _, digest, *_ in headers}) > 1:
        _refuse(ranks, described, failure)
    return {name: Shares(tuple(header[2 + place] for header in headers), ranks.rank) for place, name in enumerate(rows)}


def _digest(described: Mapping[str, str]) -> int:
    digest = hashlib.blake2b(repr(sorted(described.items())).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _refuse(ranks: Ranks, described: dict[str, str], failure: Exception | None) -> None:
    own = (None if failure is None else f"{type(failure).__name__}: {failure}", described)
    told: list[tuple[str | None, dict[str, str]]] = [own] * ranks.size
    dist.all_gather_object(told, own, group=ranks.process_group)
    failures = [f"rank {rank}: {words}" for rank, (words, _) in enumerate(told) if words is not None]
    if failures:
        raise ValueError("gather: expected every rank to have a batch, but\n  " + "\n  ".join(failures)) from failure
    names = {name: None for _, terms in told for name in terms}
    differing = [name for name in names if len({terms.get(name, _ABSENT) for _, terms in told}) > 1]
    lines = [
        f"rank {rank}: " + "; ".join(f"{name} {terms.get(name, _ABSENT)}" for name in differing)
        for rank, (_, terms) in enumerate(told)
    ]
    raise ValueError("gather: expected the same on every rank, got\n  " + "\n  ".join(lines))
