"""Launches the kernels on tensors: grids, tiles, and which of a kernel's features a call uses. No mathematics."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from hicl_fast.kernels import hard_negatives as _hard_negatives
from hicl_fast.kernels import info_nce_rows as _info_nce_rows
from hicl_fast.kernels import paradigm as _paradigm
from hicl_fast.kernels import products as _products
from hicl_fast.kernels import rows as _rows
from hicl_fast.kernels import segment_pool as _segment_pool
from hicl_fast.kernels import similarity as _similarity
from hicl_fast.kernels.tiles import STATISTICS, RowTile, Tile, row_tile, similarity_tile
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# What a row's special column is, and what columns of its group are: see kernels/similarity.py.
NOTHING, POSITIVE, OWN_NEGATIVE = 0, 1, 2
ORDINARY, EXCLUDED, POSITIVES = 0, 1, 2

# The sums by row that each kernel leaves, by name.
EXP_PLANES = ("exp_sum", "hardest", "dot")
STATISTICS_PLANES = ("exp_sum", "hardest", "max", "positives_shift")

INTERPRETING = not isinstance(_rows.normalise_kernel, triton.JITFunction)  # TRITON_INTERPRET=1 when they were loaded


@dataclass(frozen=True)
class Rows:
    """Vectors and what makes them unit vectors."""

    x: Tensor  # (N, D) contiguous, as they came
    inverse: Tensor  # (N,) float32: 1 / ‖x‖, 0 for a zero row
    operand: Tensor  # (N, D) what products take: x, its long rows made shorter

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self.x[rows], self.inverse[rows], self.operand[rows])


@dataclass(frozen=True)
class Columns:
    """Vectors that rows are compared with, and which of them a row treats apart."""

    vectors: Rows  # (C, D)
    special: int  # NOTHING | POSITIVE | OWN_NEGATIVE
    special_column: Tensor | None  # (N,) int64
    own_bias: float
    groups: int  # ORDINARY | EXCLUDED | POSITIVES
    query_group: Tensor | None  # (N,) int64
    key_group: Tensor | None  # (C,) int64

    @property
    def count(self) -> int:
        return self.vectors.x.shape[0]

    def for_rows(self, rows: slice) -> dict[str, Any]:
        """The kernels' arguments for a chunk of rows, but for the operands."""

        def chunk(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows]

        return {
            "key_inverse_ptr": self.vectors.inverse,
            "special_ptr": chunk(self.special_column),
            "query_group_ptr": chunk(self.query_group),
            "key_group_ptr": self.key_group,
            "num_cols": self.count,
            "dim": self.vectors.x.shape[1],
            "SPECIAL": self.special,
            "GROUPS": self.groups,
        }


@functools.cache
def architecture(device: torch.device) -> str:
    """The tile table's name for a device: "sm_90", "gfx942", "interpreter"."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once where one fills a multiprocessor; a few in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def tile_for(operands: list[Tensor], precision: str, use: str) -> Tile:
    """The tile for similarities of vectors (N, D) of one type, multiplied in ``precision`` ("ieee" or "tf32").

    ``use`` is one of kernels/tiles.py's.
    """
    x = operands[0]
    can_describe = x.shape[1] * x.element_size() % 16 == 0 and all(x.data_ptr() % 16 == 0 for x in operands)
    return similarity_tile(architecture(x.device), operand_of(x, precision), use, can_describe)


def operand_of(x: Tensor, precision: str) -> str:
    """The tile table's name for vectors of x's type, multiplied in ``precision``."""
    if x.element_size() == 2:
        return "16 bit"
    return "tf32" if precision == "tf32" else "fp32"


# --- similarities ----------------------------------------------------------------------------------------------------


def exp_similarities(
    query: Rows,  # (R, D)
    columns: Columns,  # C of them
    tile: Tile,
    rows: slice,  # which rows of the whole these R are
    scale: Tensor,  # (1,)
    offset: Tensor,  # (R,)
    out: Tensor,  # (R, C) with unit stride along the columns
    partials: Tensor,  # (3, column tiles, R) float32; planes as in EXP_PLANES
    *,
    amplitude: float,
    wants_dot: bool,
    precision: str,
) -> None:
    """``out = amplitude · exp(ℓ − offset)`` and its sums by row."""
    num_rows = query.x.shape[0]
    _similarity.exp_kernel[_programs(query, columns, tile)](
        query_inverse_ptr=query.inverse,
        scale_ptr=scale,
        offset_ptr=offset,
        exp_out=_output(out, tile),
        partials_ptr=partials,
        num_rows=num_rows,
        exp_stride=out.stride(0),
        plane_stride=partials.stride(0),
        own_bias=columns.own_bias,
        amplitude=amplitude,
        WANTS_DOT=wants_dot,
        PRECISION=precision,
        **_operands(query, columns, tile),
        **columns.for_rows(rows),
        **tile.options(),
    )


@dataclass(frozen=True)
class RowResults:
    """What a row's sums of exponentials come to, (N,) float32 each."""

    negative_lse: Tensor
    hardest: Tensor
    loss: Tensor
    factor: Tensor  # of the stored exponentials: ∂loss/∂s of a negative
    coefficient: Tensor  # ∂loss/∂s of the positive
    scale_slope: Tensor | None  # ∂loss/∂scale

    @classmethod
    def unknown(cls, like: Tensor, *, wants_scale: bool) -> RowResults:
        negative_lse, hardest, loss, factor, coefficient = (torch.empty_like(like) for _ in range(5))
        scale_slope = torch.empty_like(like) if wants_scale else None
        return cls(negative_lse, hardest, loss, factor, coefficient, scale_slope)


