"""Tiles of scaled cosine similarities ℓ = scale · (q·k) / (‖q‖ ‖k‖), and what InfoNCE makes of them.

Three kernels over the same tile: ``statistics_kernel`` keeps sums only, ``exp_kernel`` stores exp(ℓ − offset), and
``slope_kernel`` stores ∂loss/∂s where that is no product of a row's factor and exp(ℓ − offset). A tile's sums are written
beside those of the other tiles: no atomics, so every run gives the same bits. There is a program a tile or, with
PERSISTENT, one a multiprocessor: then a tile's operands are on their way while the one before it ends. ``query`` and
``key`` are pointers or, with DESCRIBED, descriptors of blocks that the hardware copies.

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


# One loop over tiles and depth lets a tile's loads start before the one before it ends. With Triton 3.6 that was measured
# to be faster (1.62 ms instead of 1.78, see kernels/tiles.py); later ones then spill.
FLATTENS = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7))

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(2.0**-126)  # the smallest number that isn't taken for 0


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
def inverses(inverse_ptr, at, num):
    """1 / ‖x‖ of the rows as products have them."""
    return inverse_of_operand(tl.load(inverse_ptr + tl.minimum(at, num - 1)))


@triton.jit
def same_group(query_group_ptr, key_group_ptr, rows, cols, num_rows, num_cols):
    """Whether row and column are of one group, (BLOCK_ROWS, BLOCK_COLS)."""
    query_group = tl.load(query_group_ptr + tl.minimum(rows, num_rows - 1))
    key_group = tl.load(key_group_ptr + tl.minimum(cols, num_cols - 1))
    return query_group[:, None] == key_group[None, :]


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
def row_slope(query_inverse, scale_ptr):
    """What makes the logit's power of 2 of q·k / ‖k‖, (BLOCK_ROWS,)."""
    slope = query_inverse * (tl.load(scale_ptr) * LOG2_E)
    return tl.where(slope == 0.0, TINY, slope)  # of a zero row: −∞ times 0 is no number


@triton.jit
def cosine(most, query_inverse):
    """The similarity of the largest q·k / ‖k‖; −inf where there is none."""
    return tl.where(most == float("-inf"), most, most * query_inverse)


@triton.jit
def store_sums(partials_ptr, plane_stride, plane, col_tile, rows, num_rows, values):
    at = partials_ptr + tl.cast(plane_stride, tl.int64) * plane + col_tile.to(tl.int64) * num_rows + rows
    tl.store(at, values, mask=rows < num_rows)


@triton.jit
def exp_kernel(
    query,  # (num_rows, dim)
    key,  # (num_cols, dim)
    query_inverse_ptr,  # (num_rows,)
    key_inverse_ptr,  # (num_cols,)
    scale_ptr,  # (1,)
    offset_ptr,  # (num_rows,) subtracted from the logits
    special_ptr,  # (num_rows,) int64
    query_group_ptr,  # (num_rows,) int64
    key_group_ptr,  # (num_cols,) int64
    exp_out,  # out (num_rows, num_cols): amplitude · exp(ℓ − offset), 0 for a column that is left out
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
    DESCRIBED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BAND: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """Tiles of exp(ℓ − offset), and by row their sums, their products with s, and the largest s.

    What every element costs is what a tile's end costs, so it is little: y = q·k / ‖k‖ in place of the similarity, whose
    1 / ‖q‖ is left to the row's factor of the exponent and to the row's sums, and exp as a power of 2. A column that is
    left out has y = −∞, and only tiles that have one look for it.
    """
    num_tiles = tl.cdiv(num_rows, BLOCK_ROWS) * tl.cdiv(num_cols, BLOCK_COLS)
    for program in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTENS and PERSISTENT):
        row_tile, col_tile = tile_at(program, num_rows, num_cols, BLOCK_ROWS, BLOCK_COLS, BAND)
        first_row, first_col = row_tile * BLOCK_ROWS, col_tile * BLOCK_COLS
        rows, cols = first_row + tl.arange(0, BLOCK_ROWS), first_col + tl.arange(0, BLOCK_COLS)
        total = products(
            query, key, first_row, first_col, num_rows, num_cols, dim,
            BLOCK_ROWS, BLOCK_COLS, BLOCK_DEPTH, PRECISION, DESCRIBED,
        )  # fmt: skip
        y = total * inverses(key_inverse_ptr, cols, num_cols)[None, :]
        query_inverse = inverses(query_inverse_ptr, rows, num_rows)
        has_left_out = first_col + BLOCK_COLS > num_cols
        if SPECIAL != NOTHING:
            special = special_columns(special_ptr, rows, num_rows)
        if SPECIAL == POSITIVE:
            has_left_out = has_left_out | any_within(special, first_col, BLOCK_COLS)
        if has_left_out:
            counts = (cols < num_cols)[None, :]
            if SPECIAL == POSITIVE:
                counts = counts & (cols[None, :] != special[:, None])
            y = tl.where(counts, y, float("-inf"))
        if GROUPS == EXCLUDED:
            in_group = same_group(query_group_ptr, key_group_ptr, rows, cols, num_rows, num_cols)
            y = tl.where(in_group, float("-inf"), y)
        hardest = cosine(tl.max(y, axis=1), query_inverse)
        store_sums(partials_ptr, plane_stride, HARDEST, col_tile, rows, num_rows, hardest)

        offset = tl.load(offset_ptr + tl.minimum(rows, num_rows - 1))
        offset = tl.where(offset == float("-inf"), 0.0, offset)  # of a row that has nothing but left-out columns
        shift = offset * LOG2_E - tl.log2(amplitude)
        exponent = y * row_slope(query_inverse, scale_ptr)[:, None] - shift[:, None]
        if SPECIAL == OWN_NEGATIVE:
            exponent += tl.where(cols[None, :] == special[:, None], own_bias * LOG2_E, 0.0)
        e = tl.exp2(exponent)
        store_sums(partials_ptr, plane_stride, EXP_SUM, col_tile, rows, num_rows, tl.sum(e, axis=1) / amplitude)
        if WANTS_DOT:
            dot = tl.sum(tl.where(e == 0.0, 0.0, e * y), axis=1) * query_inverse / amplitude
            store_sums(partials_ptr, plane_stride, DOT, col_tile, rows, num_rows, dot)
        if DESCRIBED:
            exp_out.store([first_row, first_col], e.to(exp_out.dtype))
        else:
            exp_ptrs = (exp_out + rows.to(tl.int64) * exp_stride)[:, None] + cols[None, :]
            inside = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
            tl.store(exp_ptrs, e.to(exp_out.dtype.element_ty), mask=inside)


