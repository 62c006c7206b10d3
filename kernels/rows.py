"""What InfoNCE does a row at a time: norms, the positives' similarities, and the way back through the normalisation.

Up to some thousands of rows a step takes as long as its launches: ``prepare_kernel`` is one for all that comes before the
similarities of a plain loss.
"""

# ruff: noqa: N803
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from hicl_fast.kernels.tiles import RowTile, row_tile
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Vectors and what makes them unit vectors."""

    x: Tensor  # (N, D) contiguous, as they came
    inverse: Tensor  # (N,) float32: 1 / ‖x‖, 0 for a zero row
    operand: Tensor  # (N, D) what products take: x, its long rows made shorter

    def __getitem__(self, rows: slice) -> "Rows":
        return Rows(self.x[rows], self.inverse[rows], self.operand[rows])


@dataclass(frozen=True)
class Partners:
    """The rows of the other side that a row shares a positive with, and how much of their unit rows it is given."""

    other: Rows  # (K, D)
    coefficient: Tensor  # (N,); with begin: (K,)
    index: Tensor | None = None  # int64: (N,), the partner of each row; None: the row of the same index
    begin: Tensor | None = None  # (N + 1,) int64: the partners are index[begin[i] : begin[i + 1]]


# Which rows of the other side a row shares a positive with.
NOBODY = tl.constexpr(0)
TARGET = tl.constexpr(1)  # the one that ``partner`` names
SAME_INDEX = tl.constexpr(2)  # the one of the same index, if there is one
LISTED = tl.constexpr(3)  # ``partner[begin[row] : begin[row + 1]]``


@triton.jit
def load_rows(ptr, row, inside, dim, BLOCK_DIM: tl.constexpr):
    """Rows in float32, (BLOCK_ROWS, BLOCK_DIM); zeros outside."""
    at = tl.arange(0, BLOCK_DIM)
    mask = inside[:, None] & (at < dim)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * dim + at[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(ptr, row, inside, dim, values, BLOCK_DIM: tl.constexpr):
    at = tl.arange(0, BLOCK_DIM)
    mask = inside[:, None] & (at < dim)[None, :]
    tl.store(ptr + row.to(tl.int64)[:, None] * dim + at[None, :], values.to(ptr.dtype.element_ty), mask=mask)


# What is done to a row whose squared length would leave float32's range, here and in csrc/cuda/norm.cuh.
MOST_SQUARED = tl.constexpr(2.0**126)
SHRINK = tl.constexpr(2.0**-80)
GROW = tl.constexpr(2.0**80)
LONG = tl.constexpr(2.0**-63)  # 1 / ‖x‖ of rows that are longer


@triton.jit
def is_long(inverse):
    """Whether rows of these inverse norms are to be multiplied by SHRINK before they are multiplied by each other.

    A zero row's 0 and NaN aren't.
    """
    return (inverse > 0.0) & (inverse < LONG)


@triton.jit
def scaled_unit(x, inverse, factor):
    """``factor · inverse · x``, of which a long row's first two might make too small a number."""
    apart = is_long(inverse)
    return x * (inverse * tl.where(apart, 1.0, factor))[:, None] * tl.where(apart, factor, 1.0)[:, None]


@triton.jit
def normalised(x, floor):
    """Rows (BLOCK_ROWS, BLOCK_DIM) made short enough for their squares; by what; and 1 / ‖x‖ of them as they are then."""
    squared = tl.sum(x * x, axis=1)
    shrink = tl.where(squared < MOST_SQUARED, 1.0, SHRINK)  # NaN too
    x *= shrink[:, None]
    norm = tl.sqrt(tl.sum(x * x, axis=1))
    # Squares vanish where a row below the floor isn't zero. An infinite norm's factor is NaN: 0 would hide it.
    is_zero = (squared == 0.0) & (tl.max(tl.abs(x), axis=1) == 0.0)
    inverse = tl.where(is_zero, 0.0, 1.0 / tl.maximum(norm, floor * shrink) + (norm - norm))
    return x, shrink, inverse


