"""What the integrations gather from other processes, which may have other numbers of rows than this one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hicl_fast.distributed import Ranks, Shares, agree, gather_rows, own_rows_among_all


@dataclass(frozen=True)
class Joined:
    """This process's matrices among those of all processes, once these have told each other their numbers of rows."""

    ranks: Ranks
    shares: Mapping[str, Shares]  # of each matrix

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """All processes' rows of a matrix (N, D), with gradients to all of them."""
        return gather_rows(rows, self.shares[name], self.ranks)

    def own_rows(self, name: str, rows: Tensor) -> Tensor:
        """All processes' rows of a matrix (N, D), of which this process's alone have a gradient."""
        return own_rows_among_all(rows, self.shares[name], self.ranks)

    def first(self, name: str) -> int:
        """Where this process's rows begin among all processes' rows."""
        return self.shares[name].first

    def weight(self, name: str) -> float:
        """Of this process's mean over its rows, so that the mean over the processes is that over all rows.

        1 where all have equally many.
        """
        shares = self.shares[name]
        return self.ranks.size * shares.own / shares.total


def join(
    ranks: Ranks, rows: Mapping[str, int], terms: Mapping[str, object], failure: Exception | None = None
) -> Joined:
    """Tell all processes this one's numbers of rows.

    Args:
        ranks: the processes; all of them call this at the same place.
        rows: this process's number of rows of each matrix, at most 4 of them.
        terms: what has to be the same on all processes, by name.
        failure: why this process can't go on, or ``None``.

    Raises:
        ValueError: on every process, with each one's words, if one fails, has no rows, or means something else.
    """
    if failure is None and not all(rows.values()):
        failure = ValueError("gather: expected at least one row of each, got " + _listed(rows))
    return Joined(ranks, agree(ranks, rows, terms, failure))


def refuse_unequal(joined: Joined, argument: str, computed_by: str) -> None:
    """For losses that are not this library's: they gather equal numbers of rows alone.

    Raises:
        ValueError: on every process, where their numbers of rows differ.
    """
    for name, shares in joined.shares.items():
        if len(set(shares.counts)) > 1:
            raise ValueError(
                f"{argument}: expected as many {name} on every process, since {computed_by} computes this loss, "
                f"got {', '.join(map(str, shares.counts))}"
            )


def _listed(rows: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in rows.items())