@triton.jit
def sum_of_exp2(x, AXIS: tl.constexpr):
    """The maximum m of the powers, −inf where there is none, and Σ 2^(x − m)."""
    most = tl.max(x, axis=AXIS)
    reference = tl.where(most == float("-inf"), 0.0, most)
    return most, tl.sum(tl.exp2(x - tl.expand_dims(reference, AXIS)), axis=AXIS)


@triton.jit
def sum_of_exp(logits, counts, AXIS: tl.constexpr):
    """The maximum m of the logits that count, −inf where there is none, and Σ exp(ℓ − m)."""
    most = tl.max(tl.where(counts, logits, float("-inf")), axis=AXIS)
    reference = tl.where(most == float("-inf"), 0.0, most)
    e = tl.where(counts, tl.exp(logits - tl.expand_dims(reference, AXIS)), 0.0)
    return most, tl.sum(e, axis=AXIS)


@triton.jit
def statistics_kernel(
    query,  # (num_rows, dim)
    key,  # (num_cols, dim)
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
    DESCRIBED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BAND: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """What one tile adds to its rows' (and columns') log-sum-exp. Stores no similarity."""
    num_tiles = tl.cdiv(num_rows, BLOCK_ROWS) * tl.cdiv(num_cols, BLOCK_COLS)
    for program in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTENS and PERSISTENT):
        row_tile, col_tile = tile_at(program, num_rows, num_cols, BLOCK_ROWS, BLOCK_COLS, BAND)
        first_row, first_col = row_tile * BLOCK_ROWS, col_tile * BLOCK_COLS
        rows, cols = first_row + tl.arange(0, BLOCK_ROWS), first_col + tl.arange(0, BLOCK_COLS)
        total = products(
            query, key, first_row, first_col, num_rows, num_cols, dim,
            BLOCK_ROWS, BLOCK_COLS, BLOCK_DEPTH, PRECISION, DESCRIBED,
        )  # fmt: skip
        y = total * inverses(key_inverse_ptr, cols, num_cols)[None, :]
        query_inverse = inverses(query_inverse_ptr, rows, num_rows)
        has_left_out = (first_row + BLOCK_ROWS > num_rows) | (first_col + BLOCK_COLS > num_cols)
        if SPECIAL != NOTHING:
            special = special_columns(special_ptr, rows, num_rows)
        if SPECIAL == POSITIVE:
            has_left_out = has_left_out | any_within(special, first_col, BLOCK_COLS)
        if has_left_out:
            counts = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
            if SPECIAL == POSITIVE:
                counts = counts & (cols[None, :] != special[:, None])
            y = tl.where(counts, y, float("-inf"))
        if GROUPS == EXCLUDED:
            in_group = same_group(query_group_ptr, key_group_ptr, rows, cols, num_rows, num_cols)
            y = tl.where(in_group, float("-inf"), y)
        x = y * row_slope(query_inverse, scale_ptr)[:, None]  # the logit's power of 2
        if SPECIAL == OWN_NEGATIVE:
            x += tl.where(cols[None, :] == special[:, None], own_bias * LOG2_E, 0.0)
        if GROUPS == POSITIVES:
            in_group = same_group(query_group_ptr, key_group_ptr, rows, cols, num_rows, num_cols)
            positive_logit = tl.load(positive_logit_ptr + tl.minimum(rows, num_rows - 1))
            is_positive = in_group & (y != float("-inf"))
            shift = tl.sum(tl.where(is_positive, x * LN_2 - positive_logit[:, None], 0.0), axis=1)
            store_sums(partials_ptr, plane_stride, POSITIVES_SHIFT, col_tile, rows, num_rows, shift)
            y = tl.where(in_group, float("-inf"), y)

        hardest = cosine(tl.max(y, axis=1), query_inverse)
        store_sums(partials_ptr, plane_stride, HARDEST, col_tile, rows, num_rows, hardest)
        most, total = sum_of_exp2(x, 1)
        store_sums(partials_ptr, plane_stride, MAX, col_tile, rows, num_rows, most * LN_2)
        store_sums(partials_ptr, plane_stride, EXP_SUM, col_tile, rows, num_rows, total)
        if HAS_COLUMNS:
            most, total = sum_of_exp2(x, 0)
            store_sums(column_partials_ptr, column_plane_stride, 0, row_tile, cols, num_cols, total)
            store_sums(column_partials_ptr, column_plane_stride, 1, row_tile, cols, num_cols, most * LN_2)


