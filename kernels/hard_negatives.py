"""The k largest similarities of each row, found while tiles of columns stream by.

A similarity and its column are one 64-bit key: the float's bits, made to rise with its value, above the columns counted
down. Keys are all different, and larger ones are better in the order of the result: larger similarities, then lower
columns. So whatever the order of the comparisons, the result is the same.
"""

# ruff: noqa: N803
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from hicl_fast.kernels.cosine_tile import (
    EXCLUDED,
    POSITIVE,
    Similarities,
    same_group,
    similarities,
    special_columns,
    tile_for,
)
from hicl_fast.kernels.rows import Rows
from hicl_fast.kernels.tiles import HARD_NEGATIVES, Tile, similarity_tile
from torch import Tensor

if TYPE_CHECKING:
    from hicl_fast.ops.info_nce.problem import KindOfColumn

NO_VALUE = -(1 << 31)  # a key's upper half where there is no column: below those of all floats

FEWEST_KEPT = 16


def kept(k: int) -> int:
    """How many keys a row keeps: a power of two, as the sizes of tensors in Triton are."""
    return max(FEWEST_KEPT, 1 << (k - 1).bit_length())


def hard_negatives_tile(arch: str, operand: str, k: int, can_describe: bool = False) -> Tile:
    """The tile where each row keeps k keys beside it: fewer rows for many keys, so that all stays in registers."""
    return for_many(similarity_tile(arch, operand, HARD_NEGATIVES, can_describe), k)


def for_many(tile: Tile, k: int) -> Tile:
    return tile if kept(k) <= 64 else replace(tile, rows=min(16, tile.rows))


@triton.jit
def keys_of(s, cols):
    """(BLOCK_ROWS, BLOCK_COLS) int64. NaN comes before all numbers, and −0 is 0."""
    bits = tl.where(s == 0.0, 0.0, s).to(tl.int32, bitcast=True)
    rising = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    rising = tl.where(s == s, rising, 0x7FFFFFFF)
    return (rising.to(tl.int64) << 32) | (0x7FFFFFFF - cols).to(tl.int64)[None, :]


@triton.jit
def hard_negatives_kernel(
    query,  # (num_rows, dim)
    key,  # (num_cols, dim)
    query_inverse_ptr,  # (num_rows,)
    key_inverse_ptr,  # (num_cols,)
    special_ptr,  # (num_rows,) int64 the column that is left out
    query_group_ptr,  # (num_rows,) int64
    key_group_ptr,  # (num_cols,) int64
    best_ptr,  # out (num_rows, parts, KEPT) int64 keys in any order; NO_VALUE above in the places left over
    num_rows,
    num_cols,
    dim,
    part_cols,  # columns of a part
    parts,
    SPECIAL: tl.constexpr,
    GROUPS: tl.constexpr,
    RELATIONS: tl.constexpr,
    KEPT: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """A program goes through one part of the columns for one tile of rows."""
    first_row = tl.program_id(0) * BLOCK_ROWS
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    part = tl.program_id(1)
    end = tl.minimum((part + 1) * part_cols, num_cols)
    no_key = tl.full((), -9223372036854775808, dtype=tl.int64)
    places = tl.arange(0, KEPT).to(tl.int64)
    best = tl.zeros((BLOCK_ROWS, KEPT), dtype=tl.int64) + (no_key + places)[None, :]  # different, to be replaced singly
    for start in range(part * part_cols, end, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        s = similarities(
            query, key, query_inverse_ptr, key_inverse_ptr, first_row, start, num_rows, num_cols, dim,
            BLOCK_ROWS, BLOCK_COLS, BLOCK_DEPTH, PRECISION, DESCRIBED,
        )  # fmt: skip
        counts = (cols < end)[None, :]
        if SPECIAL == POSITIVE:
            counts = counts & (cols[None, :] != special_columns(special_ptr, rows, num_rows)[:, None])
        if GROUPS == EXCLUDED:
            counts = counts & (
                same_group(query_group_ptr, key_group_ptr, rows, cols, num_rows, num_cols, RELATIONS) == 0
            )
        keys = tl.where(counts, keys_of(s, cols), no_key)
        # Each row's best new key takes the place of its worst kept one, while that is a gain for any row: seldom more
        # than a few times, once some tiles have gone by.
        top, worst = tl.max(keys, axis=1), tl.min(best, axis=1)
        while tl.max((top > worst).to(tl.int32), axis=0) > 0:
            best = tl.where((best == worst[:, None]) & (top > worst)[:, None], top[:, None], best)
            keys = tl.where(keys == top[:, None], no_key, keys)
            top, worst = tl.max(keys, axis=1), tl.min(best, axis=1)
    best_ptrs = best_ptr + ((rows.to(tl.int64) * parts + part) * KEPT)[:, None] + places[None, :]
    tl.store(best_ptrs, best, mask=(rows < num_rows)[:, None])


_PROGRAMS = 512  # enough for every multiprocessor; the columns are cut into parts where the rows make fewer
_FEWEST_TILES = 4  # of a part


def hardest(
    query: Rows,  # (N, D)
    key: Rows,  # (C, D)
    columns: "KindOfColumn",  # the keys' rules
    k: int,
    precision: str,
    tile: Tile | None = None,  # None: the table's
) -> Tensor:  # (N, k) int64
    """Each row's k largest keys, falling."""
    num_rows, num_kept = query.x.shape[0], kept(k)
    tile = for_many(tile or tile_for([query.operand, key.operand], precision, HARD_NEGATIVES), k)
    row_tiles, col_tiles = triton.cdiv(num_rows, tile.rows), triton.cdiv(key.x.shape[0], tile.cols)
    tiles_per_part = min(col_tiles, max(_FEWEST_TILES, triton.cdiv(col_tiles * row_tiles, _PROGRAMS)))
    parts = triton.cdiv(col_tiles, tiles_per_part)
    best = torch.empty(num_rows, parts * num_kept, dtype=torch.int64, device=query.x.device)
    hard_negatives_kernel[(row_tiles, parts)](
        best_ptr=best,
        part_cols=tiles_per_part * tile.cols,
        parts=parts,
        KEPT=num_kept,
        **Similarities(query, key, columns, slice(None), tile, precision).arguments(),
        **tile.blocks(),
    )
    return best.topk(k, dim=1).values
