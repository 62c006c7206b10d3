"""InfoNCE over tiles of scaled cosine similarities ℓ = scale · (q·k) / (‖q‖ ‖k‖), and what a row's sums come to.

Three kernels over the same tile: ``statistics_kernel`` keeps sums only, ``exp_kernel`` stores exp(ℓ − offset), and
``similarity_gradient_kernel`` stores ∂loss/∂ℓ where that is no product of a row's factor and exp(ℓ − offset). There is a
program a tile or, with PERSISTENT, one a multiprocessor: then a tile's operands are on their way while the one before it
ends.

The others work on a few numbers a row, each in place of a dozen of PyTorch's launches: ``exp_rows_kernel`` goes from the
sums of a single sweep to losses, factors and the rows times their factors; ``log_sum_kernel`` and ``loss_rows_kernel`` come
between two sweeps.

The positive never takes part, since rounding it would drown the gradient of a small loss.

A tile works on y = q·k / ‖k‖ in place of the similarity: 1 / ‖q‖ is left to the row's factor of the exponent and to the
row's sums. What every element costs is what a tile's end costs, so it is little.
"""

# ruff: noqa: N803
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from hicl_fast.kernels.cosine_tile import (
    LN_2,
    LOG2_E,
    NOTHING,
    OWN_NEGATIVE,
    POSITIVES,
    Similarities,
    above_limit,
    has_left_out,
    inverses,
    leave_out,
    leave_out_listed,
    same_group,
    special_columns,
    store_sums,
    sum_of_exp2,
    tile_of_products,
)
from hicl_fast.kernels.rows import Rows, load_rows, row_grid, scaled_unit, store_rows
from hicl_fast.kernels.tiles import row_tile
from torch import Tensor

# The sums by row that a kernel leaves, (plane, column tile, row): their planes, and those planes' names.
EXP_SUM = tl.constexpr(0)  # Σ exp(ℓ − offset)
HARDEST = tl.constexpr(1)  # max s
DOT = tl.constexpr(2)  # Σ s · what is stored
MAX = tl.constexpr(2)  # max ℓ
POSITIVES_SHIFT = tl.constexpr(3)  # Σ ℓ − the target's ℓ, over the further positives
EXP_PLANES = ("exp_sum", "hardest", "dot")
STATISTICS_PLANES = ("exp_sum", "hardest", "max", "positives_shift")

# One loop over tiles and depth lets a tile's loads start before the one before it ends. With Triton 3.6 that was measured
# to be faster (1.62 ms instead of 1.78, see kernels/tiles.py); later ones then spill.
FLATTENS = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7))

TINY = tl.constexpr(2.0**-126)  # the smallest number that isn't taken for 0


