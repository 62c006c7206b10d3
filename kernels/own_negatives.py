"""Each query's own columns, ragged: log Σ exp(ℓ) over rows offsets[i] to offsets[i + 1], and its gradients.

A program takes one query and goes through its rows in order: no atomics, so every run gives the same bits. Each row is read
once each way; what is stored of a row is its gradient.
"""

# ruff: noqa: N803
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from hicl_fast.kernels.rows import SHRINK, Rows, is_long
from hicl_fast.kernels.tiles import row_tile
from torch import Tensor


@triton.jit
def unit_row(ptr, inverse_ptr, row, at, dim):
    """A row's unit vector (BLOCK_DIM,), 1 / its length, and what it was multiplied by before that."""
    inverse = tl.load(inverse_ptr + row)
    x = tl.load(ptr + row * dim + at, mask=at < dim, other=0.0).to(tl.float32)
    shrink = tl.where(is_long(inverse), SHRINK, 1.0)
    return (x * shrink) * (inverse / shrink), inverse / shrink, shrink


@triton.jit
def counted_similarity(
    unit_query, unit, limit, query_group_ptr, group_ptr, query, row,
    LIMITED: tl.constexpr, RELATIONS: tl.constexpr,
):  # fmt: skip
    """q̂ · x̂, and whether the rules count the column."""
    similarity = tl.sum(unit_query * unit, axis=0)
    counts = row >= 0
    if LIMITED:
        counts = counts & ((similarity > limit) == 0)
    for relation in tl.static_range(RELATIONS):
        of_query = tl.load(query_group_ptr + query * RELATIONS + relation)
        counts = counts & (of_query != tl.load(group_ptr + row * RELATIONS + relation))
    return similarity, counts


@triton.jit
def log_sum_exp_kernel(
    query_ptr,  # (N, dim)
    query_inverse_ptr,  # (N,)
    rows_ptr,  # (H, dim)
    rows_inverse_ptr,  # (H,)
    offsets_ptr,  # (N + 1,) int64
    scale_ptr,  # (1,)
    limit_ptr,  # (N,)
    query_group_ptr,  # (N, RELATIONS) int64
    group_ptr,  # (H, RELATIONS) int64
    lse_ptr,  # out (N,)
    hardest_ptr,  # out (N,)
    dim,
    hardness,
    LIMITED: tl.constexpr,
    RELATIONS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK_DIM)
    unit_query, _, _ = unit_row(query_ptr, query_inverse_ptr, query, at, dim)
    scale, limit = tl.load(scale_ptr) + hardness, 0.0
    if LIMITED:
        limit = tl.load(limit_ptr + query)
    hardest = tl.full((), float("-inf"), dtype=tl.float32)
    total = tl.full((), 0.0, dtype=tl.float32)
    for row in range(tl.load(offsets_ptr + query), tl.load(offsets_ptr + query + 1)):
        unit, _, _ = unit_row(rows_ptr, rows_inverse_ptr, row, at, dim)
        similarity, counts = counted_similarity(
            unit_query, unit, limit, query_group_ptr, group_ptr, query, row, LIMITED, RELATIONS
        )
        s = tl.where(counts, similarity, float("-inf"))
        most = tl.where(s > hardest, s, hardest)
        reference = tl.where(most == float("-inf"), 0.0, most)
        total = total * tl.exp(scale * (hardest - reference)) + tl.where(
            counts, tl.exp(scale * (similarity - reference)), 0.0
        )
        hardest = most
    reference = tl.where(hardest == float("-inf"), 0.0, hardest)
    tl.store(lse_ptr + query, tl.log(total) + scale * reference)
    tl.store(hardest_ptr + query, hardest)