_ROWS_OF_SUMS, _TILES_OF_SUMS = 32, 32


def exp_rows(
    partials: Tensor,  # (3, column tiles, R) float32; planes as in EXP_PLANES
    positive: Tensor,  # (R,) similarity of the positive, its margin counted
    margin_slope: Tensor | None,  # (R,) its derivative by the similarity; None: 1
    scale: Tensor,  # (1,)
    offset: float,
    row_weight: float,
    rows: slice,  # which rows of the whole these R are
    out: RowResults,
) -> None:
    """Losses and factors of rows whose exponentials one sweep has stored."""
    num_rows = partials.shape[2]
    results = (out.negative_lse, out.hardest, out.loss, out.factor, out.coefficient, out.scale_slope)
    _info_nce_rows.exp_rows_kernel[(triton.cdiv(num_rows, _ROWS_OF_SUMS),)](
        partials, positive, margin_slope, scale, *(None if x is None else x[rows] for x in results),
        num_rows, partials.shape[1], partials.stride(0), offset, row_weight,
        HAS_MARGIN=margin_slope is not None, WANTS_DOT=out.scale_slope is not None,
        BLOCK_ROWS=_ROWS_OF_SUMS, BLOCK_TILES=_TILES_OF_SUMS, num_warps=4,
    )  # fmt: skip


def similarity_statistics(
    query: Rows,  # (R, D)
    columns: Columns,  # C of them
    tile: Tile,
    rows: slice,
    scale: Tensor,  # (1,)
    positive_logit: Tensor,  # (R,)
    partials: Tensor,  # (4, column tiles, R) float32; planes as in STATISTICS_PLANES
    column_partials: Tensor | None,  # (2, row tiles, C) float32: Σ exp(ℓ − max), max
    *,
    precision: str,
) -> None:
    """Sums by row, and by column where they are asked for; nothing of size R × C is kept."""
    num_rows = query.x.shape[0]
    _similarity.statistics_kernel[_programs(query, columns, tile)](
        query_inverse_ptr=query.inverse,
        scale_ptr=scale,
        positive_logit_ptr=positive_logit,
        partials_ptr=partials,
        column_partials_ptr=column_partials,
        num_rows=num_rows,
        plane_stride=partials.stride(0),
        column_plane_stride=0 if column_partials is None else column_partials.stride(0),
        own_bias=columns.own_bias,
        HAS_COLUMNS=column_partials is not None,
        PRECISION=precision,
        **_operands(query, columns, tile),
        **columns.for_rows(rows),
        **tile.options(),
    )


def similarity_slopes(
    query: Rows,  # (R, D)
    columns: Columns,  # C of them
    tile: Tile,
    rows: slice,
    scale: Tensor,  # (1,)
    by_row: tuple[Tensor, Tensor],  # offset and factor, (R,) each
    by_column: tuple[Tensor, Tensor] | None,  # offset and factor, (C,) each
    positives_share: Tensor | None,  # (R,)
    out: Tensor,  # (R, C) with unit stride along the columns
    dot: Tensor,  # (column tiles, R) float32
    *,
    wants_dot: bool,
    precision: str,
) -> None:
    """``out = Σ factor · exp(ℓ − offset)`` over row and column, less the share of the further positives."""
    num_rows = query.x.shape[0]
    column_offset, column_factor = by_column or (None, None)
    _similarity.slope_kernel[_programs(query, columns, tile)](
        query_inverse_ptr=query.inverse,
        scale_ptr=scale,
        row_offset_ptr=by_row[0],
        row_factor_ptr=by_row[1],
        positives_share_ptr=positives_share,
        column_offset_ptr=column_offset,
        column_factor_ptr=column_factor,
        slope_out=_output(out, tile),
        dot_ptr=dot,
        num_rows=num_rows,
        slope_stride=out.stride(0),
        own_bias=columns.own_bias,
        HAS_COLUMNS=by_column is not None,
        WANTS_DOT=wants_dot,
        PRECISION=precision,
        **_operands(query, columns, tile),
        **columns.for_rows(rows),
        **tile.options(),
    )


