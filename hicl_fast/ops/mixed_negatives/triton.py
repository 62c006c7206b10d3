"""Hard-negative mixing through kernels/mixed_negatives.py."""

from __future__ import annotations

import torch
from torch import Tensor

from hicl_fast.kernels import mixed_negatives as kernels
from hicl_fast.kernels.mixed_negatives import LARGEST_K, Mixtures
from hicl_fast.ops.common.constants import NORM_FLOOR, VANISHING
from hicl_fast.ops.common.numbers import sum_type
from hicl_fast.ops.common.triton import on_device
from hicl_fast.ops.common.unit_rows import SQUARES, UnitRows
from hicl_fast.ops.mixed_negatives import torch as chunked


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
    unit_query = UnitRows.of(query.detach(), dtype).rows
    with on_device(query):
        mixtures = _mixtures(bank, index, pairs, alpha, dtype)
        return kernels.cosines(unit_query, mixtures, VANISHING * torch.finfo(dtype).eps, NORM_FLOOR**2)


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
        of_rows = None if unit_grad is None else unit_grad[rows]
        with on_device(query):
            mixtures = _mixtures(bank, chosen, pairs[rows], alpha, dtype)
            kernels.gradients(
                unit[rows], mixtures, cosine[rows], inverse_norm[rows], cosine_grad[rows], of_rows, addition
            )
        if bank_grad is not None and addition is not None:
            chunked.add_in_order(bank_grad, chosen, addition)
    query_grad = query.new_empty(0)
    if unit_grad is not None:
        query_grad = queries.gradient(unit_grad).to(query.dtype)
    return query_grad, bank.new_empty(0) if bank_grad is None else bank_grad.to(bank.dtype)


def _mixtures(bank: Tensor, index: Tensor, pairs: Tensor, alpha: float, dtype: torch.dtype) -> Mixtures:
    limits = SQUARES[dtype]
    return Mixtures(bank.detach(), index, pairs, alpha, limits.most**2, limits.shrink)