@triton.jit
def gradient_kernel(
    query_ptr,  # (N, dim)
    query_inverse_ptr,  # (N,)
    rows_ptr,  # (H, dim)
    rows_inverse_ptr,  # (H,)
    offsets_ptr,  # (N + 1,) int64
    scale_ptr,  # (1,)
    limit_ptr,  # (N,)
    query_group_ptr,  # (N, RELATIONS) int64
    group_ptr,  # (H, RELATIONS) int64
    lse_ptr,  # (N,)
    lse_grad_ptr,  # (N,)
    query_grad_ptr,  # out (N, dim)
    rows_grad_ptr,  # out (H, dim)
    scale_grad_ptr,  # out (N,)
    dim,
    hardness,
    floor,
    LIMITED: tl.constexpr,
    RELATIONS: tl.constexpr,
    WANTS_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK_DIM)
    unit_query, query_inverse, query_shrink = unit_row(query_ptr, query_inverse_ptr, query, at, dim)
    scale, limit = tl.load(scale_ptr), 0.0
    if LIMITED:
        limit = tl.load(limit_ptr + query)
    lse, lse_grad = tl.load(lse_ptr + query), tl.load(lse_grad_ptr + query)
    gradient = tl.zeros((BLOCK_DIM,), dtype=tl.float32)
    along = tl.full((), 0.0, dtype=tl.float32)
    for row in range(tl.load(offsets_ptr + query), tl.load(offsets_ptr + query + 1)):
        unit, inverse, shrink = unit_row(rows_ptr, rows_inverse_ptr, row, at, dim)
        similarity, counts = counted_similarity(
            unit_query, unit, limit, query_group_ptr, group_ptr, query, row, LIMITED, RELATIONS
        )
        weight = tl.where(counts, tl.exp((scale + hardness) * similarity - lse) * lse_grad, 0.0)
        along += tl.where(counts, weight * similarity, 0.0)
        gradient += weight * unit
        if WANTS_ROWS:
            radial = tl.where(inverse * floor >= 1.0, 0.0, similarity)  # a row below the floor is divided by a constant
            of_row = (unit_query - radial * unit) * (weight * scale * inverse) * shrink
            tl.store(rows_grad_ptr + row * dim + at, tl.where(counts, of_row, 0.0), mask=at < dim)
    radial = tl.where(query_inverse * floor >= 1.0, 0.0, along)
    gradient = (gradient - radial * unit_query) * (scale * query_inverse) * query_shrink
    tl.store(query_grad_ptr + query * dim + at, gradient, mask=at < dim)
    tl.store(scale_grad_ptr + query, along)


@dataclass(frozen=True)
class Columns:
    """What the kernels take, all contiguous."""

    query: Rows  # (N, D)
    rows: Rows  # (H, D)
    offsets: Tensor  # (N + 1,) int64
    scale: Tensor  # (1,)
    limit: Tensor | None  # (N,)
    query_group: Tensor | None  # (N, G) int64
    group: Tensor | None  # (H, G) int64
    hardness: float
    floor: float  # of lengths

    def arguments(self) -> dict[str, Any]:
        tile = row_tile(self.query.x.shape[1])
        return {
            "query_ptr": self.query.x,
            "query_inverse_ptr": self.query.inverse,
            "rows_ptr": self.rows.x,
            "rows_inverse_ptr": self.rows.inverse,
            "offsets_ptr": self.offsets,
            "scale_ptr": self.scale,
            "limit_ptr": self.limit,
            "query_group_ptr": self.query_group,
            "group_ptr": self.group,
            "dim": self.query.x.shape[1],
            "hardness": self.hardness,
            "LIMITED": self.limit is not None,
            "RELATIONS": 0 if self.group is None else self.group.shape[1],
            "BLOCK_DIM": tile.dim,
            "num_warps": tile.num_warps,
        }


def log_sum_exp(columns: Columns) -> tuple[Tensor, Tensor]:  # (N,), (N,) float32
    lse, hardest = (torch.empty_like(columns.query.inverse) for _ in range(2))
    log_sum_exp_kernel[(lse.shape[0],)](lse_ptr=lse, hardest_ptr=hardest, **columns.arguments())
    return lse, hardest


def gradients(
    columns: Columns,
    lse: Tensor,  # (N,)
    lse_grad: Tensor,  # (N,)
    *,
    wants_rows: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # (N, D), (H, D), (N,) float32
    query_grad = torch.empty_like(columns.query.x, dtype=torch.float32)
    rows_grad = torch.empty_like(columns.rows.x, dtype=torch.float32) if wants_rows else None
    scale_grad = torch.empty_like(lse)
    gradient_kernel[(lse.shape[0],)](
        lse_ptr=lse,
        lse_grad_ptr=lse_grad,
        query_grad_ptr=query_grad,
        rows_grad_ptr=rows_grad,
        scale_grad_ptr=scale_grad,
        floor=columns.floor,
        WANTS_ROWS=wants_rows,
        **columns.arguments(),
    )
    return query_grad, rows_grad, scale_grad
