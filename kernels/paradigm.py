"""The gradient paradigm's two passes over tiles of similarities s_ij = x_i·y_j of unit rows, the diagonal left out.

``statistics_kernel`` keeps the largest similarities, their first places and log-sum-exp; ``weights_kernel`` stores
weights, for the library's product, and keeps their sums. A program does one tile and writes what it keeps beside what
the other tiles keep: no atomics, so every run gives the same bits. Every similarity is summed over the dimensions in
the same order, so that equal columns have equal ones wherever they lie. ``sum_by_target_kernel`` adds up rows that are
sent to one place.
"""

# ruff: noqa: N803
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from hicl_fast.kernels.cosine_tile import LN_2, LOG2_E, num_tiles, store_sums, sum_of_exp2, tile_of_products
from hicl_fast.kernels.rows import load_rows, row_grid, store_rows
from hicl_fast.kernels.tiles import Tile, row_tile
from torch import Tensor

from hicl_fast.ops.common.constants import POWER_FLOOR

# Which weight ``weight_of`` computes.
SOFTMAX = tl.constexpr(0)
POWER = tl.constexpr(1)
WEIGHTS = {"softmax": SOFTMAX, "power": POWER}

# Planes of a tile's sums by row, (plane, column tile, row).
EXP_SUM = tl.constexpr(0)  # Σ exp(s/τ − max)
MAX = tl.constexpr(1)  # max s/τ

FLOOR = tl.constexpr(POWER_FLOOR)
NO_PLACE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def softmax_weight(s, log_factor, temperature):
    return tl.exp(s / temperature - log_factor)


@triton.jit
def power_weight(s, log_factor, exponent):
    floored = tl.where(s < FLOOR, FLOOR, s)  # a maximum would lose NaN
    return tl.exp(exponent * tl.log(floored) - log_factor)


@triton.jit
def weight_of(s, log_factor, parameter, WEIGHT: tl.constexpr):
    """A weight divided by exp(log_factor), (BLOCK_ROWS, BLOCK_COLS); log_factor is 0 for those that need none."""
    if WEIGHT == SOFTMAX:
        return softmax_weight(s, log_factor, parameter)
    return power_weight(s, log_factor, parameter)


@triton.jit
def store_largest(value_ptr, place_ptr, tile, at, num, s, counts, places, AXIS: tl.constexpr):
    """The largest s that counts along AXIS, and the first of the places where it is; NaN is the largest."""
    ordered = tl.where(counts, tl.where(s == s, s, float("inf")), float("-inf"))
    most = tl.max(ordered, axis=AXIS)
    is_most = counts & (ordered == tl.expand_dims(most, AXIS))
    first = tl.min(tl.where(is_most, tl.expand_dims(places, 1 - AXIS), NO_PLACE), axis=AXIS)
    store_sums(value_ptr, 0, 0, tile, at, num, tl.where(most == float("inf"), float("nan"), most))
    store_sums(place_ptr, 0, 0, tile, at, num, first)


