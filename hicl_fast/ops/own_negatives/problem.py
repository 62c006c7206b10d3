"""What a call consists of: rows that one query each is compared with, and the rules that hold for them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hicl_fast.ops.common.numbers import check_scale, sum_type
from hicl_fast.ops.common.ragged import check_offsets, row_of_each


class Wanted(NamedTuple):
    """Which of the inputs need a gradient. The names are :class:`Own`'s fields."""

    query: bool
    rows: bool
    scale: bool


DIFFERENTIABLE = Wanted._fields


class Gradients(NamedTuple):
    """One gradient per input in the type the sums are kept in; an empty tensor where none was wanted."""

    query: Tensor  # (N, D)
    rows: Tensor  # (H, D)
    scale: Tensor  # ()


@dataclass(eq=False, slots=True)
class Own:
    """Query i is compared with ``rows[offsets[i] : offsets[i + 1]]``, and nobody else is."""

    query: Tensor  # (N, D)
    rows: Tensor  # (H, D)
    offsets: Tensor  # (N + 1,) int64, rising from 0 to H
    scale: Tensor  # () 1 / temperature; on the CPU where its value is known to the host
    limit: Tensor | None = None  # (N,) a column whose similarity is larger is left out
    query_group: Tensor | None = None  # (N, G) int64; a column one of whose ids is the query's is left out
    group: Tensor | None = None  # (H, G) int64
    hardness: float = 0.0  # times the similarity, held constant, is added to the logits

    @property
    def dtype(self) -> torch.dtype:
        """The type sums and logits are kept in."""
        return sum_type(self.query, self.rows)

    def query_of_rows(self) -> Tensor:  # (H,) int64
        return row_of_each(self.offsets, self.rows.shape[0])

    def left_out(self, query_of_rows: Tensor, similarity: Tensor) -> Tensor | None:  # (H,) int64, (H,) -> (H,) bool
        """What the rules leave out; ``None`` where there are none."""
        found = None
        if self.limit is not None:
            found = similarity > self.limit.to(similarity.dtype)[query_of_rows]
        if self.query_group is not None and self.group is not None:
            in_group = (self.query_group[query_of_rows] == self.group).any(dim=1)
            found = in_group if found is None else found | in_group
        return found

    def differentiable(self) -> tuple[Tensor, ...]:
        return tuple([getattr(self, name) for name in DIFFERENTIABLE])

    def flat(self) -> list[Any]:
        """As the registered operators take it."""
        return [getattr(self, name) for name in FIELDS]

    def shapes(self) -> dict[str, tuple[Tensor | None, str]]:
        """By name each tensor and the shape that it must have."""
        shapes = {"query": "ND", "rows": "HD", "offsets": "O", "limit": "N", "query_group": "NG", "group": "HG"}
        return {name: (getattr(self, name), shape) for name, shape in shapes.items()}

    def check_values(self) -> None:
        """Raise ``ValueError`` for offsets or a temperature out of range. Looks at host memory only."""
        check_scale(self.scale)
        check_offsets("own_negatives.offsets", self.offsets, self.rows.shape[0], "rows")


FIELDS = [one.name for one in fields(Own)]
SCHEMA = (
    "Tensor query, Tensor rows, Tensor offsets, Tensor scale, Tensor? limit, Tensor? query_group, Tensor? group, "
    "float hardness"
)
