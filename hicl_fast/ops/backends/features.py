"""What a call asks beyond the plain one, in the words in which a backend refuses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 1024  # rows, columns of each kind, and dimensions
FEW_MIXED = 64  # of a row's negatives
_MORE = (f"more than {SMALL} rows, columns or dimensions",)


def of_rows(*inputs: Tensor) -> tuple[str, ...]:
    """Of a call on the rows of these matrices."""
    return _MORE if max([size for x in inputs for size in x.shape]) > SMALL else ()


def of_mixing(query: Tensor, bank: Tensor, index: Tensor) -> tuple[str, ...]:
    more = (f"more than {FEW_MIXED} negatives of a row",) if index.shape[1] > FEW_MIXED else ()
    return (*of_rows(query, bank), *more)