@triton.jit
def store_normalised(
    x,  # (BLOCK_ROWS, BLOCK_DIM)
    shrink,
    inverse,
    inverse_ptr,
    unit_ptr,
    operand_ptr,
    rows,
    inside,
    dim,
    WRITES_UNIT: tl.constexpr,
    WRITES_OPERAND: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    tl.store(inverse_ptr + rows, inverse * shrink, mask=inside)
    if WRITES_UNIT:
        store_rows(unit_ptr, rows, inside, dim, x * inverse[:, None], BLOCK_DIM)
    if WRITES_OPERAND:  # a row may be long for its norm and yet not for products
        grown = tl.where(is_long(inverse * shrink), SHRINK, 1.0) / shrink
        store_rows(operand_ptr, rows, inside, dim, x * grown[:, None], BLOCK_DIM)


@triton.jit
def normalise_kernel(
    x_ptr,  # (num_rows, dim)
    inverse_ptr,  # out (num_rows,) 1 / max(‖x‖, floor), 0 for a zero row
    unit_ptr,  # out (num_rows, dim)
    operand_ptr,  # out (num_rows, dim): the rows for products, long ones times SHRINK
    num_rows,
    dim,
    floor,
    WRITES_UNIT: tl.constexpr,
    WRITES_OPERAND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < num_rows
    x, shrink, inverse = normalised(load_rows(x_ptr, rows, inside, dim, BLOCK_DIM), floor)
    store_normalised(
        x, shrink, inverse, inverse_ptr, unit_ptr, operand_ptr, rows, inside, dim,
        WRITES_UNIT, WRITES_OPERAND, BLOCK_DIM,
    )  # fmt: skip


@triton.jit
def prepare_kernel(
    query_ptr,  # (num_rows, dim)
    key_ptr,  # (num_keys, dim), num_keys ≥ num_rows
    query_inverse_ptr,  # out (num_rows,) as in normalise_kernel
    key_inverse_ptr,  # out (num_keys,)
    query_operand_ptr,  # out (num_rows, dim)
    key_operand_ptr,  # out (num_keys, dim)
    key_unit_ptr,  # out (num_keys, dim)
    positive_ptr,  # out (num_rows,) the similarity of row i and key i
    index_ptr,  # out (num_rows,) int64: 0, 1, 2, …
    scale_ptr,  # out (1,)
    num_rows,
    num_keys,
    dim,
    floor,
    scale,
    WRITES_UNIT: tl.constexpr,
    WRITES_OPERAND: tl.constexpr,
    WRITES_SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """What comes before the similarities where row i's positive is key i, which then is at hand when row i is."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < num_keys
    key, key_shrink, key_inverse = normalised(load_rows(key_ptr, rows, inside, dim, BLOCK_DIM), floor)
    store_normalised(
        key, key_shrink, key_inverse, key_inverse_ptr, key_unit_ptr, key_operand_ptr, rows, inside, dim,
        WRITES_UNIT, WRITES_OPERAND, BLOCK_DIM,
    )  # fmt: skip
    inside = rows < num_rows
    query, shrink, inverse = normalised(load_rows(query_ptr, rows, inside, dim, BLOCK_DIM), floor)
    store_normalised(
        query, shrink, inverse, query_inverse_ptr, None, query_operand_ptr, rows, inside, dim,
        False, WRITES_OPERAND, BLOCK_DIM,
    )  # fmt: skip
    tl.store(positive_ptr + rows, tl.sum(query * key, axis=1) * inverse * key_inverse, mask=inside)
    tl.store(index_ptr + rows, rows.to(tl.int64), mask=inside)
    if WRITES_SCALE:
        if tl.program_id(0) == 0:
            tl.store(scale_ptr, scale)


@triton.jit
def scale_rows_kernel(
    x_ptr,  # (num_rows, dim)
    inverse_ptr,  # (num_rows,)
    factor_ptr,  # (num_rows,)
    scaled_ptr,  # out (num_rows, dim): of the unit rows
    num_rows,
    dim,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < num_rows
    factor = tl.load(factor_ptr + rows, mask=inside, other=0.0)
    inverse = tl.load(inverse_ptr + rows, mask=inside, other=0.0)
    x = load_rows(x_ptr, rows, inside, dim, BLOCK_DIM)
    store_rows(scaled_ptr, rows, inside, dim, scaled_unit(x, inverse, factor), BLOCK_DIM)


@triton.jit
def positive_kernel(
    query_ptr,  # (num_rows, dim)
    key_ptr,  # (M, dim)
    query_inverse_ptr,  # (num_rows,)
    key_inverse_ptr,  # (M,)
    target_ptr,  # (num_rows,) int64
    positive_ptr,  # out (num_rows,) the similarity of each row's target, NaN where there is no such key
    num_rows,
    num_keys,
    dim,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < num_rows
    target = tl.load(target_ptr + rows, mask=inside, other=0)
    exists = inside & (target >= 0) & (target < num_keys)
    query = load_rows(query_ptr, rows, inside, dim, BLOCK_DIM)
    key = load_rows(key_ptr, target, exists, dim, BLOCK_DIM)
    query_inverse = tl.load(query_inverse_ptr + rows, mask=inside, other=0.0)
    key_inverse = tl.load(key_inverse_ptr + target, mask=exists, other=float("nan"))
    query *= tl.where(is_long(query_inverse), SHRINK, 1.0)[:, None]
    key *= tl.where(is_long(key_inverse), SHRINK, 1.0)[:, None]
    query_inverse *= tl.where(is_long(query_inverse), GROW, 1.0)
    key_inverse *= tl.where(is_long(key_inverse), GROW, 1.0)
    tl.store(positive_ptr + rows, tl.sum(query * key, axis=1) * query_inverse * key_inverse, mask=inside)


@triton.jit
def add_partner(
    grad,  # (BLOCK_ROWS, BLOCK_DIM)
    partner_ptr,
    partner_inverse_ptr,
    partner,  # (BLOCK_ROWS,) index of the partner
    coefficient,  # (BLOCK_ROWS,)
    exists,  # (BLOCK_ROWS,) bool
    dim,
    BLOCK_DIM: tl.constexpr,
):
    """``grad + coefficient · partner's unit row``, where there is a partner."""
    x = load_rows(partner_ptr, partner, exists, dim, BLOCK_DIM)
    inverse = tl.load(partner_inverse_ptr + partner, mask=exists, other=0.0)
    return grad + scaled_unit(x, inverse, coefficient)


@triton.jit
def gradient_kernel(
    product_ptr,  # (num_rows, dim) float32
    factor_ptr,  # (num_rows,) of the product, with stride factor_stride
    x_ptr,  # (num_rows, dim)
    inverse_ptr,  # (num_rows,)
    other_ptr,  # (num_others, dim) the other side's rows
    other_inverse_ptr,  # (num_others,)
    coefficient_ptr,  # the positive's: (num_rows,); with LISTED (num_others,)
    partner_ptr,  # int64 (num_rows,); with LISTED (num_others,)
    begin_ptr,  # (num_rows + 1,) int64
    gradient_ptr,  # out (num_rows, dim); may be the product
    num_rows,
    num_others,
    dim,
    factor_stride,
    floor,
    PARTNER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """``(I − x̂ x̂ᵀ) g / ‖x‖`` with g = factor · product + the positives' part."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < num_rows
    factor = tl.load(factor_ptr + rows.to(tl.int64) * factor_stride, mask=inside, other=0.0)
    grad = load_rows(product_ptr, rows, inside, dim, BLOCK_DIM) * factor[:, None]
    if PARTNER == TARGET:
        partner = tl.load(partner_ptr + rows, mask=inside, other=0)
        exists = inside & (partner >= 0) & (partner < num_others)
        coefficient = tl.load(coefficient_ptr + rows, mask=exists, other=0.0)
        grad = add_partner(grad, other_ptr, other_inverse_ptr, partner, coefficient, exists, dim, BLOCK_DIM)
    if PARTNER == SAME_INDEX:
        exists = inside & (rows < num_others)
        coefficient = tl.load(coefficient_ptr + rows, mask=exists, other=0.0)
        grad = add_partner(grad, other_ptr, other_inverse_ptr, rows, coefficient, exists, dim, BLOCK_DIM)
    if PARTNER == LISTED:
        begin = tl.load(begin_ptr + rows, mask=inside, other=0)
        count = tl.load(begin_ptr + rows + 1, mask=inside, other=0) - begin
        for i in range(0, tl.max(count, axis=0)):
            exists = inside & (i < count)
            partner = tl.load(partner_ptr + begin + i, mask=exists, other=0)
            coefficient = tl.load(coefficient_ptr + partner, mask=exists, other=0.0)
            grad = add_partner(grad, other_ptr, other_inverse_ptr, partner, coefficient, exists, dim, BLOCK_DIM)

    inverse = tl.load(inverse_ptr + rows, mask=inside, other=0.0)
    unit = load_rows(x_ptr, rows, inside, dim, BLOCK_DIM) * inverse[:, None]
    # A row below the floor has its length held constant: nothing is taken off along it. Its inverse norm is 1 / floor,
    # give or take a rounding.
    along = tl.where(inverse * floor > 0.999999, 0.0, tl.sum(grad * unit, axis=1))
    store_rows(gradient_ptr, rows, inside, dim, (grad - along[:, None] * unit) * inverse[:, None], BLOCK_DIM)


def normalise(x: Tensor, floor: float, unit: Tensor | None = None) -> Rows:
    """The rows of x (N, D), contiguous, with their inverse norms; writes the unit rows to ``unit`` (N, D) if given."""
    rows = _unknown(x)
    if x.shape[0]:
        tile = row_tile(x.shape[1])
        normalise_kernel[row_grid(x, tile)](
            x, rows.inverse, unit, rows.operand, *x.shape, floor,
            WRITES_UNIT=unit is not None, WRITES_OPERAND=rows.operand is not x, **tile.options(),
        )  # fmt: skip
    return rows


def _unknown(x: Tensor) -> Rows:
    """Memory for what ``normalise`` finds; float16 needs none for shorter rows: it is all within float32's squares."""
    inverse = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    return Rows(x, inverse, x if x.dtype == torch.float16 else torch.empty_like(x))


@dataclass(frozen=True)
class Prepared:
    """What :func:`prepare` gives."""

    query: Rows  # (N, D)
    key: Rows  # (M, D)
    positive: Tensor  # (N,) float32: the cosine of row i and key i
    index: Tensor  # (N,) int64: 0, 1, 2, …
    scale: Tensor  # (1,) float32


def prepare(query: Tensor, key: Tensor, floor: float, unit: Tensor | None, scale: float | Tensor) -> Prepared:
    """Query (N, D) and key (M, D), M ≥ N > 0, contiguous and of one type, in one launch; writes unit keys to ``unit``.

    A ``scale`` that is a tensor (1,) float32 is passed on as it is.
    """
    (num_rows, dim), num_keys = query.shape, key.shape[0]
    is_number = not isinstance(scale, Tensor)
    positive = torch.empty(num_rows, dtype=torch.float32, device=query.device)
    found = Prepared(
        _unknown(query),
        _unknown(key),
        positive,
        torch.empty(num_rows, dtype=torch.int64, device=query.device),
        scale if isinstance(scale, Tensor) else positive.new_empty(1),
    )
    tile = row_tile(dim)
    prepare_kernel[row_grid(key, tile)](
        query, key, found.query.inverse, found.key.inverse, found.query.operand, found.key.operand, unit,
        positive, found.index, found.scale, num_rows, num_keys, dim, floor, scale if is_number else 0.0,
        WRITES_UNIT=unit is not None, WRITES_OPERAND=found.key.operand is not key, WRITES_SCALE=is_number,
        **tile.options(),
    )  # fmt: skip
    return found


def scale_rows(rows: Rows, factor: Tensor) -> Tensor:
    """``factor[:, None]`` times the unit rows, in the rows' type, rounded once; (N, D), (N,) float32 -> (N, D)."""
    x, scaled = rows.x, torch.empty_like(rows.x)
    tile = row_tile(x.shape[1])
    scale_rows_kernel[row_grid(x, tile)](x, rows.inverse, factor, scaled, *x.shape, **tile.options())
    return scaled


def positive_similarity(query: Rows, key: Rows, target: Tensor) -> Tensor:
    """The cosine of each query with its target, (N,) float32, from the same numbers as the tiles; NaN for no key."""
    positive = torch.empty_like(query.inverse)
    tile = row_tile(query.x.shape[1])
    positive_kernel[row_grid(query.x, tile)](
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
    kind, other = NOBODY, rows
    coefficient = index = begin = None
    if partners is not None:
        other, coefficient, index, begin = partners.other, partners.coefficient, partners.index, partners.begin
        kind = LISTED if begin is not None else SAME_INDEX if index is None else TARGET
    tile = row_tile(rows.x.shape[1])
    gradient_kernel[row_grid(rows.x, tile)](
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


def row_grid(x: Tensor, tile: RowTile) -> tuple[int]:
    return (triton.cdiv(x.shape[0], tile.rows),)
