"""The gradient paradigm's passes through kernels/paradigm.py, in chunks of rows.

Of the statistics' similarities nothing is stored. A combination stores a chunk's weights (R, N), the largest thing there
is, and multiplies them by the library's product. Unit rows are float32, so products are as PyTorch's own of float32.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hicl_fast.kernels import paradigm as kernels
from hicl_fast.kernels.cosine_tile import tile_for
from hicl_fast.kernels.paradigm import Largest
from hicl_fast.kernels.tiles import PARADIGM, PARADIGM_COLUMNS, Tile
from hicl_fast.ops.common.constants import POWER_FLOOR
from hicl_fast.ops.common.triton import on_device, tensor_precision
from hicl_fast.ops.common.unit_rows import UnitRows
from hicl_fast.ops.paradigm import torch as chunked_paradigm
from hicl_fast.ops.paradigm.engine import Combination, Statistics, Term
from hicl_fast.ops.paradigm.torch import combine_by, views  # combine_by: a user's function is Python

__all__ = ["combine", "combine_by", "gradient", "statistics", "views"]

CHUNK_BYTES = 512 << 20  # of weights, or of what the statistics' tiles keep
_ALIGNMENT = 64  # columns; the library's fast products want rows that begin at a multiple of 16 bytes

# Spread of the logits, 2/τ, up to which softmax weights take e^(1/τ) out of every row: the smallest, e^−72, still has
# room above float32's smallest number for what it is multiplied by. Beyond it, a row's largest is found first.
MAX_SPREAD = 72.0


def gradient(unit: UnitRows, terms: Sequence[Term]) -> Tensor:
    with on_device(unit.rows):
        return chunked_paradigm.gradient(unit, [_where_it_goes(term) for term in terms])


def _where_it_goes(term: Term) -> Term:
    """The term with its rows at their targets, added up in a fixed order, which ``index_add_`` on a GPU hasn't."""
    if term.target is None:
        return term
    rows = (term.rows if term.source is None else term.rows[term.source]).contiguous()
    target, order = term.target.sort(stable=True)
    begin = torch.searchsorted(target, torch.arange(len(rows) + 1, device=rows.device))
    return Term(kernels.sum_by_target(rows, term.factor.contiguous(), order, begin), torch.ones_like(term.factor))


