"""Hard-negative mixing: cos(q, g) and 1 / ‖g‖ for g = α n_a + (1 − α) n_b, and what their gradients add up to.

A program takes one row: its k negatives pass through once, a block of dimensions at a time, and leave their k
similarities and their k×k Gram matrix; pairs are then products with a (pairs, k) matrix of weights. In backward a
negative that several rows share gets no atomics: each row writes its k additions, which are summed in order afterwards.
"""

# ruff: noqa: N803
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_K = 32  # a program keeps the k×k Gram matrix in registers, and 64×64 spills
BLOCK_PAIRS = 32
BLOCK_DIM = 64
NUM_WARPS = 4


@triton.jit
def pair_weights(pairs_ptr, row, num_pairs, at, column, alpha, SUM_TYPE: tl.constexpr):
    """(pairs, k): α where the column is the pair's first, 1 − α where it is its second; 0 beyond the last pair."""
    inside = at < num_pairs
    first = tl.load(pairs_ptr + (row * num_pairs + at) * 2, mask=inside, other=-1)
    second = tl.load(pairs_ptr + (row * num_pairs + at) * 2 + 1, mask=inside, other=-1)
    is_first, is_second = column[None, :] == first[:, None], column[None, :] == second[:, None]
    return is_first.to(SUM_TYPE) * alpha + is_second.to(SUM_TYPE) * (1.0 - alpha)


@triton.jit
def load_negatives(bank_ptr, bank_row, has_row, dim, at, SUM_TYPE: tl.constexpr):
    """Dimensions ``at`` of the row's negatives, (k, len(at)); zeros beyond the last."""
    inside = has_row[:, None] & (at < dim)[None, :]
    return tl.load(bank_ptr + bank_row[:, None] * dim + at[None, :], mask=inside, other=0.0).to(SUM_TYPE)


