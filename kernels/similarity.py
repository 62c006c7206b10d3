"""Tiles of scaled cosine similarities ℓ = scale · (q·k) / (‖q‖ ‖k‖), and what InfoNCE makes of them.

Three kernels over the same tile: ``statistics_kernel`` keeps sums only, ``exp_kernel`` stores exp(ℓ − offset), and
``slope_kernel`` stores ∂loss/∂s where that is no product of a row's factor and exp(ℓ − offset). A program does one
tile and writes its sums beside those of the other tiles: no atomics, so every run gives the same bits.

The operands are the inputs as they came, not their normalised copies: bfloat16 inputs are multiplied exactly, and the
inverse norms are applied to the float32 sums. The positive never takes part, since rounding it would drown the
gradient of a small loss.
"""

# ruff: noqa: N803
import triton
import triton.language as tl
from hicl_fast.kernels.rows import GROW, is_long

# What a row's special column is.
NOTHING = tl.constexpr(0)
POSITIVE = tl.constexpr(1)  # left out
OWN_NEGATIVE = tl.constexpr(2)  # its logit gets the bias

# What columns of the row's group are.
ORDINARY = tl.constexpr(0)
EXCLUDED = tl.constexpr(1)
POSITIVES = tl.constexpr(2)

# Planes of the sums by row, (plane, column tile, row).
EXP_SUM = tl.constexpr(0)  # Σ exp(ℓ − offset)
HARDEST = tl.constexpr(1)  # max s
DOT = tl.constexpr(2)  # Σ s · what is stored
MAX = tl.constexpr(2)  # max ℓ
POSITIVES_SHIFT = tl.constexpr(3)  # Σ ℓ − the target's ℓ, over the further positives


@triton.jit
def tile_of_program(num_rows, num_cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BAND: tl.constexpr):
    """The program's tile: down a band of rows, then on to the next columns."""
    row_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    col_tiles = tl.cdiv(num_cols, BLOCK_COLS)
    program = tl.program_id(0)
    band = program // (BAND * col_tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    in_band = program % (BAND * col_tiles)
    return band * BAND + in_band % height, in_band // height


@triton.jit
def inverse_of_operand(inverse):
    """Of rows that are made shorter where they are long."""
    return inverse * tl.where(is_long(inverse), GROW, 1.0)