def statistics(x: Tensor, y: Tensor, temperature: float | None, columns: bool) -> Statistics:
    n = len(x)
    hardest, nearest = x.new_empty(n), torch.empty(n, dtype=torch.int64, device=x.device)
    lse = x.new_empty(0 if temperature is None else n)
    column_hardest = x.new_full((n if columns else 0,), -torch.inf)
    column_index = torch.zeros_like(column_hardest, dtype=torch.int64)
    with _running(x, y, columns=columns) as sweep:
        kept = 16 * sweep.num_column_tiles + (8 * n // sweep.tile.rows if columns else 0)  # bytes a row
        for rows in sweep.chunks(kept):
            by_row, by_column, partials = sweep.statistics_of(rows, temperature, columns)
            hardest[rows], nearest[rows] = _first_largest(by_row.value, by_row.place)
            if by_column is not None:
                found, at = _first_largest(by_column.value, by_column.place)
                column_hardest, column_index = _first_largest(
                    torch.stack((column_hardest, found)), torch.stack((column_index, at))
                )
            if partials is not None:
                total, most = partials
                lse[rows] = torch.logsumexp(total.log_() + most, dim=0)
    return Statistics(hardest, nearest, lse, column_hardest, column_index)


def combine(x: Tensor, y: Tensor, t: Tensor, weight: str, parameter: float) -> Combination:
    n = len(x)
    out, hardest, log_total = torch.empty_like(t), x.new_empty(n), x.new_empty(n)
    nearest = torch.empty(n, dtype=torch.int64, device=x.device)
    log_factor = _log_factor(x, y, weight, parameter)
    with _running(x, y, columns=False) as sweep:
        width = -(-n // _ALIGNMENT) * _ALIGNMENT
        chunks = sweep.chunks(width * x.element_size())
        buffer = x.new_empty(chunks[0].stop, width)
        for rows in chunks:
            weights = buffer[: rows.stop - rows.start, :n]
            by_row, sums = sweep.weights_of(rows, weight, parameter, log_factor[rows], weights)
            hardest[rows], nearest[rows] = _first_largest(by_row.value, by_row.place)
            total = sums.sum(dim=0)
            log_total[rows] = log_factor[rows] + total.log()
            torch.mm(weights, t, out=out[rows]).div_(total[:, None])
    return Combination(out, log_total, hardest, nearest)


def _log_factor(x: Tensor, y: Tensor, weight: str, parameter: float) -> Tensor:  # (N,)
    """What is taken out of a row's weights so that they stay in float32's range: its logarithm."""
    if weight == "softmax":
        if 2 / parameter <= MAX_SPREAD:
            return x.new_full((len(x),), 1 / parameter)
        return statistics(x, y, None, columns=False).hardest / parameter
    if weight == "power" and abs(parameter) * -math.log(POWER_FLOOR) > MAX_SPREAD:
        if parameter < 0:
            return x.new_full((len(x),), parameter * math.log(POWER_FLOOR))
        return parameter * statistics(x, y, None, columns=False).hardest.clamp_min(POWER_FLOOR).log()
    return x.new_zeros(len(x))


def _first_largest(value: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:  # (T, N), (T, N) -> (N,), (N,) int64
    """The largest of the tiles' largest, in the first tile that has it; NaN is the largest."""
    largest, tile = value.max(dim=0)
    return largest, place.gather(0, tile[None])[0].to(torch.int64)


@contextlib.contextmanager
def _running(x: Tensor, y: Tensor, *, columns: bool) -> Iterator[Sweep]:
    precision = tensor_precision(x)
    with on_device(x):
        tile = tile_for([x, y], precision, PARADIGM_COLUMNS if columns else PARADIGM)
        yield Sweep(x, y, tile, precision)


@dataclass(frozen=True)
class Sweep:
    """Unit rows against unit rows, in chunks."""

    x: Tensor  # (N, D)
    y: Tensor  # (N, D)
    tile: Tile
    precision: str

    @property
    def num_column_tiles(self) -> int:
        return -(-len(self.y) // self.tile.cols)

    def chunks(self, row_bytes: int) -> list[slice]:
        num_rows, height = len(self.x), self.tile.rows
        size = max(height, CHUNK_BYTES // row_bytes // height * height)
        return [slice(begin, min(begin + size, num_rows)) for begin in range(0, num_rows, size)]

    def statistics_of(
        self, rows: slice, temperature: float | None, columns: bool
    ) -> tuple[Largest, Largest | None, Tensor | None]:
        """The tiles' largest by row (column tiles, R) and by column (row tiles, N), and the parts of the rows' sums."""
        count, device = rows.stop - rows.start, self.x.device
        by_row = Largest.unknown(self.num_column_tiles, count, device)
        row_tiles = -(-count // self.tile.rows)
        by_column = Largest.unknown(row_tiles, len(self.y), device) if columns else None
        partials = None if temperature is None else self.x.new_empty(2, self.num_column_tiles, count)
        kernels.statistics(
            self.x[rows], self.y, self.tile, rows.start, by_row, by_column, partials,
            temperature or 1.0, precision=self.precision,
        )  # fmt: skip
        return by_row, by_column, partials

    def weights_of(
        self, rows: slice, weight: str, parameter: float, log_factor: Tensor, out: Tensor
    ) -> tuple[Largest, Tensor]:
        """Writes the weights (R, N); the tiles' largest similarities and the weights' sums, (column tiles, R)."""
        count = rows.stop - rows.start
        by_row = Largest.unknown(self.num_column_tiles, count, out.device)
        sums = torch.empty_like(by_row.value)
        kernels.weights(
            self.x[rows], self.y, self.tile, rows.start, weight, parameter, log_factor, out, by_row, sums,
            precision=self.precision,
        )  # fmt: skip
        return by_row, sums
