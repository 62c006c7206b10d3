"""A float32 product that is never rounded to TF32, whatever the process allows the library's own products."""

# ruff: noqa: N803
import torch
import triton
import triton.language as tl
from hicl_fast.kernels.device import architecture
from hicl_fast.kernels.tiles import PRODUCT, Tile, similarity_tile
from torch import Tensor


@triton.jit
def product_kernel(
    a_ptr,  # (num_rows, depth)
    b_ptr,  # (depth, num_cols)
    out_ptr,  # (num_rows, num_cols) float32
    num_rows,
    num_cols,
    depth,
    a_row_stride,
    a_col_stride,
    b_row_stride,
    b_col_stride,
    out_row_stride,
    out_col_stride,
    ADDS: tl.constexpr,  # to what is in out
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """``out = a @ b`` or ``out += a @ b``, a program for each tile of out."""
    col_tiles = tl.cdiv(num_cols, BLOCK_COLS)
    program = tl.program_id(0)
    rows = (program // col_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    cols = (program % col_tiles * BLOCK_COLS + tl.arange(0, BLOCK_COLS)).to(tl.int64)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    at = tl.arange(0, BLOCK_DEPTH).to(tl.int64)
    a_at = a_ptr + rows[:, None] * a_row_stride + at[None, :] * a_col_stride
    b_at = b_ptr + at[:, None] * b_row_stride + cols[None, :] * b_col_stride
    for start in range(0, depth, BLOCK_DEPTH):
        is_left = at < depth - start
        a = tl.load(a_at, mask=(rows < num_rows)[:, None] & is_left[None, :], other=0.0)
        b = tl.load(b_at, mask=is_left[:, None] & (cols < num_cols)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        a_at += BLOCK_DEPTH * a_col_stride
        b_at += BLOCK_DEPTH * b_row_stride
    out_at = out_ptr + rows[:, None] * out_row_stride + cols[None, :] * out_col_stride
    inside = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    if ADDS:
        total += tl.load(out_at, mask=inside, other=0.0)
    tl.store(out_at, total, mask=inside)


def product(a: Tensor, b: Tensor, onto: Tensor | None = None, tile: Tile | None = None) -> Tensor:
    """``a @ b``, (R, K), (K, C) -> (R, C), float32 in every digit; added to ``onto`` in place if that is given.

    Any strides, so that either may be a transposed view. ``tile`` stands in for the table's.
    """
    num_rows, num_cols, depth = a.shape[0], b.shape[1], a.shape[1]
    out = torch.empty(num_rows, num_cols, dtype=torch.float32, device=a.device) if onto is None else onto
    if out.numel():
        tile = tile or similarity_tile(architecture(a.device), "fp32", PRODUCT)
        grid = (triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_cols, tile.cols),)
        product_kernel[grid](
            a, b, out, num_rows, num_cols, depth, *a.stride(), *b.stride(), *out.stride(),
            ADDS=onto is not None, **tile.blocks(),
        )  # fmt: skip
    return out