@triton.jit
def slope_kernel(
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
    query_group_ptr,  # (num_rows,) int64
    key_group_ptr,  # (num_cols,) int64
    slope_out,  # out (num_rows, num_cols)
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
    DESCRIBED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BAND: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """One tile of ∂loss/∂s: the row's softmax, the column's where the loss is symmetric, less the positives' share."""
    num_tiles = tl.cdiv(num_rows, BLOCK_ROWS) * tl.cdiv(num_cols, BLOCK_COLS)
    for program in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTENS and PERSISTENT):
        row_tile, col_tile = tile_at(program, num_rows, num_cols, BLOCK_ROWS, BLOCK_COLS, BAND)
        first_row, first_col = row_tile * BLOCK_ROWS, col_tile * BLOCK_COLS
        rows, cols = first_row + tl.arange(0, BLOCK_ROWS), first_col + tl.arange(0, BLOCK_COLS)
        total = products(
            query, key, first_row, first_col, num_rows, num_cols, dim,
            BLOCK_ROWS, BLOCK_COLS, BLOCK_DEPTH, PRECISION, DESCRIBED,
        )  # fmt: skip
        y = total * inverses(key_inverse_ptr, cols, num_cols)[None, :]
        query_inverse = inverses(query_inverse_ptr, rows, num_rows)
        x = y * row_slope(query_inverse, scale_ptr)[:, None]  # the logit's power of 2
        has_left_out = first_col + BLOCK_COLS > num_cols
        if SPECIAL != NOTHING:
            special = special_columns(special_ptr, rows, num_rows)
        if SPECIAL == OWN_NEGATIVE:
            x += tl.where(cols[None, :] == special[:, None], own_bias * LOG2_E, 0.0)
        if SPECIAL == POSITIVE:
            has_left_out = has_left_out | any_within(special, first_col, BLOCK_COLS)
        row = tl.minimum(rows, num_rows - 1)
        row_shift, row_factor = tl.load(row_offset_ptr + row) * LOG2_E, tl.load(row_factor_ptr + row)
        slope = tl.exp2(x - row_shift[:, None]) * row_factor[:, None]
        if HAS_COLUMNS:
            col = tl.minimum(cols, num_cols - 1)
            column_shift, column_factor = tl.load(column_offset_ptr + col) * LOG2_E, tl.load(column_factor_ptr + col)
            slope += tl.exp2(x - column_shift[None, :]) * column_factor[None, :]
        if GROUPS != ORDINARY:
            in_group = same_group(query_group_ptr, key_group_ptr, rows, cols, num_rows, num_cols)
            if GROUPS == EXCLUDED:
                slope = tl.where(in_group, 0.0, slope)
            else:
                slope -= tl.where(in_group, tl.load(positives_share_ptr + row)[:, None], 0.0)
        if has_left_out:
            counts = (cols < num_cols)[None, :]
            if SPECIAL == POSITIVE:
                counts = counts & (cols[None, :] != special[:, None])
            slope = tl.where(counts, slope, 0.0)
        if WANTS_DOT:
            dot = tl.sum(slope * y, axis=1) * query_inverse
            store_sums(dot_ptr, 0, 0, col_tile, rows, num_rows, dot)
        if DESCRIBED:
            slope_out.store([first_row, first_col], slope.to(slope_out.dtype))
        else:
            slope_ptrs = (slope_out + rows.to(tl.int64) * slope_stride)[:, None] + cols[None, :]
            inside = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
            tl.store(slope_ptrs, slope.to(slope_out.dtype.element_ty), mask=inside)