def product(a: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
    """``a @ b``, (R, K), (K, C) -> (R, C), float32 in every digit; added to ``onto`` in place if that is given.

    Any strides, so that either may be a transposed view.
    """
    num_rows, num_cols, depth = a.shape[0], b.shape[1], a.shape[1]
    out = torch.empty(num_rows, num_cols, dtype=torch.float32, device=a.device) if onto is None else onto
    if out.numel():
        tile = similarity_tile(architecture(a.device), "fp32", STATISTICS)
        grid = (triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_cols, tile.cols),)
        _products.product_kernel[grid](
            a, b, out, num_rows, num_cols, depth, *a.stride(), *b.stride(), *out.stride(),
            ADDS=onto is not None, **tile.blocks(),
        )  # fmt: skip
    return out


def _programs(query: Rows, columns: Columns, tile: Tile) -> tuple[int]:
    (num_tiles,) = _grid(query.x.shape[0], columns.count, tile)
    return (min(num_tiles, multiprocessors(query.x.device)) if tile.persistent else num_tiles,)


def _described(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """x (R, C), rows at multiples of 16 bytes, as what the hardware copies blocks of rows × cols from or to."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, cols])


def _operands(query: Rows, columns: Columns, tile: Tile) -> dict[str, Any]:
    """The kernels' arguments for what is multiplied."""
    query_rows, key_rows = query.operand, columns.vectors.operand
    if not tile.described:
        return {"query": query_rows, "key": key_rows, "DESCRIBED": False}
    return {
        "query": _described(query_rows, tile.rows, tile.depth),
        "key": _described(key_rows, tile.cols, tile.depth),
        "DESCRIBED": True,
    }


def _output(out: Tensor, tile: Tile) -> Tensor | TensorDescriptor:
    return _described(out, tile.rows, tile.cols) if tile.described else out


def _grid(num_rows: int, num_cols: int, tile: Tile) -> tuple[int]:
    return (triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_cols, tile.cols),)


# --- rows ------------------------------------------------------------------------------------------------------------


def normalise(x: Tensor, floor: float, unit: Tensor | None = None) -> Rows:
    """The rows of x (N, D), contiguous, with their inverse norms; writes the unit rows to ``unit`` (N, D) if given."""
    inverse = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    has_long = x.dtype != torch.float16  # which is all within float32's squares
    operand = torch.empty_like(x) if has_long else x
    if x.shape[0]:
        tile = row_tile(x.shape[1])
        _rows.normalise_kernel[_row_grid(x, tile)](
            x, inverse, unit, operand, *x.shape, floor,
            WRITES_UNIT=unit is not None, WRITES_OPERAND=has_long, **tile.options(),
        )  # fmt: skip
    return Rows(x, inverse, operand)


def scale_rows(rows: Rows, factor: Tensor) -> Tensor:
    """``factor[:, None]`` times the unit rows, in the rows' type, rounded once; (N, D), (N,) float32 -> (N, D)."""
    x, scaled = rows.x, torch.empty_like(rows.x)
    tile = row_tile(x.shape[1])
    _rows.scale_rows_kernel[_row_grid(x, tile)](x, rows.inverse, factor, scaled, *x.shape, **tile.options())
    return scaled


def positive_similarity(query: Rows, key: Rows, target: Tensor) -> Tensor:
    """The cosine of each query with its target, (N,) float32, from the same numbers as the tiles; NaN for no key."""
    positive = torch.empty_like(query.inverse)
    tile = row_tile(query.x.shape[1])
    _rows.positive_kernel[_row_grid(query.x, tile)](
        query.x,
        key.x,
        query.inverse,
        key.inverse,
        target,
        positive,
        query.x.shape[0],
        key.x.shape[0],
        query.x.shape[1],
        **tile.options(),
    )
    return positive


