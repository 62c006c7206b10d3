"""Ragged weighted pooling: H_b = Σ_j w_j h_j / Σ_j w_j over the rows of sequence b, and its gradients.

A program goes through one sequence's segments in order: no atomics, so every run gives the same bits.
"""

# ruff: noqa: N803
import torch
import triton
import triton.language as tl
from hicl_fast.kernels.tiles import row_tile
from torch import Tensor

POOL_BLOCK_DIM = 512  # a program's share of the dimensions: 4 a thread
_POOL_WARPS = 4


@triton.jit
def load_weight(weights_ptr, segment, HAS_WEIGHTS: tl.constexpr, SUM_TYPE: tl.constexpr):
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + segment).to(SUM_TYPE)
    else:
        weight = tl.full((), 1.0, dtype=SUM_TYPE)
    return weight


@triton.jit
def pool(
    segments_ptr, weights_ptr, begin, end, dim, at, inside,
    HAS_WEIGHTS: tl.constexpr, SUM_TYPE: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """The weighted mean over ``begin:end`` in the dimensions ``at``, and 1 / Σ w (0 where the sum is 0)."""
    total = tl.zeros((BLOCK_DIM,), dtype=SUM_TYPE)
    total_weight = tl.full((), 0.0, dtype=SUM_TYPE)
    for segment in range(begin, end):
        weight = load_weight(weights_ptr, segment, HAS_WEIGHTS, SUM_TYPE)
        total += weight * tl.load(segments_ptr + segment * dim + at, mask=inside, other=0.0).to(SUM_TYPE)
        total_weight += weight
    inverse = tl.where(total_weight == 0.0, 0.0, 1.0 / total_weight)
    return total * inverse, inverse


@triton.jit
def pool_kernel(
    segments_ptr,  # (S, dim)
    offsets_ptr,  # (B + 1,) int64
    weights_ptr,  # (S,)
    pooled_ptr,  # out (B, dim)
    dim,
    HAS_WEIGHTS: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    begin, end = tl.load(offsets_ptr + sequence), tl.load(offsets_ptr + sequence + 1)
    pooled, _ = pool(
        segments_ptr, weights_ptr, begin, end, dim, at, at < dim, HAS_WEIGHTS, SUM_TYPE, BLOCK_DIM
    )  # fmt: skip
    tl.store(pooled_ptr + sequence * dim + at, pooled.to(pooled_ptr.dtype.element_ty), mask=at < dim)


@triton.jit
def segments_gradient_kernel(
    offsets_ptr,  # (B + 1,) int64
    weights_ptr,  # (S,)
    pooled_grad_ptr,  # (B, dim)
    segments_grad_ptr,  # out (S, dim): w_j / Σ w · g_b
    dim,
    HAS_WEIGHTS: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    inside = at < dim
    begin, end = tl.load(offsets_ptr + sequence), tl.load(offsets_ptr + sequence + 1)
    total_weight = tl.full((), 0.0, dtype=SUM_TYPE)
    for segment in range(begin, end):
        total_weight += load_weight(weights_ptr, segment, HAS_WEIGHTS, SUM_TYPE)
    inverse = tl.where(total_weight == 0.0, 0.0, 1.0 / total_weight)
    grad = tl.load(pooled_grad_ptr + sequence * dim + at, mask=inside, other=0.0).to(SUM_TYPE)
    for segment in range(begin, end):
        share = load_weight(weights_ptr, segment, HAS_WEIGHTS, SUM_TYPE) * inverse
        value = (share * grad).to(segments_grad_ptr.dtype.element_ty)
        tl.store(segments_grad_ptr + segment * dim + at, value, mask=inside)


@triton.jit
def weights_gradient_kernel(
    segments_ptr,  # (S, dim)
    offsets_ptr,  # (B + 1,) int64
    weights_ptr,  # (S,)
    pooled_grad_ptr,  # (B, dim)
    weights_grad_ptr,  # out (S,): g_b · (h_j − H_b) / Σ w
    dim,
    SUM_TYPE: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """A program takes whole rows: BLOCK_DIM ≥ dim."""
    sequence = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK_DIM)
    inside = at < dim
    begin, end = tl.load(offsets_ptr + sequence), tl.load(offsets_ptr + sequence + 1)
    pooled, inverse = pool(segments_ptr, weights_ptr, begin, end, dim, at, inside, True, SUM_TYPE, BLOCK_DIM)
    grad = tl.load(pooled_grad_ptr + sequence * dim + at, mask=inside, other=0.0).to(SUM_TYPE)
    for segment in range(begin, end):
        h = tl.load(segments_ptr + segment * dim + at, mask=inside, other=0.0).to(SUM_TYPE)
        value = tl.sum(grad * (h - pooled), axis=0) * inverse
        tl.store(weights_grad_ptr + segment, value.to(weights_grad_ptr.dtype.element_ty))


def pool_segments(segments: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    """(S, D), (B + 1,) int64, (S,) -> (B, D) in the segments' type. All contiguous."""
    num_sequences, dim = offsets.shape[0] - 1, segments.shape[1]
    pooled = segments.new_empty(num_sequences, dim)
    if pooled.numel():
        pool_kernel[_pool_grid(num_sequences, dim)](
            segments, offsets, weights, pooled, dim, weights is not None, _sum_type(segments, weights),
            BLOCK_DIM=_pool_block(dim), num_warps=_POOL_WARPS,
        )  # fmt: skip
    return pooled


def segments_gradient(segments: Tensor, offsets: Tensor, weights: Tensor | None, pooled_grad: Tensor) -> Tensor:
    """(S, D) in the segments' type, from the pooled rows' gradient (B, D)."""
    num_sequences, dim = offsets.shape[0] - 1, segments.shape[1]
    grad = torch.empty_like(segments)
    if grad.numel():
        segments_gradient_kernel[_pool_grid(num_sequences, dim)](
            offsets, weights, pooled_grad, grad, dim, weights is not None, _sum_type(segments, weights),
            BLOCK_DIM=_pool_block(dim), num_warps=_POOL_WARPS,
        )  # fmt: skip
    return grad


def weights_gradient(segments: Tensor, offsets: Tensor, weights: Tensor, pooled_grad: Tensor) -> Tensor:
    """(S,) in the weights' type, from the pooled rows' gradient (B, D)."""
    grad = torch.empty_like(weights)
    tile = row_tile(segments.shape[1])
    if grad.numel():
        weights_gradient_kernel[(offsets.shape[0] - 1,)](
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
