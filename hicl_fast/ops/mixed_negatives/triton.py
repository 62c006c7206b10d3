"""Hard-negative mixing through kernels/mixed_negatives.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hicl_fast.kernels import mixed_negatives as kernels
from hicl_fast.ops.common.constants import NORM_FLOOR, VANISHING
from hicl_fast.ops.common.numbers import sum_type
from hicl_fast.ops.common.triton import on_device
from hicl_fast.ops.common.unit_rows import SQUARES, UnitRows
from hicl_fast.ops.mixed_negatives import torch as chunked

LARGEST_K = 32  # a program keeps the k×k Gram matrix in registers, and 64×64 spills
BLOCK_PAIRS = 32
BLOCK_DIM = 64
NUM_WARPS = 4


def forward(
    query: Tensor,  # (N, D)
    bank: Tensor,  # (B, D)
    index: Tensor,  # (N, k)
    pairs: Tensor,  # (N, m, 2)
    alpha: float,
) -> tuple[Tensor, Tensor]:  # (N, m), (N, m): cosines, 1 / ‖g‖
    if index.shape[1] > LARGEST_K:
        return chunked.forward(query, bank, index, pairs, alpha)
    dtype = sum_type(query, bank)
    queries = UnitRows.of(query.detach(), dtype)
    cosine = query.new_empty(pairs.shape[:2], dtype=dtype)
    inverse_norm = torch.empty_like(cosine)
    if cosine.numel():
        with on_device(query):
            kernels.cosine_kernel[(query.shape[0],)](
                *_operands(queries.rows, bank, index, pairs, alpha), cosine, inverse_norm,
                *_sizes(query, index, pairs), VANISHING * torch.finfo(dtype).eps, NORM_FLOOR**2,
                **_options(index, dtype),
            )  # fmt: skip
    return cosine, inverse_norm


def backward(
    query: Tensor,
    bank: Tensor,
    index: Tensor,
    pairs: Tensor,
    alpha: float,
    cosine: Tensor,  # (N, m)
    inverse_norm: Tensor,  # (N, m)
    cosine_grad: Tensor,  # (N, m)
    wanted: list[bool],  # of query, bank
) -> tuple[Tensor, Tensor]:
    if index.shape[1] > LARGEST_K or cosine.numel() == 0:
        return chunked.backward(query, bank, index, pairs, alpha, cosine, inverse_norm, cosine_grad, wanted)
    dtype = sum_type(query, bank)
    queries = UnitRows.of(query.detach(), dtype)
    unit = queries.rows
    unit_grad = torch.empty_like(unit) if wanted[0] else None
    bank_grad = torch.zeros_like(bank, dtype=dtype, memory_format=torch.contiguous_format) if wanted[1] else None
    for rows in chunked.chunks(index, pairs, query.shape[1], dtype):
        chosen = index[rows]
        addition = unit.new_empty(*chosen.shape, query.shape[1]) if wanted[1] else None  # (R, k, D)
        with on_device(query):
            kernels.gradient_kernel[(chosen.shape[0],)](
                *_operands(unit[rows], bank, chosen, pairs[rows], alpha),
                cosine[rows].contiguous(), inverse_norm[rows].contiguous(), cosine_grad[rows].contiguous(),
                None if unit_grad is None else unit_grad[rows], addition, *_sizes(query, index, pairs),
                **_options(index, dtype),
            )  # fmt: skip
        if bank_grad is not None and addition is not None:
            chunked.add_in_order(bank_grad, chosen, addition)
    query_grad = query.new_empty(0)
    if unit_grad is not None:
        query_grad = queries.gradient(unit_grad).to(query.dtype)
    return query_grad, bank.new_empty(0) if bank_grad is None else bank_grad.to(bank.dtype)


def _operands(unit_query: Tensor, bank: Tensor, index: Tensor, pairs: Tensor, alpha: float) -> list[Tensor]:
    share = torch.full((1,), alpha, dtype=unit_query.dtype, device=unit_query.device)
    return [x.detach().contiguous() for x in (unit_query, bank, index, pairs, share)]


def _sizes(query: Tensor, index: Tensor, pairs: Tensor) -> tuple[int, int, int]:
    return index.shape[1], pairs.shape[1], query.shape[1]


def _options(index: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    limits = SQUARES[dtype]
    return {
        "MOST": limits.most**2,
        "SHRINK": limits.shrink,
        "SUM_TYPE": tl.float64 if dtype == torch.float64 else tl.float32,
        "BLOCK_K": max(16, triton.next_power_of_2(index.shape[1])),  # the least a matrix product takes
        "BLOCK_PAIRS": BLOCK_PAIRS,
        "BLOCK_DIM": BLOCK_DIM,
        "num_warps": NUM_WARPS,
    }