@triton.jit
def products(
    unit_query_ptr, bank_ptr, row, bank_row, column, k, dim, shrinks,
    SUM_TYPE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """The row's similarities (k,) and its Gram matrix (k, k), of negatives times ``shrinks`` (k,)."""
    similarity = tl.zeros((BLOCK_K,), dtype=SUM_TYPE)
    gram = tl.zeros((BLOCK_K, BLOCK_K), dtype=SUM_TYPE)
    for begin in range(0, dim, BLOCK_DIM):
        at = begin + tl.arange(0, BLOCK_DIM)
        negatives = load_negatives(bank_ptr, bank_row, column < k, dim, at, SUM_TYPE) * shrinks[:, None]
        query = tl.load(unit_query_ptr + row * dim + at, mask=at < dim, other=0.0)
        similarity += tl.sum(negatives * query[None, :], axis=1)
        gram = tl.dot(negatives, tl.trans(negatives), acc=gram, input_precision="ieee", out_dtype=SUM_TYPE)
    return similarity, gram


@triton.jit
def diagonal(gram, column):
    return tl.sum(tl.where(column[:, None] == column[None, :], gram, 0.0), axis=1)


@triton.jit
def any_of(condition):
    return tl.max(condition.to(tl.int32), axis=0) > 0


@triton.jit
def shared(weights, shrinks):
    """The pairs' weights (pairs, k) for negatives times ``shrinks`` (k,), and (pairs,) what that makes of ‖g‖.

    Of a long row and one that isn't, the mixture is made as short as the long one. A weight of 0 has no say in it.
    """
    of_both = tl.min(tl.where(weights != 0.0, shrinks[None, :], 1.0), axis=1)
    return weights * (of_both[:, None] / shrinks[None, :]), of_both


@triton.jit
def cosine_kernel(
    unit_query_ptr,  # (N, dim) in SUM_TYPE
    bank_ptr,  # (B, dim)
    index_ptr,  # (N, k) int64
    pairs_ptr,  # (N, num_pairs, 2) int64
    alpha_ptr,  # (1,) in SUM_TYPE, which a number handed to a kernel would not be
    cosine_ptr,  # out (N, num_pairs)
    inverse_norm_ptr,  # out (N, num_pairs): 1 / ‖g‖, 0 where g vanishes
    k,
    num_pairs,
    dim,
    vanishing,  # of ‖g‖² relative to its parts
    floor,  # of ‖g‖²
    MOST: tl.constexpr,  # squared lengths up to which a row is taken as it is
    SHRINK: tl.constexpr,  # what a longer one is multiplied by
    SUM_TYPE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_K)
    alpha = tl.load(alpha_ptr)
    bank_row = tl.load(index_ptr + row * k + column, mask=column < k, other=0)
    shrinks = tl.full((BLOCK_K,), 1.0, dtype=SUM_TYPE)
    similarity, gram = products(
        unit_query_ptr, bank_ptr, row, bank_row, column, k, dim, shrinks, SUM_TYPE, BLOCK_K, BLOCK_DIM
    )
    squares = diagonal(gram, column)
    is_long = (squares < tl.full((), MOST, SUM_TYPE)) == 0  # or NaN
    if any_of(is_long):
        shrinks = tl.where(is_long, tl.full((), SHRINK, SUM_TYPE), shrinks)
        similarity, gram = products(
            unit_query_ptr, bank_ptr, row, bank_row, column, k, dim, shrinks, SUM_TYPE, BLOCK_K, BLOCK_DIM
        )
        squares = diagonal(gram, column)
    for begin in range(0, num_pairs, BLOCK_PAIRS):
        at = begin + tl.arange(0, BLOCK_PAIRS)
        weights = pair_weights(pairs_ptr, row, num_pairs, at, column, alpha, SUM_TYPE)
        weights, of_both = shared(weights, shrinks)
        reached = tl.dot(weights, gram, input_precision="ieee", out_dtype=SUM_TYPE)
        squared = tl.sum(weights * reached, axis=1)
        parts = tl.sum(weights * weights * squares[None, :], axis=1)
        along = tl.sum(weights * similarity[None, :], axis=1)
        vanishes = (squared < vanishing * parts) | ((squared < floor) & (of_both == 1.0))
        inverse = tl.where(vanishes, 0.0, 1.0 / tl.sqrt(tl.where(vanishes, 1.0, squared)))
        place = row * num_pairs + at
        tl.store(inverse_norm_ptr + place, inverse * of_both, mask=at < num_pairs)
        tl.store(cosine_ptr + place, along * inverse, mask=at < num_pairs)


@triton.jit
def has_long_mixture(
    inverse_norm_ptr, row, num_pairs, MOST: tl.constexpr, SUM_TYPE: tl.constexpr, BLOCK_PAIRS: tl.constexpr
):
    """Whether a mixture may be so long that ‖g‖⁻² underflows."""
    found = tl.zeros((BLOCK_PAIRS,), dtype=tl.int1)
    for begin in range(0, num_pairs, BLOCK_PAIRS):
        at = begin + tl.arange(0, BLOCK_PAIRS)
        inverse = tl.load(inverse_norm_ptr + row * num_pairs + at, mask=at < num_pairs, other=0.0)
        found |= (inverse > 0.0) & (inverse * tl.sqrt(tl.full((), MOST, SUM_TYPE)) < 16.0)
    return any_of(found)


@triton.jit
def gradient_kernel(
    unit_query_ptr,  # (N, dim) in SUM_TYPE
    bank_ptr,  # (B, dim)
    index_ptr,  # (N, k) int64
    pairs_ptr,  # (N, num_pairs, 2) int64
    alpha_ptr,  # (1,) in SUM_TYPE, which a number handed to a kernel would not be
    cosine_ptr,  # (N, num_pairs)
    inverse_norm_ptr,  # (N, num_pairs)
    upstream_ptr,  # (N, num_pairs)
    unit_grad_ptr,  # out (N, dim): ∂L/∂q̂ = Σ_c c_c n_c; or None
    addition_ptr,  # out (N, k, dim): c_c q̂ − Σ_e M_ce n_e, this row's share of its negatives' gradients; or None
    k,
    num_pairs,
    dim,
    MOST: tl.constexpr,  # squared lengths up to which a row is taken as it is
    SHRINK: tl.constexpr,  # what a longer one is multiplied by
    SUM_TYPE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """c_c = Σ_p w_pc u_p / ‖g_p‖ and M_ce = Σ_p w_pc w_pe u_p cos_p / ‖g_p‖², w: the pairs' weights."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_K)
    alpha = tl.load(alpha_ptr)
    bank_row = tl.load(index_ptr + row * k + column, mask=column < k, other=0)
    shrinks = tl.full((BLOCK_K,), 1.0, dtype=SUM_TYPE)
    if has_long_mixture(inverse_norm_ptr, row, num_pairs, MOST, SUM_TYPE, BLOCK_PAIRS):
        _, gram = products(
            unit_query_ptr, bank_ptr, row, bank_row, column, k, dim, shrinks, SUM_TYPE, BLOCK_K, BLOCK_DIM
        )
        fits = diagonal(gram, column) < tl.full((), MOST, SUM_TYPE)
        shrinks = tl.where(fits, shrinks, tl.full((), SHRINK, SUM_TYPE))
    along = tl.zeros((BLOCK_K,), dtype=SUM_TYPE)
    across = tl.zeros((BLOCK_K, BLOCK_K), dtype=SUM_TYPE)
    for begin in range(0, num_pairs, BLOCK_PAIRS):
        at = begin + tl.arange(0, BLOCK_PAIRS)
        place, inside = row * num_pairs + at, at < num_pairs
        weights = pair_weights(pairs_ptr, row, num_pairs, at, column, alpha, SUM_TYPE)
        weights, of_both = shared(weights, shrinks)
        inverse = tl.load(inverse_norm_ptr + place, mask=inside, other=0.0) / of_both
        upstream = tl.load(upstream_ptr + place, mask=inside, other=0.0).to(SUM_TYPE) * inverse
        curvature = upstream * tl.load(cosine_ptr + place, mask=inside, other=0.0) * inverse
        along += tl.sum(weights * upstream[:, None], axis=0)
        across = tl.dot(
            tl.trans(weights * curvature[:, None]), weights, acc=across, input_precision="ieee", out_dtype=SUM_TYPE
        )

    for begin in range(0, dim, BLOCK_DIM):
        at = begin + tl.arange(0, BLOCK_DIM)
        negatives = load_negatives(bank_ptr, bank_row, column < k, dim, at, SUM_TYPE) * shrinks[:, None]
        if unit_grad_ptr is not None:
            tl.store(unit_grad_ptr + row * dim + at, tl.sum(along[:, None] * negatives, axis=0), mask=at < dim)
        if addition_ptr is not None:
            query = tl.load(unit_query_ptr + row * dim + at, mask=at < dim, other=0.0)
            pulled = tl.dot(across, negatives, input_precision="ieee", out_dtype=SUM_TYPE)
            tl.store(
                addition_ptr + (row * k + column[:, None]) * dim + at[None, :],
                (along[:, None] * query[None, :] - pulled) * shrinks[:, None],
                mask=(column < k)[:, None] & (at < dim)[None, :],
            )


@dataclass(frozen=True)
class Mixtures:
    """Which rows of the bank are mixed for each query, and how lengths are kept in range."""

    bank: Tensor  # (B, D)
    index: Tensor  # (N, k) int64
    pairs: Tensor  # (N, m, 2) int64
    alpha: float
    most: float  # squared length up to which a row is taken as it is
    shrink: float  # what a longer one is multiplied by

    def operands(self, unit_query: Tensor) -> list[Tensor]:
        share = torch.full((1,), self.alpha, dtype=unit_query.dtype, device=unit_query.device)
        return [x.contiguous() for x in (unit_query, self.bank, self.index, self.pairs, share)]

    def sizes(self) -> tuple[int, int, int]:
        return self.index.shape[1], self.pairs.shape[1], self.bank.shape[1]

    def options(self, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "MOST": self.most,
            "SHRINK": self.shrink,
            "SUM_TYPE": tl.float64 if dtype == torch.float64 else tl.float32,
            "BLOCK_K": max(16, triton.next_power_of_2(self.index.shape[1])),  # the least a matrix product takes
            "BLOCK_PAIRS": BLOCK_PAIRS,
            "BLOCK_DIM": BLOCK_DIM,
            "num_warps": NUM_WARPS,
        }


def cosines(
    unit_query: Tensor,  # (N, D) in the sums' type
    mixtures: Mixtures,
    vanishing: float,  # of ‖g‖² relative to its parts
    floor: float,  # of ‖g‖²
) -> tuple[Tensor, Tensor]:  # (N, m), (N, m): cosines, 1 / ‖g‖
    cosine = unit_query.new_empty(mixtures.pairs.shape[:2])
    inverse_norm = torch.empty_like(cosine)
    if cosine.numel():
        cosine_kernel[(unit_query.shape[0],)](
            *mixtures.operands(unit_query), cosine, inverse_norm, *mixtures.sizes(), vanishing, floor,
            **mixtures.options(unit_query.dtype),
        )  # fmt: skip
    return cosine, inverse_norm


def gradients(
    unit_query: Tensor,  # (N, D) in the sums' type
    mixtures: Mixtures,
    cosine: Tensor,  # (N, m)
    inverse_norm: Tensor,  # (N, m)
    upstream: Tensor,  # (N, m)
    unit_grad: Tensor | None,  # out (N, D) by the unit query; None: not wanted
    addition: Tensor | None,  # out (N, k, D) to the gradients of the bank's rows; None: not wanted
) -> None:
    gradient_kernel[(unit_query.shape[0],)](
        *mixtures.operands(unit_query), cosine.contiguous(), inverse_norm.contiguous(), upstream.contiguous(),
        unit_grad, addition, *mixtures.sizes(), **mixtures.options(unit_query.dtype),
    )  # fmt: skip