@triton.jit
def statistics_kernel(
    x_ptr,  # (num_rows, dim) unit rows
    y_ptr,  # (num_cols, dim) unit rows
    hardest_ptr,  # out (column tiles, num_rows) the largest similarity
    nearest_ptr,  # out (column tiles, num_rows) int32 its column
    column_hardest_ptr,  # out (row tiles, num_cols)
    column_index_ptr,  # out (row tiles, num_cols) int32 its row
    partials_ptr,  # out (2, column tiles, num_rows): EXP_SUM, MAX
    num_rows,
    num_cols,
    dim,
    first_own,  # the column that the first row leaves out
    plane_stride,
    temperature,
    HAS_COLUMNS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    row_tile, col_tile, rows, cols, s = tile_of_products(
        tl.program_id(0), x_ptr, y_ptr, num_rows, num_cols, dim,
        PRECISION, False, BLOCK_ROWS, BLOCK_COLS, BLOCK_DEPTH, BAND,
    )  # fmt: skip
    own = first_own + rows
    counts = (rows < num_rows)[:, None] & (cols < num_cols)[None, :] & (cols[None, :] != own[:, None])
    store_largest(hardest_ptr, nearest_ptr, col_tile, rows, num_rows, s, counts, cols, 1)
    if HAS_COLUMNS:
        store_largest(column_hardest_ptr, column_index_ptr, row_tile, cols, num_cols, s, counts, own, 0)
    if HAS_LSE:
        most, total = sum_of_exp2(tl.where(counts, s / temperature * LOG2_E, float("-inf")), 1)
        store_sums(partials_ptr, plane_stride, EXP_SUM, col_tile, rows, num_rows, total)
        store_sums(partials_ptr, plane_stride, MAX, col_tile, rows, num_rows, most * LN_2)


@triton.jit
def weights_kernel(
    x_ptr,  # (num_rows, dim) unit rows
    y_ptr,  # (num_cols, dim) unit rows
    log_factor_ptr,  # (num_rows,)
    weights_ptr,  # out (num_rows, num_cols), 0 on the diagonal
    hardest_ptr,  # out (column tiles, num_rows)
    nearest_ptr,  # out (column tiles, num_rows) int32
    sums_ptr,  # out (column tiles, num_rows) Σ of what is stored
    num_rows,
    num_cols,
    dim,
    first_own,  # the column that the first row leaves out
    weights_stride,
    parameter,
    WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    row_tile, col_tile, rows, cols, s = tile_of_products(
        tl.program_id(0), x_ptr, y_ptr, num_rows, num_cols, dim,
        PRECISION, False, BLOCK_ROWS, BLOCK_COLS, BLOCK_DEPTH, BAND,
    )  # fmt: skip
    inside = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    counts = inside & (cols[None, :] != (first_own + rows)[:, None])
    store_largest(hardest_ptr, nearest_ptr, col_tile, rows, num_rows, s, counts, cols, 1)
    log_factor = tl.load(log_factor_ptr + tl.minimum(rows, num_rows - 1))
    weights = tl.where(counts, weight_of(s, log_factor[:, None], parameter, WEIGHT), 0.0)
    store_sums(sums_ptr, 0, 0, col_tile, rows, num_rows, tl.sum(weights, axis=1))
    weights_ptrs = (weights_ptr + rows.to(tl.int64) * weights_stride)[:, None] + cols[None, :]
    tl.store(weights_ptrs, weights, mask=inside)


@triton.jit
def sum_by_target_kernel(
    x_ptr,  # (num_rows, dim)
    factor_ptr,  # (num_rows,)
    order_ptr,  # (num_rows,) int64 the rows in the order of their targets
    begin_ptr,  # (num_targets + 1,) int64: those of target i are order[begin[i] : begin[i + 1]]
    sums_ptr,  # out (num_targets, dim)
    num_targets,
    dim,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """``Σ factor_i x_i`` over the rows of each target, in their order."""
    targets = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = targets < num_targets
    begin = tl.load(begin_ptr + targets, mask=inside, other=0)
    count = tl.load(begin_ptr + targets + 1, mask=inside, other=0) - begin
    total = tl.zeros((BLOCK_ROWS, BLOCK_DIM), dtype=tl.float32)
    for i in range(0, tl.max(count, axis=0)):
        exists = inside & (i < count)
        row = tl.load(order_ptr + begin + i, mask=exists, other=0)
        factor = tl.load(factor_ptr + row, mask=exists, other=0.0)
        total += load_rows(x_ptr, row, exists, dim, BLOCK_DIM) * factor[:, None]
    store_rows(sums_ptr, targets, inside, dim, total, BLOCK_DIM)


@dataclass(frozen=True)
class Largest:
    """What each tile finds the largest along its rows, or its columns, beside what the others find."""

    value: Tensor  # (tiles, N) float32, NaN where there is one
    place: Tensor  # (tiles, N) int32, the first where it is

    @staticmethod
    def unknown(tiles: int, count: int, device: torch.device) -> "Largest":
        return Largest(
            torch.empty(tiles, count, dtype=torch.float32, device=device),
            torch.empty(tiles, count, dtype=torch.int32, device=device),
        )


def statistics(
    x: Tensor,  # (R, D)
    y: Tensor,  # (N, D)
    tile: Tile,
    first_row: int,  # the row of y that x's first is not compared with
    by_row: Largest,  # out (column tiles, R)
    by_column: Largest | None,  # out (row tiles, N)
    partials: Tensor | None,  # out (2, column tiles, R) float32: Σ exp(s/τ − max), max s/τ
    temperature: float,
    *,
    precision: str,
) -> None:
    """The largest similarities off the diagonal and where they are, and the parts of log-sum-exp."""
    num_rows, num_cols = x.shape[0], y.shape[0]
    statistics_kernel[(num_tiles(num_rows, num_cols, tile),)](
        x_ptr=x,
        y_ptr=y,
        hardest_ptr=by_row.value,
        nearest_ptr=by_row.place,
        column_hardest_ptr=None if by_column is None else by_column.value,
        column_index_ptr=None if by_column is None else by_column.place,
        partials_ptr=partials,
        num_rows=num_rows,
        num_cols=num_cols,
        dim=x.shape[1],
        first_own=first_row,
        plane_stride=0 if partials is None else partials.stride(0),
        temperature=temperature,
        HAS_COLUMNS=by_column is not None,
        HAS_LSE=partials is not None,
        PRECISION=precision,
        BAND=tile.band,
        **tile.blocks(),
    )


def weights(
    x: Tensor,  # (R, D)
    y: Tensor,  # (N, D)
    tile: Tile,
    first_row: int,  # the row of y that x's first is not compared with
    weight: str,  # a name in WEIGHTS
    parameter: float,
    log_factor: Tensor,  # (R,)
    out: Tensor,  # (R, N) with unit stride along the columns
    by_row: Largest,  # out (column tiles, R)
    sums: Tensor,  # out (column tiles, R) float32
    *,
    precision: str,
) -> None:
    """``out = exp(−log_factor) · weight(s)``, 0 on the diagonal, its sums by row, and the largest similarities."""
    num_rows, num_cols = x.shape[0], y.shape[0]
    weights_kernel[(num_tiles(num_rows, num_cols, tile),)](
        x_ptr=x,
        y_ptr=y,
        log_factor_ptr=log_factor,
        weights_ptr=out,
        hardest_ptr=by_row.value,
        nearest_ptr=by_row.place,
        sums_ptr=sums,
        num_rows=num_rows,
        num_cols=num_cols,
        dim=x.shape[1],
        first_own=first_row,
        weights_stride=out.stride(0),
        parameter=parameter,
        WEIGHT=WEIGHTS[weight].value,
        PRECISION=precision,
        BAND=tile.band,
        **tile.blocks(),
    )


def sum_by_target(x: Tensor, factor: Tensor, order: Tensor, begin: Tensor) -> Tensor:
    """``Σ factor_i x_i`` over the rows that go to each target, added up in their order: (T, D) float32.

    x is (N, D), factor (N,); target t's rows are those that ``order[begin[t] : begin[t + 1]]`` names, (N,) and (T + 1,)
    int64. All contiguous.
    """
    sums = torch.empty(len(begin) - 1, x.shape[1], dtype=torch.float32, device=x.device)
    tile = row_tile(x.shape[1])
    sum_by_target_kernel[row_grid(sums, tile)](x, factor, order, begin, sums, *sums.shape, **tile.options())
    return sums
