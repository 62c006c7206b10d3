"""What an InfoNCE call asks beyond the plain one, in the words in which a backend refuses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hicl_fast.ops.problem import Problem

SMALL = 1024  # rows, columns of each kind, and dimensions


def features(problem: Problem) -> tuple[str, ...]:
    # The conditions are Python's own, so that a compiler tracing the call can settle them.
    found = []
    sizes = [*problem.query.shape, problem.key.shape[0]]
    if problem.negatives is not None:
        sizes.append(problem.negatives.shape[0])
    if max(sizes) > SMALL:
        found.append(f"more than {SMALL} rows, columns or dimensions")
    if problem.bank is not None:
        found.append("a bank")
    if problem.extra_logits is not None:
        found.append("extra logits")
    if problem.query_group is not None and problem.same_group != "negative":
        found.append("groups")
    if problem.symmetric:
        found.append("a symmetric loss")
    return tuple(found)