@triton.jit
def similarities(
    query_ptr,  # (num_rows, dim)
    key_ptr,  # (num_cols, dim)
    query_away_ptr,  # (1,) int64: how many elements away the rows are to be read; 0 unless some are long
    key_away_ptr,  # (1,) int64
    query_inverse_ptr,  # (num_rows,) 1 / ‖q‖
    key_inverse_ptr,  # (num_cols,)
    rows,
    cols,
    num_rows,
    num_cols,
    dim,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Cosines (BLOCK_ROWS, BLOCK_COLS) in float32. Rows and columns past the end repeat the last one."""
    row = tl.minimum(rows, num_rows - 1).to(tl.int64)
    col = tl.minimum(cols, num_cols - 1).to(tl.int64)
    depth = tl.arange(0, BLOCK_DEPTH)
    # Memory that is copied to begins at multiples of what the compiler may take for granted of the pointers.
    query_away, key_away = tl.multiple_of(tl.load(query_away_ptr), 16), tl.multiple_of(tl.load(key_away_ptr), 16)
    query_ptrs = (query_ptr + query_away) + row[:, None] * dim + depth[None, :]
    key_ptrs = (key_ptr + key_away) + col[None, :] * dim + depth[:, None]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for start in range(0, dim, BLOCK_DEPTH):
        inside = depth < dim - start
        query = tl.load(query_ptrs, mask=inside[None, :], other=0.0)
        key = tl.load(key_ptrs, mask=inside[:, None], other=0.0)
        total = tl.dot(query, key, total, input_precision=PRECISION)
        query_ptrs += BLOCK_DEPTH
        key_ptrs += BLOCK_DEPTH
    query_inverse = inverse_of_operand(tl.load(query_inverse_ptr + row))
    key_inverse = inverse_of_operand(tl.load(key_inverse_ptr + col))
    return total * query_inverse[:, None] * key_inverse[None, :]


@triton.jit
def same_group(query_group_ptr, key_group_ptr, rows, cols, num_rows, num_cols):
    """Whether row and column are of one group, (BLOCK_ROWS, BLOCK_COLS)."""
    query_group = tl.load(query_group_ptr + tl.minimum(rows, num_rows - 1))
    key_group = tl.load(key_group_ptr + tl.minimum(cols, num_cols - 1))
    return query_group[:, None] == key_group[None, :]


@triton.jit
def is_special(special_ptr, rows, cols, num_rows):
    """Whether the column is the row's special one, (BLOCK_ROWS, BLOCK_COLS)."""
    special = tl.load(special_ptr + tl.minimum(rows, num_rows - 1)).to(tl.int32)  # columns are counted in 32 bits
    return cols[None, :] == special[:, None]


@triton.jit
def store_sums(partials_ptr, plane_stride, plane, col_tile, rows, num_rows, values):
    at = partials_ptr + tl.cast(plane_stride, tl.int64) * plane + col_tile.to(tl.int64) * num_rows + rows
    tl.store(at, values, mask=rows < num_rows)


@triton.jit
def exp_kernel(
    query_ptr,  # (num_rows, dim)
    key_ptr,  # (num_cols, dim)
    query_away_ptr,  # (1,) int64
    key_away_ptr,  # (1,) int64
    query_inverse_ptr,  # (num_rows,)
    key_inverse_ptr,  # (num_cols,)
    scale_ptr,  # (1,)
    offset_ptr,  # (num_rows,) subtracted from the logits
    special_ptr,  # (num_rows,) int64
    query_group_ptr,  # (num_rows,) int64
    key_group_ptr,  # (num_cols,) int64
    exp_ptr,  # out (num_rows, num_cols): amplitude · exp(ℓ − offset), 0 for a column that is left out
    partials_ptr,  # out (3, column tiles, num_rows): EXP_SUM, HARDEST, DOT
    num_rows,
    num_cols,
    dim,
    exp_stride,
    plane_stride,
    own_bias,
    amplitude,
    SPECIAL: tl.constexpr,
    GROUPS: tl.constexpr,
    WANTS_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    """One tile of exp(ℓ − offset), and by row its sum, its product with s, and the largest s."""
    row_tile, col_tile = tile_of_program(num_rows, num_cols, BLOCK_ROWS, BLOCK_COLS, BAND)
    rows = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    s = similarities(
        query_ptr, key_ptr, query_away_ptr, key_away_ptr, query_inverse_ptr, key_inverse_ptr,
        rows, cols, num_rows, num_cols, dim, BLOCK_ROWS, BLOCK_COLS, BLOCK_DEPTH, PRECISION,
    )  # fmt: skip
    counts = (cols < num_cols)[None, :]
    logits = s * tl.load(scale_ptr)
    if SPECIAL == POSITIVE:
        counts = counts & (is_special(special_ptr, rows, cols, num_rows) == 0)
    if SPECIAL == OWN_NEGATIVE:
        logits += tl.where(is_special(special_ptr, rows, cols, num_rows), own_bias, 0.0)
    if GROUPS == EXCLUDED:
        counts = counts & (same_group(query_group_ptr, key_group_ptr, rows, cols, num_rows, num_cols) == 0)

    offset = tl.load(offset_ptr + tl.minimum(rows, num_rows - 1))
    e = tl.where(counts, tl.exp(logits - offset[:, None]), 0.0)
    store_sums(partials_ptr, plane_stride, EXP_SUM, col_tile, rows, num_rows, tl.sum(e, axis=1))
    hardest = tl.max(tl.where(counts, s, float("-inf")), axis=1)
    store_sums(partials_ptr, plane_stride, HARDEST, col_tile, rows, num_rows, hardest)
    if WANTS_DOT:
        dot = tl.sum(tl.where(counts, e * s, 0.0), axis=1)
        store_sums(partials_ptr, plane_stride, DOT, col_tile, rows, num_rows, dot)
    exp_ptrs = (exp_ptr + rows.to(tl.int64) * exp_stride)[:, None] + cols[None, :]
    inside = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    tl.store(exp_ptrs, (e * amplitude).to(exp_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sum_of_exp(logits, counts, AXIS: tl.constexpr):
    """The maximum m of the logits that count, −inf where there is none, and Σ exp(ℓ − m)."""
    most = tl.max(tl.where(counts, logits, float("-inf")), axis=AXIS)
    reference = tl.where(most == float("-inf"), 0.0, most)
    e = tl.where(counts, tl.exp(logits - tl.expand_dims(reference, AXIS)), 0.0)
    return most, tl.sum(e, axis=AXIS)


@triton.jit
def statistics_kernel(
    query_ptr,  # (num_rows, dim)
    key_ptr,  # (num_cols, dim)
    query_away_ptr,  # (1,) int64
    key_away_ptr,  # (1,) int64
    query_inverse_ptr,  # (num_rows,)
    key_inverse_ptr,  # (num_cols,)
    scale_ptr,  # (1,)
    special_ptr,  # (num_rows,) int64
    query_group_ptr,  # (num_rows,) int64
    key_group_ptr,  # (num_cols,) int64
    positive_logit_ptr,  # (num_rows,)
    partials_ptr,  # out (4, column tiles, num_rows): EXP_SUM, HARDEST, MAX, POSITIVES_SHIFT
    column_partials_ptr,  # out (2, row tiles, num_cols): Σ exp(ℓ − max), max, down the columns
    num_rows,
    num_cols,
    dim,
    plane_stride,
    column_plane_stride,
    own_bias,
    SPECIAL: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    """What one tile adds to its rows' (and columns') log-sum-exp. Stores no similarity."""
    row_tile, col_tile = tile_of_program(num_rows, num_cols, BLOCK_ROWS, BLOCK_COLS, BAND)
    rows = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    s = similarities(
        query_ptr, key_ptr, query_away_ptr, key_away_ptr, query_inverse_ptr, key_inverse_ptr,
        rows, cols, num_rows, num_cols, dim, BLOCK_ROWS, BLOCK_COLS, BLOCK_DEPTH, PRECISION,
    )  # fmt: skip
    counts = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    logits = s * tl.load(scale_ptr)
    if SPECIAL == POSITIVE:
        counts = counts & (is_special(special_ptr, rows, cols, num_rows) == 0)
    if SPECIAL == OWN_NEGATIVE:
        logits += tl.where(is_special(special_ptr, rows, cols, num_rows), own_bias, 0.0)
    is_negative = counts
    if GROUPS == EXCLUDED:
        counts = counts & (same_group(query_group_ptr, key_group_ptr, rows, cols, num_rows, num_cols) == 0)
        is_negative = counts
    if GROUPS == POSITIVES:
        in_group = same_group(query_group_ptr, key_group_ptr, rows, cols, num_rows, num_cols)
        is_negative = counts & (in_group == 0)
        positive_logit = tl.load(positive_logit_ptr + tl.minimum(rows, num_rows - 1))
        shift = tl.sum(tl.where(counts & in_group, logits - positive_logit[:, None], 0.0), axis=1)
        store_sums(partials_ptr, plane_stride, POSITIVES_SHIFT, col_tile, rows, num_rows, shift)

    hardest = tl.max(tl.where(is_negative, s, float("-inf")), axis=1)
    store_sums(partials_ptr, plane_stride, HARDEST, col_tile, rows, num_rows, hardest)
    most, total = sum_of_exp(logits, counts, 1)
    store_sums(partials_ptr, plane_stride, MAX, col_tile, rows, num_rows, most)
    store_sums(partials_ptr, plane_stride, EXP_SUM, col_tile, rows, num_rows, total)
    if HAS_COLUMNS:
        most, total = sum_of_exp(logits, counts, 0)
        store_sums(column_partials_ptr, column_plane_stride, 0, row_tile, cols, num_cols, total)
        store_sums(column_partials_ptr, column_plane_stride, 1, row_tile, cols, num_cols, most)


@triton.jit
def slope_kernel(
    query_ptr,  # (num_rows, dim)
    key_ptr,  # (num_cols, dim)
    query_away_ptr,  # (1,) int64
    key_away_ptr,  # (1,) int64
    query_inverse_ptr,  # (num_rows,)
    key_inverse_ptr,  # (num_cols,)
    scale_ptr,  # (1,)
    row_offset_ptr,  # (num_rows,)
    row_factor_ptr,  # (num_rows,)
    positives_share_ptr,  # (num_rows,) subtracted at the further positives
    column_offset_ptr,  # (num_cols,)
    column_factor_ptr,  # (num_cols,)
    special_ptr,  # (num_rows,) int64
    query_group_ptr,  # (num_rows,) int64
    key_group_ptr,  # (num_cols,) int64
    slope_ptr,  # out (num_rows, num_cols)
    dot_ptr,  # out (column tiles, num_rows): Σ s · slope
    num_rows,
    num_cols,
    dim,
    slope_stride,
    own_bias,
    SPECIAL: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    WANTS_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    """One tile of ∂loss/∂s: the row's softmax, the column's where the loss is symmetric, less the positives' share."""
    row_tile, col_tile = tile_of_program(num_rows, num_cols, BLOCK_ROWS, BLOCK_COLS, BAND)
    rows = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    s = similarities(
        query_ptr, key_ptr, query_away_ptr, key_away_ptr, query_inverse_ptr, key_inverse_ptr,
        rows, cols, num_rows, num_cols, dim, BLOCK_ROWS, BLOCK_COLS, BLOCK_DEPTH, PRECISION,
    )  # fmt: skip
    logits = s * tl.load(scale_ptr)
    if SPECIAL == OWN_NEGATIVE:
        logits += tl.where(is_special(special_ptr, rows, cols, num_rows), own_bias, 0.0)
    row = tl.minimum(rows, num_rows - 1)
    slope = tl.exp(logits - tl.load(row_offset_ptr + row)[:, None]) * tl.load(row_factor_ptr + row)[:, None]
    if HAS_COLUMNS:
        col = tl.minimum(cols, num_cols - 1)
        by_column = tl.exp(logits - tl.load(column_offset_ptr + col)[None, :])
        slope += by_column * tl.load(column_factor_ptr + col)[None, :]
    counts = (cols < num_cols)[None, :]
    if SPECIAL == POSITIVE:
        counts = counts & (is_special(special_ptr, rows, cols, num_rows) == 0)
    if GROUPS != ORDINARY:
        in_group = same_group(query_group_ptr, key_group_ptr, rows, cols, num_rows, num_cols)
        if GROUPS == EXCLUDED:
            counts = counts & (in_group == 0)
        else:
            slope -= tl.where(in_group, tl.load(positives_share_ptr + row)[:, None], 0.0)
    slope = tl.where(counts, slope, 0.0)
    if WANTS_DOT:
        dot = tl.sum(tl.where(counts, slope * s, 0.0), axis=1)
        store_sums(dot_ptr, 0, 0, col_tile, rows, num_rows, dot)
    slope_ptrs = (slope_ptr + rows.to(tl.int64) * slope_stride)[:, None] + cols[None, :]
    inside = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    tl.store(slope_ptrs, slope.to(slope_ptr.dtype.element_ty), mask=inside)