@dataclass(frozen=True)
class Partners:
    """The rows of the other side that a row shares a positive with, and how much of their unit rows it is given."""

    other: Rows  # (K, D)
    coefficient: Tensor  # (N,); with begin: (K,)
    index: Tensor | None = None  # int64: (N,), the partner of each row; None: the row of the same index
    begin: Tensor | None = None  # (N + 1,) int64: the partners are index[begin[i] : begin[i + 1]]


def gradient(
    product: Tensor,  # (N, D) float32
    factor: Tensor,  # (N,) float32 of the product; may be an expanded scalar
    rows: Rows,  # (N, D)
    partners: Partners | None,
    floor: float,
    out: Tensor,  # (N, D) float32; may be the product
) -> None:
    """The gradient with respect to the rows as they came, from that with respect to the unit rows."""
    if not rows.x.shape[0]:
        return
    kind, other = _rows.NOBODY, rows
    coefficient = index = begin = None
    if partners is not None:
        other, coefficient, index, begin = partners.other, partners.coefficient, partners.index, partners.begin
        kind = _rows.LISTED if begin is not None else _rows.SAME_INDEX if index is None else _rows.TARGET
    tile = row_tile(rows.x.shape[1])
    _rows.gradient_kernel[_row_grid(rows.x, tile)](
        product,
        factor,
        rows.x,
        rows.inverse,
        other.x,
        other.inverse,
        coefficient,
        index,
        begin,
        out,
        rows.x.shape[0],
        other.x.shape[0],
        rows.x.shape[1],
        factor.stride(0),
        floor,
        PARTNER=kind.value,
        **tile.options(),
    )


def _row_grid(x: Tensor, tile: RowTile) -> tuple[int]:
    return (triton.cdiv(x.shape[0], tile.rows),)


# --- pooling ---------------------------------------------------------------------------------------------------------

POOL_BLOCK_DIM = 512  # a program's share of the dimensions: 4 a thread
_POOL_WARPS = 4


