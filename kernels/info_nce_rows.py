"""What InfoNCE makes of a row's sums: its loss, and the factors that its gradients' products take.

In PyTorch this is some twenty operations on N numbers, each a launch; the launches, not the numbers, take the time.
"""

# ruff: noqa: N803
import triton
import triton.language as tl
from hicl_fast.kernels.similarity import DOT, EXP_SUM, HARDEST


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
def exp_rows_kernel(
    partials_ptr,  # (3, num_tiles, num_rows): EXP_SUM, HARDEST, DOT
    positive_ptr,  # (num_rows,) similarity of the positive, its margin counted
    margin_slope_ptr,  # (num_rows,) its derivative by the similarity; None: 1
    scale_ptr,  # (1,)
    negative_lse_ptr,  # out (num_rows,)
    hardest_ptr,  # out (num_rows,)
    loss_ptr,  # out (num_rows,)
    factor_ptr,  # out (num_rows,): of what is stored for a negative, ∂loss/∂s
    coefficient_ptr,  # out (num_rows,) ∂loss/∂s of the positive
    scale_slope_ptr,  # out (num_rows,) ∂loss/∂scale
    num_rows,
    num_tiles,
    plane_stride,
    offset,  # that was subtracted from every logit
    row_weight,
    HAS_MARGIN: tl.constexpr,
    WANTS_DOT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
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
    x = negative_lse - positive_logit
    t = tl.exp(-tl.abs(x))
    rest = log1p_of_fraction(t)
    lse = tl.where(x > 0.0, negative_lse, positive_logit) + rest
    negative_share = tl.where(x > 0.0, 1.0, t) / (1.0 + t) * row_weight
    factor = tl.exp(offset - lse) * row_weight
    coefficient = -negative_share * scale
    if HAS_MARGIN:
        coefficient *= tl.load(margin_slope_ptr + rows, mask=inside, other=0.0)
    tl.store(negative_lse_ptr + rows, negative_lse, mask=inside)
    tl.store(hardest_ptr + rows, hardest, mask=inside)
    tl.store(loss_ptr + rows, tl.where(x > 0.0, x, 0.0) + rest, mask=inside)
    tl.store(factor_ptr + rows, factor * scale, mask=inside)
    tl.store(coefficient_ptr + rows, coefficient, mask=inside)
    if WANTS_DOT:
        tl.store(scale_slope_ptr + rows, factor * dot - negative_share * positive, mask=inside)