@triton.jit
def tile_of_similarities(
    program,
    query,  # (num_rows, dim)
    key,  # (num_cols, dim)
    query_inverse_ptr,
    key_inverse_ptr,
    special_ptr,
    num_rows,
    num_cols,
    dim,
    SPECIAL: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    """A program's tile: its place, rows and columns; y = q·k / ‖k‖ of all of them; its rows' 1 / ‖q‖ and special columns."""
    row_tile, col_tile, rows, cols, total = tile_of_products(
        program, query, key, num_rows, num_cols, dim,
        PRECISION, DESCRIBED, BLOCK_ROWS, BLOCK_COLS, BLOCK_DEPTH, BAND,
    )  # fmt: skip
    y = total * inverses(key_inverse_ptr, cols, num_cols)[None, :]
    query_inverse = inverses(query_inverse_ptr, rows, num_rows)
    special = rows
    if SPECIAL != NOTHING:
        special = special_columns(special_ptr, rows, num_rows)
    return row_tile, col_tile, rows, cols, y, query_inverse, special


@triton.jit
def exponents(
    y,  # (BLOCK_ROWS, BLOCK_COLS)
    query_inverse,  # (BLOCK_ROWS,)
    scale_ptr,
    shift,  # (BLOCK_ROWS, 1), in powers of 2
    cols,
    special,
    bias,
    hardness,
    SPECIAL: tl.constexpr,
    HARDENED: tl.constexpr,
):
    """log2 e · ℓ − shift: the powers of 2 of a tile's exponentials, (BLOCK_ROWS, BLOCK_COLS)."""
    scale = tl.load(scale_ptr)
    if HARDENED:  # always added, it would take registers
        scale += hardness
    factor = query_inverse * (scale * LOG2_E)
    factor = tl.where(factor == 0.0, TINY, factor)  # of a zero row: −∞ times 0 is no number
    x = y * factor[:, None] - shift
    if SPECIAL == OWN_NEGATIVE:
        x += tl.where(cols[None, :] == special[:, None], bias * LOG2_E, 0.0)
    return x


@triton.jit
def store_hardest(partials_ptr, plane_stride, col_tile, rows, num_rows, y, query_inverse):
    """The largest similarity of each row; −inf where there is none."""
    most = tl.max(y, axis=1)
    hardest = tl.where(most == float("-inf"), most, most * query_inverse)
    store_sums(partials_ptr, plane_stride, HARDEST, col_tile, rows, num_rows, hardest)


@triton.jit
def store_tile(
    out,
    out_stride,
    row_tile,
    col_tile,
    rows,
    cols,
    num_rows,
    num_cols,
    values,
    DESCRIBED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    if DESCRIBED:
        out.store([row_tile * BLOCK_ROWS, col_tile * BLOCK_COLS], values.to(out.dtype))
    else:
        ptrs = (out + rows.to(tl.int64) * out_stride)[:, None] + cols[None, :]
        inside = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
        tl.store(ptrs, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def exp_kernel(
    query,  # (num_rows, dim)
    key,  # (num_cols, dim)
    query_inverse_ptr,  # (num_rows,)
    key_inverse_ptr,  # (num_cols,)
    scale_ptr,  # (1,)
    offset_ptr,  # (num_rows,) subtracted from the logits; None: ``offset`` is
    special_ptr,  # (num_rows,) int64
    query_group_ptr,  # (num_rows, RELATIONS) int64
    key_group_ptr,  # (num_cols, RELATIONS) int64
    limit_ptr,  # (num_rows,)
    left_out_ptr,  # columns, int64
    left_out_offsets_ptr,  # (num_rows + 1,) int64: where each row's among them begin
    exp_out,  # out (num_rows, num_cols): amplitude · exp(ℓ − offset), 0 for a column that is left out
    partials_ptr,  # out (3, column tiles, num_rows): EXP_SUM, HARDEST, DOT
    num_rows,
    num_cols,
    dim,
    exp_stride,
    plane_stride,
    offset,
    bias,
    hardness,
    amplitude,
    SPECIAL: tl.constexpr,
    GROUPS: tl.constexpr,
    RELATIONS: tl.constexpr,
    LIMITED: tl.constexpr,
    LISTED: tl.constexpr,
    HARDENED: tl.constexpr,
    WANTS_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BAND: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """Tiles of exp(ℓ − offset), and by row their sums, their products with s, and the largest s."""
    total_tiles = tl.cdiv(num_rows, BLOCK_ROWS) * tl.cdiv(num_cols, BLOCK_COLS)
    for program in tl.range(tl.program_id(0), total_tiles, tl.num_programs(0), flatten=FLATTENS and PERSISTENT):
        row_tile, col_tile, rows, cols, y, query_inverse, special = tile_of_similarities(
            program, query, key, query_inverse_ptr, key_inverse_ptr, special_ptr, num_rows, num_cols, dim,
            SPECIAL, PRECISION, DESCRIBED, BLOCK_ROWS, BLOCK_COLS, BLOCK_DEPTH, BAND,
        )  # fmt: skip
        some = has_left_out(row_tile, col_tile, special, num_rows, num_cols, SPECIAL, False, BLOCK_ROWS, BLOCK_COLS)
        y = leave_out(
            y, float("-inf"), some, rows, cols, special, query_group_ptr, key_group_ptr, num_rows, num_cols,
            SPECIAL, GROUPS, RELATIONS, False,
        )  # fmt: skip
        if LIMITED:
            above = above_limit(
                y, query_inverse, limit_ptr, query_group_ptr, key_group_ptr, rows, cols, num_rows, num_cols,
                GROUPS, RELATIONS,
            )  # fmt: skip
            y = tl.where(above, float("-inf"), y)
        if LISTED:
            y = leave_out_listed(y, left_out_ptr, left_out_offsets_ptr, rows, cols, num_rows)
        store_hardest(partials_ptr, plane_stride, col_tile, rows, num_rows, y, query_inverse)

        shift = offset * LOG2_E - tl.log2(amplitude)
        if offset_ptr is not None:
            of_row = tl.load(offset_ptr + tl.minimum(rows, num_rows - 1))
            # −∞ is that of a row that has nothing but left-out columns.
            shift = (shift + tl.where(of_row == float("-inf"), 0.0, of_row) * LOG2_E)[:, None]
        e = tl.exp2(exponents(y, query_inverse, scale_ptr, shift, cols, special, bias, hardness, SPECIAL, HARDENED))
        store_sums(partials_ptr, plane_stride, EXP_SUM, col_tile, rows, num_rows, tl.sum(e, axis=1) / amplitude)
        if WANTS_DOT:
            dot = tl.sum(tl.where(e == 0.0, 0.0, e * y), axis=1) * query_inverse / amplitude
            store_sums(partials_ptr, plane_stride, DOT, col_tile, rows, num_rows, dot)
        store_tile(
            exp_out, exp_stride, row_tile, col_tile, rows, cols, num_rows, num_cols, e,
            DESCRIBED, BLOCK_ROWS, BLOCK_COLS,
        )  # fmt: skip


def exp_similarities(
    similarities: Similarities,  # R × C
    scale: Tensor,  # (1,)
    offset: Tensor | float,  # (R,), or one for all
    out: Tensor,  # (R, C) with unit stride along the columns
    partials: Tensor,  # (3, column tiles, R) float32; planes as in EXP_PLANES
    *,
    amplitude: float,
    wants_dot: bool,
) -> None:
    """``out = amplitude · exp(ℓ − offset)`` and its sums by row."""
    by_row = isinstance(offset, Tensor)
    exp_kernel[similarities.grid](
        scale_ptr=scale,
        offset_ptr=offset if by_row else None,
        offset=0.0 if by_row else offset,
        exp_out=similarities.output(out),
        partials_ptr=partials,
        exp_stride=out.stride(0),
        plane_stride=partials.stride(0),
        **similarities.added(),
        amplitude=amplitude,
        WANTS_DOT=wants_dot,
        **similarities.arguments(),
        **similarities.limited(),
        **similarities.listed(),
        **similarities.tile.options(),
    )


@triton.jit
def statistics_kernel(
    query,  # (num_rows, dim)
    key,  # (num_cols, dim)
    query_inverse_ptr,  # (num_rows,)
    key_inverse_ptr,  # (num_cols,)
    scale_ptr,  # (1,)
    special_ptr,  # (num_rows,) int64
    query_group_ptr,  # (num_rows, RELATIONS) int64
    key_group_ptr,  # (num_cols, RELATIONS) int64
    limit_ptr,  # (num_rows,)
    left_out_ptr,  # columns, int64
    left_out_offsets_ptr,  # (num_rows + 1,) int64: where each row's among them begin
    positive_logit_ptr,  # (num_rows,)
    partials_ptr,  # out (4, column tiles, num_rows): EXP_SUM, HARDEST, MAX, POSITIVES_SHIFT
    column_partials_ptr,  # out (2, row tiles, num_cols): Σ exp(ℓ − max), max, down the columns
    num_rows,
    num_cols,
    dim,
    plane_stride,
    column_plane_stride,
    bias,
    hardness,
    SPECIAL: tl.constexpr,
    GROUPS: tl.constexpr,
    RELATIONS: tl.constexpr,
    LIMITED: tl.constexpr,
    LISTED: tl.constexpr,
    HARDENED: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BAND: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """What one tile adds to its rows' (and columns') log-sum-exp. Stores no similarity."""
    total_tiles = tl.cdiv(num_rows, BLOCK_ROWS) * tl.cdiv(num_cols, BLOCK_COLS)
    for program in tl.range(tl.program_id(0), total_tiles, tl.num_programs(0), flatten=FLATTENS and PERSISTENT):
        row_tile, col_tile, rows, cols, y, query_inverse, special = tile_of_similarities(
            program, query, key, query_inverse_ptr, key_inverse_ptr, special_ptr, num_rows, num_cols, dim,
            SPECIAL, PRECISION, DESCRIBED, BLOCK_ROWS, BLOCK_COLS, BLOCK_DEPTH, BAND,
        )  # fmt: skip
        some = has_left_out(row_tile, col_tile, special, num_rows, num_cols, SPECIAL, True, BLOCK_ROWS, BLOCK_COLS)
        y = leave_out(
            y, float("-inf"), some, rows, cols, special, query_group_ptr, key_group_ptr, num_rows, num_cols,
            SPECIAL, GROUPS, RELATIONS, True,
        )  # fmt: skip
        if LIMITED:
            above = above_limit(
                y, query_inverse, limit_ptr, query_group_ptr, key_group_ptr, rows, cols, num_rows, num_cols,
                GROUPS, RELATIONS,
            )  # fmt: skip
            y = tl.where(above, float("-inf"), y)
        if LISTED:
            y = leave_out_listed(y, left_out_ptr, left_out_offsets_ptr, rows, cols, num_rows)
        x = exponents(y, query_inverse, scale_ptr, 0.0, cols, special, bias, hardness, SPECIAL, HARDENED)
        if GROUPS == POSITIVES:
            in_group = same_group(query_group_ptr, key_group_ptr, rows, cols, num_rows, num_cols, RELATIONS)
            positive_logit = tl.load(positive_logit_ptr + tl.minimum(rows, num_rows - 1))
            is_positive = in_group & (y != float("-inf"))
            shift = tl.sum(tl.where(is_positive, x * LN_2 - positive_logit[:, None], 0.0), axis=1)
            store_sums(partials_ptr, plane_stride, POSITIVES_SHIFT, col_tile, rows, num_rows, shift)
            y = tl.where(in_group, float("-inf"), y)

        store_hardest(partials_ptr, plane_stride, col_tile, rows, num_rows, y, query_inverse)
        most, total = sum_of_exp2(x, 1)
        store_sums(partials_ptr, plane_stride, MAX, col_tile, rows, num_rows, most * LN_2)
        store_sums(partials_ptr, plane_stride, EXP_SUM, col_tile, rows, num_rows, total)
        if HAS_COLUMNS:
            most, total = sum_of_exp2(x, 0)
            store_sums(column_partials_ptr, column_plane_stride, 0, row_tile, cols, num_cols, total)
            store_sums(column_partials_ptr, column_plane_stride, 1, row_tile, cols, num_cols, most * LN_2)


def statistics(
    similarities: Similarities,  # R × C
    scale: Tensor,  # (1,)
    positive_logit: Tensor | None,  # (R,) where there are several positives
    partials: Tensor,  # (4, column tiles, R) float32; planes as in STATISTICS_PLANES
    column_partials: Tensor | None,  # (2, row tiles, C) float32: Σ exp(ℓ − max), max
) -> None:
    """Sums by row, and by column where they are asked for; nothing of size R × C is kept."""
    statistics_kernel[similarities.grid](
        scale_ptr=scale,
        positive_logit_ptr=positive_logit,
        partials_ptr=partials,
        column_partials_ptr=column_partials,
        plane_stride=partials.stride(0),
        column_plane_stride=0 if column_partials is None else column_partials.stride(0),
        **similarities.added(),
        HAS_COLUMNS=column_partials is not None,
        **similarities.arguments(),
        **similarities.limited(),
        **similarities.listed(),
        **similarities.tile.options(),
    )


@triton.jit
def similarity_gradient_kernel(
    query,  # (num_rows, dim)
    key,  # (num_cols, dim)
    query_inverse_ptr,  # (num_rows,)
    key_inverse_ptr,  # (num_cols,)
    scale_ptr,  # (1,)
    row_offset_ptr,  # (num_rows,)
    row_factor_ptr,  # (num_rows,)
    positives_share_ptr,  # (num_rows,) subtracted at the further positives
    column_offset_ptr,  # (num_cols,)
    column_factor_ptr,  # (num_cols,)
    special_ptr,  # (num_rows,) int64
    query_group_ptr,  # (num_rows, RELATIONS) int64
    key_group_ptr,  # (num_cols, RELATIONS) int64
    limit_ptr,  # (num_rows,)
    gradient_out,  # out (num_rows, num_cols)
    dot_ptr,  # out (column tiles, num_rows): Σ s · gradient
    num_rows,
    num_cols,
    dim,
    gradient_stride,
    bias,
    hardness,
    SPECIAL: tl.constexpr,
    GROUPS: tl.constexpr,
    RELATIONS: tl.constexpr,
    LIMITED: tl.constexpr,
    HARDENED: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    WANTS_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BAND: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """One tile of ∂loss/∂ℓ: the row's softmax, the column's where the loss is symmetric, less the positives' share."""
    total_tiles = tl.cdiv(num_rows, BLOCK_ROWS) * tl.cdiv(num_cols, BLOCK_COLS)
    for program in tl.range(tl.program_id(0), total_tiles, tl.num_programs(0), flatten=FLATTENS and PERSISTENT):
        row_tile, col_tile, rows, cols, y, query_inverse, special = tile_of_similarities(
            program, query, key, query_inverse_ptr, key_inverse_ptr, special_ptr, num_rows, num_cols, dim,
            SPECIAL, PRECISION, DESCRIBED, BLOCK_ROWS, BLOCK_COLS, BLOCK_DEPTH, BAND,
        )  # fmt: skip
        some = has_left_out(row_tile, col_tile, special, num_rows, num_cols, SPECIAL, False, BLOCK_ROWS, BLOCK_COLS)
        x = exponents(y, query_inverse, scale_ptr, 0.0, cols, special, bias, hardness, SPECIAL, HARDENED)
        row = tl.minimum(rows, num_rows - 1)
        row_shift, row_factor = tl.load(row_offset_ptr + row) * LOG2_E, tl.load(row_factor_ptr + row)
        gradient = tl.exp2(x - row_shift[:, None]) * row_factor[:, None]
        if HAS_COLUMNS:
            col = tl.minimum(cols, num_cols - 1)
            column_shift, column_factor = tl.load(column_offset_ptr + col) * LOG2_E, tl.load(column_factor_ptr + col)
            gradient += tl.exp2(x - column_shift[None, :]) * column_factor[None, :]
        if LIMITED:
            above = above_limit(
                y, query_inverse, limit_ptr, query_group_ptr, key_group_ptr, rows, cols, num_rows, num_cols,
                GROUPS, RELATIONS,
            )  # fmt: skip
            gradient = tl.where(above, 0.0, gradient)
        if GROUPS == POSITIVES:
            in_group = same_group(query_group_ptr, key_group_ptr, rows, cols, num_rows, num_cols, RELATIONS)
            gradient -= tl.where(in_group, tl.load(positives_share_ptr + row)[:, None], 0.0)
        gradient = leave_out(
            gradient, 0.0, some, rows, cols, special, query_group_ptr, key_group_ptr, num_rows, num_cols,
            SPECIAL, GROUPS, RELATIONS, False,
        )  # fmt: skip
        if WANTS_DOT:
            dot = tl.sum(gradient * y, axis=1) * query_inverse
            store_sums(dot_ptr, 0, 0, col_tile, rows, num_rows, dot)
        store_tile(
            gradient_out, gradient_stride, row_tile, col_tile, rows, cols, num_rows, num_cols, gradient,
            DESCRIBED, BLOCK_ROWS, BLOCK_COLS,
        )  # fmt: skip


def similarity_gradients(
    similarities: Similarities,  # R × C
    scale: Tensor,  # (1,)
    by_row: tuple[Tensor, Tensor],  # offset and factor, (R,) each
    by_column: tuple[Tensor, Tensor] | None,  # offset and factor, (C,) each
    positives_share: Tensor | None,  # (R,)
    out: Tensor,  # (R, C) with unit stride along the columns
    dot: Tensor,  # (column tiles, R) float32
    *,
    wants_dot: bool,
) -> None:
    """``out = Σ factor · exp(ℓ − offset)`` over row and column, less the share of the further positives."""
    column_offset, column_factor = by_column or (None, None)
    similarity_gradient_kernel[similarities.grid](
        scale_ptr=scale,
        row_offset_ptr=by_row[0],
        row_factor_ptr=by_row[1],
        positives_share_ptr=positives_share,
        column_offset_ptr=column_offset,
        column_factor_ptr=column_factor,
        gradient_out=similarities.output(out),
        dot_ptr=dot,
        gradient_stride=out.stride(0),
        **similarities.added(),
        HAS_COLUMNS=by_column is not None,
        WANTS_DOT=wants_dot,
        **similarities.arguments(),
        **similarities.limited(),
        **similarities.tile.options(),
    )


@triton.jit
def log_sum_kernel(
    total_ptr,  # (num_tiles, num_rows): each tile's Σ exp(ℓ − most)
    most_ptr,  # (num_tiles, num_rows)
    hardest_ptr,  # (num_tiles, num_rows), or None
    lse_ptr,  # out (num_rows,); with ADDS, what it holds is one of the sums
    hardest_out,  # out (num_rows,)
    num_rows,
    num_tiles,
    ADDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """log Σ exp(ℓ) of all tiles, and the largest of what they found hardest."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < num_rows
    most = tl.zeros((BLOCK_ROWS,), dtype=tl.float32) + float("-inf")
    total = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    hardest = most
    if ADDS:
        most = tl.load(lse_ptr + rows, mask=inside, other=float("-inf"))
        total += 1.0
    for first in range(0, num_tiles, BLOCK_TILES):
        tiles = first + tl.arange(0, BLOCK_TILES)
        mask = (tiles < num_tiles)[:, None] & inside[None, :]
        at = tiles.to(tl.int64)[:, None] * num_rows + rows[None, :]
        of_tiles = tl.load(most_ptr + at, mask=mask, other=float("-inf"))
        before, most = most, tl.maximum(most, tl.max(of_tiles, axis=0))
        shift = tl.where(most == float("-inf"), 0.0, most)  # −∞ − −∞ is no number
        parts = tl.load(total_ptr + at, mask=mask, other=0.0) * tl.exp(of_tiles - shift[None, :])
        total = total * tl.exp(before - shift) + tl.sum(parts, axis=0)
        if hardest_ptr is not None:
            of_tiles = tl.load(hardest_ptr + at, mask=mask, other=float("-inf"))
            hardest = tl.maximum(hardest, tl.max(of_tiles, axis=0))
    tl.store(lse_ptr + rows, tl.log(total) + most, mask=inside)
    if hardest_ptr is not None:
        tl.store(hardest_out + rows, hardest, mask=inside)


_ROWS_OF_SUMS, _TILES_OF_SUMS = 32, 32


def log_sums(
    total: Tensor,  # (T, R) float32
    most: Tensor,  # (T, R) float32
    lse: Tensor,  # (R,) float32
    hardest: tuple[Tensor, Tensor] | None = None,  # (T, R) and where the largest go, (R,)
    *,
    adds: bool = False,
) -> None:
    """``lse = log Σ_t total_t · exp(most_t)`` over the tiles; with ``adds``, what was in it counts too."""
    of_tiles, largest = hardest or (None, None)
    num_tiles, num_rows = total.shape
    log_sum_kernel[(triton.cdiv(num_rows, _ROWS_OF_SUMS),)](
        total, most, of_tiles, lse, largest, num_rows, num_tiles,
        ADDS=adds, BLOCK_ROWS=_ROWS_OF_SUMS, BLOCK_TILES=_TILES_OF_SUMS, num_warps=4,
    )  # fmt: skip


@triton.jit
def log1p_of_fraction(t):
    """``log(1 + t)`` for t from 0 to 1, with the digits of a small one: ``2 artanh z`` as a series, z = t / (2 + t)."""
    z = t / (2.0 + t)
    square = z * z
    series = 1.0 / 17.0
    for power in tl.static_range(15, 0, -2):
        series = series * square + 1.0 / power
    return 2.0 * z * series


@triton.jit
def log1p_exp(x):
    """``log(1 + eˣ)`` with all digits of a small result, and its derivative; NaN stays NaN."""
    t = tl.exp(-tl.abs(x))
    return tl.where(x > 0.0, x, 0.0) + log1p_of_fraction(t), tl.where(x > 0.0, 1.0, t) / (1.0 + t)


@triton.jit
def loss_rows_kernel(
    negative_lse_ptr,  # (num_rows,)
    column_lse_ptr,  # (num_rows,), or None where the loss has one direction
    positive_ptr,  # (num_rows,) similarity of the positive, its margin counted
    scale_ptr,  # (1,)
    loss_grad_ptr,  # (num_rows,), or None: ``row_weight`` for all
    loss_ptr,  # out (num_rows,)
    negative_ptr,  # out (num_rows,) the derivative by negative_lse
    column_ptr,  # out (num_rows,) by column_lse
    positive_out,  # out (num_rows,) by the positive's logit
    num_rows,
    row_weight,
    BLOCK_ROWS: tl.constexpr,
):
    """log(1 + e^(L − p)) of each row, or its mean with the same down the columns, and its derivatives."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < num_rows
    weight = row_weight
    if loss_grad_ptr is not None:
        weight = tl.load(loss_grad_ptr + rows, mask=inside, other=0.0)
    positive_logit = tl.load(positive_ptr + rows, mask=inside, other=0.0) * tl.load(scale_ptr)
    loss, share = log1p_exp(tl.load(negative_lse_ptr + rows, mask=inside, other=0.0) - positive_logit)
    negative = share * weight
    by_positive = negative
    if column_lse_ptr is not None:
        of_column, share = log1p_exp(tl.load(column_lse_ptr + rows, mask=inside, other=0.0) - positive_logit)
        loss, negative, column = (loss + of_column) * 0.5, negative * 0.5, share * (weight * 0.5)
        by_positive = negative + column
        tl.store(column_ptr + rows, column, mask=inside)
    tl.store(loss_ptr + rows, loss, mask=inside)
    tl.store(negative_ptr + rows, negative, mask=inside)
    tl.store(positive_out + rows, -by_positive, mask=inside)


def loss_rows(
    negative_lse: Tensor,  # (N,) float32
    column_lse: Tensor | None,  # (N,) float32; None: a loss in one direction
    positive: Tensor,  # (N,) float32: similarity of the positive, its margin counted
    scale: Tensor,  # (1,)
    weight: Tensor | float,  # (N,) float32, or one for all: what multiplies a row's loss in what is differentiated
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The loss of each row, and the derivatives by negative_lse, column_lse and the positive's logit; (N,) each."""
    loss, negative, by_positive = (torch.empty_like(negative_lse) for _ in range(3))
    column = None if column_lse is None else torch.empty_like(negative_lse)
    loss_grad, row_weight = (weight, 0.0) if isinstance(weight, Tensor) else (None, weight)
    loss_rows_kernel[(triton.cdiv(len(loss), _ROWS_OF_LOSSES),)](
        negative_lse, column_lse, positive, scale, loss_grad, loss, negative, column, by_positive,
        len(loss), row_weight, BLOCK_ROWS=_ROWS_OF_LOSSES, num_warps=4,
    )  # fmt: skip
    return loss, negative, column, by_positive


_ROWS_OF_LOSSES = 128


@triton.jit
def exp_rows_kernel(
    partials_ptr,  # (3, num_tiles, num_rows): EXP_SUM, HARDEST, DOT
    positive_ptr,  # (num_rows,) similarity of the positive, its margin counted
    margin_derivative_ptr,  # (num_rows,) its derivative by the similarity; None: 1
    scale_ptr,  # (1,)
    query_ptr,  # (num_rows, dim)
    query_inverse_ptr,  # (num_rows,)
    scaled_ptr,  # out (num_rows, dim): the unit rows times ∂loss/∂ℓ of what is stored for a negative
    negative_lse_ptr,  # out (num_rows,)
    hardest_ptr,  # out (num_rows,)
    loss_ptr,  # out (num_rows,)
    factor_ptr,  # out (num_rows,): of what is stored for a negative, ∂loss/∂s
    coefficient_ptr,  # out (num_rows,) ∂loss/∂s of the positive
    scale_gradient_ptr,  # out (num_rows,) ∂loss/∂scale
    num_rows,
    num_tiles,
    dim,
    plane_stride,
    offset,  # that was subtracted from every logit
    row_weight,
    HAS_MARGIN: tl.constexpr,
    WANTS_DOT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """With L = log Σ exp(ℓ) over the negatives and p the positive's logit: log(1 + e^(L − p)) and its derivatives."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < num_rows
    exp_sum = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    hardest = tl.zeros((BLOCK_ROWS,), dtype=tl.float32) + float("-inf")
    dot = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for first in range(0, num_tiles, BLOCK_TILES):
        tiles = first + tl.arange(0, BLOCK_TILES)
        mask = (tiles < num_tiles)[:, None] & inside[None, :]
        at = partials_ptr + tiles.to(tl.int64)[:, None] * num_rows + rows[None, :]
        plane = tl.cast(plane_stride, tl.int64)
        exp_sum += tl.sum(tl.load(at + EXP_SUM * plane, mask=mask, other=0.0), axis=0)
        hardest = tl.maximum(hardest, tl.max(tl.load(at + HARDEST * plane, mask=mask, other=float("-inf")), axis=0))
        if WANTS_DOT:
            dot += tl.sum(tl.load(at + DOT * plane, mask=mask, other=0.0), axis=0)

    scale = tl.load(scale_ptr)
    positive = tl.load(positive_ptr + rows, mask=inside, other=0.0)
    positive_logit = positive * scale
    negative_lse = tl.log(exp_sum) + offset
    loss, negative_share = log1p_exp(negative_lse - positive_logit)
    negative_share *= row_weight
    factor = tl.exp(offset - positive_logit - loss) * row_weight
    coefficient = -negative_share * scale
    if HAS_MARGIN:
        coefficient *= tl.load(margin_derivative_ptr + rows, mask=inside, other=0.0)
    tl.store(negative_lse_ptr + rows, negative_lse, mask=inside)
    tl.store(hardest_ptr + rows, hardest, mask=inside)
    tl.store(loss_ptr + rows, loss, mask=inside)
    tl.store(factor_ptr + rows, factor * scale, mask=inside)
    tl.store(coefficient_ptr + rows, coefficient, mask=inside)
    if WANTS_DOT:
        tl.store(scale_gradient_ptr + rows, factor * dot - negative_share * positive, mask=inside)
    query_inverse = tl.load(query_inverse_ptr + rows, mask=inside, other=0.0)
    query = load_rows(query_ptr, rows, inside, dim, BLOCK_DIM)
    store_rows(scaled_ptr, rows, inside, dim, scaled_unit(query, query_inverse, factor), BLOCK_DIM)


_TILES_AT_ONCE = 64


@dataclass(frozen=True)
class RowResults:
    """What a row's sums of exponentials come to, (N,) float32 each."""

    negative_lse: Tensor
    hardest: Tensor
    loss: Tensor
    factor: Tensor  # of the stored exponentials: ∂loss/∂s of a negative
    coefficient: Tensor  # ∂loss/∂s of the positive
    scale_gradient: Tensor | None  # ∂loss/∂scale

    @classmethod
    def unknown(cls, like: Tensor, *, wants_scale: bool) -> "RowResults":
        negative_lse, hardest, loss, factor, coefficient = (torch.empty_like(like) for _ in range(5))
        scale_gradient = torch.empty_like(like) if wants_scale else None
        return cls(negative_lse, hardest, loss, factor, coefficient, scale_gradient)


def exp_rows(
    partials: Tensor,  # (3, column tiles, R) float32; planes as in EXP_PLANES
    positive: Tensor,  # (R,) similarity of the positive, its margin counted
    margin_derivative: Tensor | None,  # (R,) its derivative by the similarity; None: 1
    scale: Tensor,  # (1,)
    offset: float,
    row_weight: float,
    query: Rows,  # (R, D)
    rows: slice,  # which rows of the whole these R are
    out: RowResults,
) -> Tensor:  # (R, D) in the query's type
    """Losses and factors of rows whose exponentials one sweep has stored, and what multiplies these for the columns.

    What is returned are the unit rows times their factor without the scale: of a weight that makes a gradient by ℓ.
    """
    num_rows, dim = query.x.shape
    scaled = torch.empty_like(query.x)
    results = (out.negative_lse, out.hardest, out.loss, out.factor, out.coefficient, out.scale_gradient)
    tile = row_tile(dim)
    exp_rows_kernel[row_grid(query.x, tile)](
        partials, positive, margin_derivative, scale, query.x, query.inverse, scaled,
        *(None if x is None else x[rows] for x in results),
        num_rows, partials.shape[1], dim, partials.stride(0), offset, row_weight,
        HAS_MARGIN=margin_derivative is not None, WANTS_DOT=out.scale_gradient is not None,
        BLOCK_TILES=_TILES_AT_ONCE, **tile.options(),
    )  # fmt: skip
    return scaled