def pool_segments(segments: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    """(S, D), (B + 1,) int64, (S,) -> (B, D) in the segments' type. All contiguous."""
    num_sequences, dim = offsets.shape[0] - 1, segments.shape[1]
    pooled = segments.new_empty(num_sequences, dim)
    if pooled.numel():
        _segment_pool.pool_kernel[_pool_grid(num_sequences, dim)](
            segments, offsets, weights, pooled, dim, weights is not None, _sum_type(segments, weights),
            BLOCK_DIM=_pool_block(dim), num_warps=_POOL_WARPS,
        )  # fmt: skip
    return pooled


def segments_gradient(segments: Tensor, offsets: Tensor, weights: Tensor | None, pooled_grad: Tensor) -> Tensor:
    """(S, D) in the segments' type, from the pooled rows' gradient (B, D)."""
    num_sequences, dim = offsets.shape[0] - 1, segments.shape[1]
    grad = torch.empty_like(segments)
    if grad.numel():
        _segment_pool.segments_gradient_kernel[_pool_grid(num_sequences, dim)](
            offsets, weights, pooled_grad, grad, dim, weights is not None, _sum_type(segments, weights),
            BLOCK_DIM=_pool_block(dim), num_warps=_POOL_WARPS,
        )  # fmt: skip
    return grad


def weights_gradient(segments: Tensor, offsets: Tensor, weights: Tensor, pooled_grad: Tensor) -> Tensor:
    """(S,) in the weights' type, from the pooled rows' gradient (B, D)."""
    grad = torch.empty_like(weights)
    tile = row_tile(segments.shape[1])
    if grad.numel():
        _segment_pool.weights_gradient_kernel[(offsets.shape[0] - 1,)](
            segments, offsets, weights, pooled_grad, grad, segments.shape[1], _sum_type(segments, weights),
            BLOCK_DIM=tile.dim, num_warps=tile.num_warps,
        )  # fmt: skip
    return grad


def _sum_type(segments: Tensor, weights: Tensor | None) -> tl.dtype:
    is_double = segments.dtype == torch.float64 or (weights is not None and weights.dtype == torch.float64)
    return tl.float64 if is_double else tl.float32


def _pool_block(dim: int) -> int:
    return min(POOL_BLOCK_DIM, row_tile(dim).dim)


def _pool_grid(num_sequences: int, dim: int) -> tuple[int, int]:
    return num_sequences, triton.cdiv(dim, _pool_block(dim))


# --- hard negatives --------------------------------------------------------------------------------------------------

_PROGRAMS = 512  # enough for every multiprocessor; the columns are cut into parts where the rows make fewer
_FEWEST_TILES = 4  # of a part


def hardest(
    query: Rows,  # (N, D)
    columns: Columns,  # C of them
    k: int,
    *,
    precision: str,
) -> Tensor:  # (N, k) int64
    """Each row's k largest keys, falling; see kernels/hard_negatives.py."""
    num_rows, kept = query.x.shape[0], _hard_negatives.kept(k)
    tile = _hard_negatives.hard_negatives_tile(architecture(query.x.device), operand_of(query.x, precision), k)
    row_tiles, col_tiles = triton.cdiv(num_rows, tile.rows), triton.cdiv(columns.count, tile.cols)
    tiles_per_part = min(col_tiles, max(_FEWEST_TILES, triton.cdiv(col_tiles * row_tiles, _PROGRAMS)))
    parts = triton.cdiv(col_tiles, tiles_per_part)
    best = torch.empty(num_rows, parts * kept, dtype=torch.int64, device=query.x.device)
    _hard_negatives.hard_negatives_kernel[(row_tiles, parts)](
        query_inverse_ptr=query.inverse,
        best_ptr=best,
        num_rows=num_rows,
        part_cols=tiles_per_part * tile.cols,
        parts=parts,
        KEPT=kept,
        PRECISION=precision,
        **_operands(query, columns, tile),
        **columns.for_rows(slice(None)),
        **tile.blocks(),
    )
    return best.topk(k, dim=1).values


# --- the gradient paradigm -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Largest:
    """What each tile finds the largest along its rows, or its columns, beside what the others find."""

    value: Tensor  # (tiles, N) float32, NaN where there is one
    place: Tensor  # (tiles, N) int32, the first where it is

    @staticmethod
    def unknown(tiles: int, count: int, device: torch.device) -> Largest:
        return Largest(
            torch.empty(tiles, count, dtype=torch.float32, device=device),
            torch.empty(tiles, count, dtype=torch.int32, device=device),
        )


def paradigm_statistics(
    x: Rows,  # (R, D)
    y: Rows,  # (N, D)
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
    num_rows, num_cols = x.x.shape[0], y.x.shape[0]
    _paradigm.statistics_kernel[_grid(num_rows, num_cols, tile)](
        x_ptr=x.x,
        y_ptr=y.x,
        x_inverse_ptr=x.inverse,
        y_inverse_ptr=y.inverse,
        hardest_ptr=by_row.value,
        nearest_ptr=by_row.place,
        column_hardest_ptr=None if by_column is None else by_column.value,
        column_index_ptr=None if by_column is None else by_column.place,
        partials_ptr=partials,
        num_rows=num_rows,
        num_cols=num_cols,
        dim=x.x.shape[1],
        first_own=first_row,
        plane_stride=0 if partials is None else partials.stride(0),
        temperature=temperature,
        HAS_COLUMNS=by_column is not None,
        HAS_LSE=partials is not None,
        PRECISION=precision,
        BAND=tile.band,
        **tile.blocks(),
    )


def paradigm_weights(
    x: Rows,  # (R, D)
    y: Rows,  # (N, D)
    tile: Tile,
    first_row: int,  # the row of y that x's first is not compared with
    weight: str,  # a name in kernels/paradigm.py's WEIGHTS
    parameter: float,
    log_factor: Tensor,  # (R,)
    out: Tensor,  # (R, N) with unit stride along the columns
    by_row: Largest,  # out (column tiles, R)
    sums: Tensor,  # out (column tiles, R) float32
    *,
    precision: str,
) -> None:
    """``out = exp(−log_factor) · weight(s)``, 0 on the diagonal, its sums by row, and the largest similarities."""
    num_rows, num_cols = x.x.shape[0], y.x.shape[0]
    _paradigm.weights_kernel[_grid(num_rows, num_cols, tile)](
        x_ptr=x.x,
        y_ptr=y.x,
        x_inverse_ptr=x.inverse,
        y_inverse_ptr=y.inverse,
        log_factor_ptr=log_factor,
        weights_ptr=out,
        hardest_ptr=by_row.value,
        nearest_ptr=by_row.place,
        sums_ptr=sums,
        num_rows=num_rows,
        num_cols=num_cols,
        dim=x.x.shape[1],
        first_own=first_row,
        weights_stride=out.stride(0),
        parameter=parameter,
        WEIGHT=_paradigm.WEIGHTS[weight].value,
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
    _paradigm.sum_by_target_kernel[_row_grid(sums, tile)](x, factor, order, begin, sums, *sums.shape, **tile.options())
    return sums
