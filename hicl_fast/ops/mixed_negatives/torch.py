"""Hard-negative mixing in plain PyTorch: chunks of rows, each with its k similarities and its k×k Gram matrix.

With n the row's k negatives (k, D), W the pairs' weights (m, k), α at a pair's first and 1 − α at its second:
‖g‖² = diag(W n nᵀ Wᵀ), cos = W n q̂ / ‖g‖, and with u the upstream gradient, c = Wᵀ (u / ‖g‖) and
M = Wᵀ diag(u cos / ‖g‖²) W: ∂L/∂q̂ = nᵀ c and ∂L/∂n = c q̂ᵀ − M n.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hicl_fast.ops.common.constants import NORM_FLOOR, VANISHING
from hicl_fast.ops.common.numbers import sum_type
from hicl_fast.ops.common.unit_rows import UnitRows, shortened

CHUNK_BYTES = 32 << 20  # of a chunk's negatives


def forward(
    query: Tensor,  # (N, D)
    bank: Tensor,  # (B, D)
    index: Tensor,  # (N, k)
    pairs: Tensor,  # (N, m, 2)
    alpha: float,
) -> tuple[Tensor, Tensor]:  # (N, m), (N, m): cosines, 1 / ‖g‖ of the mixtures as ``_shares`` takes them
    dtype = sum_type(query, bank)
    cosine = query.new_empty(pairs.shape[:2], dtype=dtype)
    inverse_norm = torch.empty_like(cosine)
    for rows in chunks(index, pairs, query.shape[1], dtype):
        unit = UnitRows.of(query[rows], dtype).rows
        negatives, shrink = shortened(bank[index[rows]].to(dtype))  # (R, k, D)
        shares = _shares(pairs[rows], alpha, shrink)
        similarity = (negatives @ unit[:, :, None])[:, :, 0]
        gram = negatives @ negatives.transpose(1, 2)  # (R, k, k)
        inverse = _inverse_norm(gram, pairs[rows], shares)
        first, second = pairs[rows].unbind(-1)
        along = shares.first * similarity.gather(1, first) + shares.second * similarity.gather(1, second)
        cosine[rows], inverse_norm[rows] = along * inverse, inverse
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
    dtype = sum_type(query, bank)
    query_grad = torch.empty_like(query, memory_format=torch.contiguous_format) if wanted[0] else query.new_empty(0)
    bank_grad = torch.zeros_like(bank, dtype=dtype, memory_format=torch.contiguous_format) if wanted[1] else None
    for rows in chunks(index, pairs, query.shape[1], dtype):
        queries = UnitRows.of(query[rows], dtype)
        unit = queries.rows
        negatives, shrink = shortened(bank[index[rows]].to(dtype))
        weights = pair_weights(pairs[rows], index.shape[1], _shares(pairs[rows], alpha, shrink), dtype)  # (R, m, k)
        upstream = cosine_grad[rows] * inverse_norm[rows]  # (R, m)
        along = (upstream[:, None, :] @ weights)[:, 0]  # (R, k)
        if wanted[0]:
            unit_grad = (along[:, None, :] @ negatives)[:, 0]  # (R, D)
            query_grad[rows] = queries.gradient(unit_grad).to(query.dtype)
        if bank_grad is not None:
            curvature = upstream * cosine[rows] * inverse_norm[rows]
            across = (weights * curvature[:, :, None]).transpose(1, 2) @ weights  # (R, k, k)
            negatives_grad = torch.baddbmm(along[:, :, None] * unit[:, None, :], across, negatives, alpha=-1)
            if shrink is not None:
                negatives_grad *= shrink[:, :, None]
            add_in_order(bank_grad, index[rows], negatives_grad)
    return query_grad, bank.new_empty(0) if bank_grad is None else bank_grad.to(bank.dtype)


def chunks(index: Tensor, pairs: Tensor, dim: int, dtype: torch.dtype) -> Iterator[slice]:
    """Rows a few at a time, so that what a chunk gathers stays below CHUNK_BYTES."""
    num_rows, k = index.shape
    bytes_of_row = max(1, k * max(dim, pairs.shape[1], k) * dtype.itemsize)
    step = max(1, CHUNK_BYTES // bytes_of_row)
    for begin in range(0, num_rows, step):
        yield slice(begin, begin + step)


class Shares(NamedTuple):
    """A pair's first and second in its mixture, or in a multiple of it. Numbers, or (R, m)."""

    first: Tensor | float
    second: Tensor | float
    floor: Tensor | float  # below which a mixture's length counts as zero


def _shares(pairs: Tensor, alpha: float, shrink: Tensor | None) -> Shares:
    """Of a long row, made shorter, and one that isn't, the mixture is made as short. (R, m, 2), (R, k)"""
    if shrink is None:
        return Shares(alpha, 1 - alpha, NORM_FLOOR)
    first, second = (shrink.gather(1, pairs[..., side]) for side in (0, 1))
    # A share of 0 has no say in it.
    of_both = torch.minimum(first if alpha != 0 else second, second if alpha != 1 else first)
    return Shares(
        alpha * (of_both / first), (1 - alpha) * (of_both / second), torch.where(of_both == 1, NORM_FLOOR, 0.0)
    )


def pair_weights(pairs: Tensor, k: int, shares: Shares, dtype: torch.dtype) -> Tensor:  # (R, m, 2) -> (R, m, k)
    column = torch.arange(k, device=pairs.device)
    weights: Tensor | float = 0.0
    for side, share in enumerate(shares[:2]):
        of_pair = share[..., None] if isinstance(share, Tensor) else share
        weights = weights + of_pair * (pairs[..., side, None] == column).to(dtype)
    assert isinstance(weights, Tensor)
    return weights


def add_in_order(bank_grad: Tensor, index: Tensor, addition: Tensor) -> None:
    """``bank_grad[index[i, c]] += addition[i, c]`` in an order that doesn't change from run to run. (R, k), (R, k, D)."""
    if bank_grad.is_cuda:  # sorts, where index_add_ has atomics
        bank_grad.index_put_((index.flatten(),), addition.flatten(0, 1), accumulate=True)
    else:
        bank_grad.index_add_(0, index.flatten(), addition.flatten(0, 1))


def _inverse_norm(gram: Tensor, pairs: Tensor, shares: Shares) -> Tensor:  # (R, k, k), (R, m, 2) -> (R, m)
    k = gram.shape[1]
    first, second = pairs.unbind(-1)
    squares = gram.diagonal(dim1=1, dim2=2)
    parts = shares.first**2 * squares.gather(1, first) + shares.second**2 * squares.gather(1, second)
    squared = parts + 2 * shares.first * shares.second * gram.flatten(1).gather(1, first * k + second)
    smallest = (VANISHING * torch.finfo(gram.dtype).eps * parts).clamp_min(shares.floor**2)
    return torch.where(squared < smallest, 0.0, squared.rsqrt())
