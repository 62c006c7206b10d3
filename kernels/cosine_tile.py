"""Tiles of products q·k, the cosines they become, and the mask of a kind of column: what every sweep over similarities shares.

The operands are the inputs as they came, not their normalised copies: bfloat16 inputs are multiplied exactly, and the
inverse norms are applied to the float32 sums. ``query`` and ``key`` are pointers or, with DESCRIBED, descriptors of blocks
that the hardware copies. A tile's sums are written beside those of the other tiles: no atomics, so every run gives the same
bits.
"""

# ruff: noqa: N803
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from hicl_fast.kernels.device import architecture, multiprocessors, operand_of
from hicl_fast.kernels.rows import GROW, Rows, is_long
from hicl_fast.kernels.tiles import Tile, similarity_tile
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hicl_fast.ops.common.constants import Groups, Special

if TYPE_CHECKING:
    from hicl_fast.ops.info_nce.problem import KindOfColumn

NOTHING = tl.constexpr(int(Special.NOTHING))
POSITIVE = tl.constexpr(int(Special.POSITIVE))
OWN_NEGATIVE = tl.constexpr(int(Special.OWN_NEGATIVE))

ORDINARY = tl.constexpr(int(Groups.ORDINARY))
EXCLUDED = tl.constexpr(int(Groups.EXCLUDED))
POSITIVES = tl.constexpr(int(Groups.POSITIVES))

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tile_at(program, num_rows, num_cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BAND: tl.constexpr):
    """A program's tile: down a band of rows, then on to the next columns."""
    row_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    col_tiles = tl.cdiv(num_cols, BLOCK_COLS)
    band = program // (BAND * col_tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    in_band = program % (BAND * col_tiles)
    return band * BAND + in_band % height, in_band // height


@triton.jit
def inverse_of_operand(inverse):
    """Of rows that are made shorter where they are long."""
    return inverse * tl.where(is_long(inverse), GROW, 1.0)


@triton.jit
def inverses(inverse_ptr, at, num):
    """1 / ‖x‖ of the rows as products have them."""
    return inverse_of_operand(tl.load(inverse_ptr + tl.minimum(at, num - 1)))


@triton.jit
def products(
    query,  # (num_rows, dim)
    key,  # (num_cols, dim)
    first_row,
    first_col,
    num_rows,
    num_cols,
    dim,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """q·k of a tile, (BLOCK_ROWS, BLOCK_COLS) in float32. What lies past the end is finite where the inputs are."""
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    if DESCRIBED:
        for start in range(0, dim, BLOCK_DEPTH):
            total = tl.dot(
                query.load([first_row, start]), key.load([first_col, start]).T, total, input_precision=PRECISION
            )
        return total
    else:
        row = tl.minimum(first_row + tl.arange(0, BLOCK_ROWS), num_rows - 1).to(tl.int64)
        col = tl.minimum(first_col + tl.arange(0, BLOCK_COLS), num_cols - 1).to(tl.int64)
        depth = tl.arange(0, BLOCK_DEPTH)
        query_ptrs = query + row[:, None] * dim + depth[None, :]
        key_ptrs = key + col[None, :] * dim + depth[:, None]
        for start in range(0, dim, BLOCK_DEPTH):
            inside = depth < dim - start
            of_query = tl.load(query_ptrs, mask=inside[None, :], other=0.0)
            of_key = tl.load(key_ptrs, mask=inside[:, None], other=0.0)
            total = tl.dot(of_query, of_key, total, input_precision=PRECISION)
            query_ptrs += BLOCK_DEPTH
            key_ptrs += BLOCK_DEPTH
        return total


@triton.jit
def tile_of_products(
    program,
    query,  # (num_rows, dim)
    key,  # (num_cols, dim)
    num_rows,
    num_cols,
    dim,
    PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    """A program's tile: its place, its rows (BLOCK_ROWS,) and columns (BLOCK_COLS,), and their q·k."""
    row_tile, col_tile = tile_at(program, num_rows, num_cols, BLOCK_ROWS, BLOCK_COLS, BAND)
    first_row, first_col = row_tile * BLOCK_ROWS, col_tile * BLOCK_COLS
    total = products(
        query, key, first_row, first_col, num_rows, num_cols, dim,
        BLOCK_ROWS, BLOCK_COLS, BLOCK_DEPTH, PRECISION, DESCRIBED,
    )  # fmt: skip
    rows, cols = first_row + tl.arange(0, BLOCK_ROWS), first_col + tl.arange(0, BLOCK_COLS)
    return row_tile, col_tile, rows, cols, total


@triton.jit
def similarities(
    query,  # (num_rows, dim)
    key,  # (num_cols, dim)
    query_inverse_ptr,  # (num_rows,) 1 / ‖q‖
    key_inverse_ptr,  # (num_cols,)
    first_row,
    first_col,
    num_rows,
    num_cols,
    dim,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """Cosines of a tile, (BLOCK_ROWS, BLOCK_COLS) in float32."""
    total = products(
        query, key, first_row, first_col, num_rows, num_cols, dim,
        BLOCK_ROWS, BLOCK_COLS, BLOCK_DEPTH, PRECISION, DESCRIBED,
    )  # fmt: skip
    query_inverse = inverses(query_inverse_ptr, first_row + tl.arange(0, BLOCK_ROWS), num_rows)
    key_inverse = inverses(key_inverse_ptr, first_col + tl.arange(0, BLOCK_COLS), num_cols)
    return total * query_inverse[:, None] * key_inverse[None, :]


@triton.jit
def same_group(query_group_ptr, key_group_ptr, rows, cols, num_rows, num_cols, RELATIONS: tl.constexpr):
    """Whether one of row's and column's ids is the same, (BLOCK_ROWS, BLOCK_COLS)."""
    of_rows = query_group_ptr + tl.minimum(rows, num_rows - 1) * RELATIONS
    of_cols = key_group_ptr + tl.minimum(cols, num_cols - 1) * RELATIONS
    found = tl.load(of_rows)[:, None] == tl.load(of_cols)[None, :]
    for relation in tl.static_range(1, RELATIONS):
        found = found | (tl.load(of_rows + relation)[:, None] == tl.load(of_cols + relation)[None, :])
    return found


@triton.jit
def special_columns(special_ptr, rows, num_rows):
    """Each row's special column, (BLOCK_ROWS,); columns are counted in 32 bits."""
    return tl.load(special_ptr + tl.minimum(rows, num_rows - 1)).to(tl.int32)


@triton.jit
def any_within(special, first_col, BLOCK_COLS: tl.constexpr):
    """Whether any row's special column is in the tile; the same for all its threads."""
    is_here = (special >= first_col) & (special < first_col + BLOCK_COLS)
    return tl.max(is_here.to(tl.int32), axis=0) > 0


@triton.jit
def has_left_out(
    row_tile,
    col_tile,
    special,  # (BLOCK_ROWS,) each row's special column
    num_rows,
    num_cols,
    SPECIAL: tl.constexpr,
    ROWS_TOO: tl.constexpr,  # those past the last as well
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Whether the mask has to look at a tile element by element for positives and for what lies past the end."""
    first_row, first_col = row_tile * BLOCK_ROWS, col_tile * BLOCK_COLS
    found = first_col + BLOCK_COLS > num_cols
    if ROWS_TOO:
        found = (first_row + BLOCK_ROWS > num_rows) | found
    if SPECIAL == POSITIVE:
        found = found | any_within(special, first_col, BLOCK_COLS)
    return found


@triton.jit
def leave_out(
    x,  # (BLOCK_ROWS, BLOCK_COLS)
    FILL: tl.constexpr,  # what stands in place of an element that is left out
    some,  # of ``has_left_out``
    rows,
    cols,
    special,  # (BLOCK_ROWS,)
    query_group_ptr,
    key_group_ptr,
    num_rows,
    num_cols,
    SPECIAL: tl.constexpr,
    GROUPS: tl.constexpr,
    RELATIONS: tl.constexpr,
    ROWS_TOO: tl.constexpr,
):
    """The mask: x without excluded groups, its rows' positives and what lies past the end."""
    if GROUPS == EXCLUDED:  # first: the other way round, a kernel for sm_90 takes up to 49 registers more
        in_group = same_group(query_group_ptr, key_group_ptr, rows, cols, num_rows, num_cols, RELATIONS)
        x = tl.where(in_group, FILL, x)
    if some:
        counts = (cols < num_cols)[None, :]
        if ROWS_TOO:
            counts = counts & (rows < num_rows)[:, None]
        if SPECIAL == POSITIVE:
            counts = counts & (cols[None, :] != special[:, None])
        x = tl.where(counts, x, FILL)
    return x


@triton.jit
def above_limit(
    y,  # (BLOCK_ROWS, BLOCK_COLS) q·k / ‖k‖
    query_inverse,  # (BLOCK_ROWS,)
    limit_ptr,  # (num_rows,)
    query_group_ptr,
    key_group_ptr,
    rows,
    cols,
    num_rows,
    num_cols,
    GROUPS: tl.constexpr,
    RELATIONS: tl.constexpr,
):
    """Whether a column is too similar for a negative, (BLOCK_ROWS, BLOCK_COLS)."""
    limit = tl.load(limit_ptr + tl.minimum(rows, num_rows - 1))
    above = y * query_inverse[:, None] > limit[:, None]
    if GROUPS == POSITIVES:
        above = above & (same_group(query_group_ptr, key_group_ptr, rows, cols, num_rows, num_cols, RELATIONS) == 0)
    return above


@triton.jit
def leave_out_listed(y, left_out_ptr, left_out_offsets_ptr, rows, cols, num_rows):
    """y (BLOCK_ROWS, BLOCK_COLS) with −∞ at the columns that the rows' lists name."""
    row = tl.minimum(rows, num_rows - 1)
    first = tl.load(left_out_offsets_ptr + row)
    count = tl.load(left_out_offsets_ptr + row + 1) - first
    for place in range(0, tl.max(count, axis=0)):
        column = tl.load(left_out_ptr + first + place, mask=place < count, other=-1).to(tl.int32)
        y = tl.where(cols[None, :] == column[:, None], float("-inf"), y)
    return y


@triton.jit
def store_sums(partials_ptr, plane_stride, plane, col_tile, rows, num_rows, values):
    at = partials_ptr + tl.cast(plane_stride, tl.int64) * plane + col_tile.to(tl.int64) * num_rows + rows
    tl.store(at, values, mask=rows < num_rows)


@triton.jit
def sum_of_exp2(x, AXIS: tl.constexpr):
    """The maximum m of the powers, −inf where there is none, and Σ 2^(x − m)."""
    most = tl.max(x, axis=AXIS)
    reference = tl.where(most == float("-inf"), 0.0, most)
    return most, tl.sum(tl.exp2(x - tl.expand_dims(reference, AXIS)), axis=AXIS)


def tile_for(operands: list[Tensor], precision: str, use: str) -> Tile:
    """The tile for similarities of vectors (N, D) of one type, multiplied in ``precision`` ("ieee" or "tf32").

    ``use`` is one of kernels/tiles.py's.
    """
    x = operands[0]
    can_describe = x.shape[1] * x.element_size() % 16 == 0 and all(x.data_ptr() % 16 == 0 for x in operands)
    return similarity_tile(architecture(x.device), operand_of(x, precision), use, can_describe)


def num_tiles(num_rows: int, num_cols: int, tile: Tile) -> int:
    return triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_cols, tile.cols)


@dataclass(frozen=True)
class Similarities:
    """Rows against a kind of column: what a launch over tiles of their similarities takes."""

    query: Rows  # (R, D)
    key: Rows  # (C, D) the columns' vectors
    columns: (
        "KindOfColumn"  # their rules; special column (N,) and groups (N, G) of the rows, of which these R are ``rows``
    )
    rows: slice
    tile: Tile
    precision: str  # of the products: "ieee" | "tf32"
    limit: Tensor | None = None  # (N,) likewise: what is more similar is left out

    @property
    def grid(self) -> tuple[int]:
        total = num_tiles(self.query.x.shape[0], self.key.x.shape[0], self.tile)
        return (min(total, multiprocessors(self.query.x.device)) if self.tile.persistent else total,)

    def arguments(self) -> dict[str, Any]:
        """What is multiplied, and the mask's rules."""
        columns, tile = self.columns, self.tile
        return {
            "query": described(self.query.operand, tile.rows, tile.depth) if tile.described else self.query.operand,
            "key": described(self.key.operand, tile.cols, tile.depth) if tile.described else self.key.operand,
            "query_inverse_ptr": self.query.inverse,
            "key_inverse_ptr": self.key.inverse,
            "special_ptr": self._of_rows(columns.special_column),
            "query_group_ptr": self._of_rows(columns.query_group),
            "key_group_ptr": columns.group,
            "num_rows": self.query.x.shape[0],
            "num_cols": self.key.x.shape[0],
            "dim": self.query.x.shape[1],
            "SPECIAL": int(columns.special),
            "GROUPS": int(columns.groups),
            "RELATIONS": max(columns.num_relations, 1),
            "PRECISION": self.precision,
            "DESCRIBED": tile.described,
        }

    def limited(self) -> dict[str, Any]:
        """The rule that leaves out what is too similar."""
        return {"limit_ptr": self._of_rows(self.limit), "LIMITED": self.limit is not None}

    def listed(self) -> dict[str, Any]:
        """The rule that leaves out what a row's list has."""
        offsets = self.columns.left_out_offsets
        return {
            "left_out_ptr": self.columns.left_out,
            "left_out_offsets_ptr": None if offsets is None else offsets[self.rows.start : self.rows.stop + 1],
            "LISTED": offsets is not None,
        }

    def added(self) -> dict[str, Any]:
        """What is added to logits."""
        hardness = self.columns.hardness
        return {"bias": self.columns.bias, "hardness": hardness, "HARDENED": hardness != 0.0}

    def output(self, out: Tensor) -> Tensor | TensorDescriptor:
        """What a kernel stores its tiles through, of out (R, C)."""
        return described(out, self.tile.rows, self.tile.cols) if self.tile.described else out

    def _of_rows(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x[self.rows]


def described(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """x (R, C), rows at multiples of 16 bytes, as what the hardware copies blocks of rows × cols from or to."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, cols])
