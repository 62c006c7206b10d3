"""Rows of all ranks on every rank, with gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hicl_fast import _checks as check
from hicl_fast.distributed.agreement import Shares, agree, attempt
from hicl_fast.distributed.ranks import Ranks, all_gather_single, ranks_of, reduce_scatter_single
from hicl_fast.ops.common.autograd import once_differentiable


def joined_rows(rows: Tensor, *, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """The rows of all ranks, in the order of ranks: for losses of one's own.

    The gradient of a rank's rows is the sum of what all ranks' losses ask of them. Under DDP, which averages the
    gradients of parameters, a rank's loss should therefore be its rows' sum times the number of ranks, divided by the
    number of all ranks' rows.

    Args:
        rows: (N, D) floating point; N may differ between ranks, D and type may not.
        process_group: which processes; default: all of them.

    Returns:
        (N₀ + N₁ + …, D).

    Raises:
        TypeError, ValueError: on every rank, with each rank's words, if one of them has other rows.
    """
    ranks = ranks_of(process_group)
    _, failure = attempt(lambda: check.floating_matrix("rows", rows, "(N, D)"))
    if failure is not None:
        shares = agree(ranks, {"rows": 0}, {}, failure)
    else:
        shares = agree(ranks, {"rows": len(rows)}, {"rows": describe_rows(rows)})
    return gather_rows(rows, shares["rows"], ranks)


def describe_rows(rows: Tensor | None) -> str:
    """What ranks must agree on to exchange rows: everything but their number."""
    if rows is None:
        return "None"
    gradient = ", with gradient" if rows.requires_grad and torch.is_grad_enabled() else ""
    return f"(·, {rows.shape[1]}) {rows.dtype} on {rows.device.type}{gradient}"


@torch.compiler.disable
def gather_rows(rows: Tensor, shares: Shares, ranks: Ranks) -> Tensor:
    """The rows (N, D) of all ranks, (N₀ + N₁ + …, D), in the order of ranks, once they have agreed on ``shares``.

    An all-gather, padded to the largest rank's rows; backward, a reduce-scatter of the gradients, summed in float32
    (float64 for float64). Both are deterministic.
    """
    return rows if ranks.size == 1 else _GatherRows.apply(rows, shares, ranks)


@torch.compiler.disable
def share_rows(rows: Tensor, shares: Shares, ranks: Ranks) -> Tensor:
    """:func:`gather_rows` for a loss that every rank computes whole, the same on all of them.

    Each rank then has all of the gradient of its own rows: it takes that, times the number of ranks, and nothing is
    exchanged backward.
    """
    return rows if ranks.size == 1 else _OwnRows.apply(rows, shares, ranks, ranks.size)


@torch.compiler.disable
def own_rows_among_all(rows: Tensor, shares: Shares, ranks: Ranks) -> Tensor:
    """:func:`gather_rows`, but the other ranks' rows are constants: a rank has the gradient of its own rows in its own loss.

    Nothing is exchanged backward.
    """
    return rows if ranks.size == 1 else _OwnRows.apply(rows, shares, ranks, 1)


@torch.compiler.disable
def gather_labels(labels: Tensor, shares: Shares, ranks: Ranks) -> Tensor:
    """The int64 labels (N,) of all ranks, (N₀ + N₁ + …,)."""
    return labels if ranks.size == 1 else _all_gather(labels, shares, ranks)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, shares: Shares, ranks: Ranks) -> Tensor:
        ctx.shares, ctx.ranks, ctx.dtype = shares, ranks, rows.dtype
        return _all_gather(rows, shares, ranks)

    @staticmethod
    @once_differentiable("distributed.gather_rows")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(gradient, ctx.shares, ctx.ranks).to(ctx.dtype), None, None


class _OwnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, shares: Shares, ranks: Ranks, weight: int) -> Tensor:
        ctx.own, ctx.weight = shares.slices[ranks.rank], weight
        return _all_gather(rows, shares, ranks)

    @staticmethod
    @once_differentiable("distributed.share_rows")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient[ctx.own] * ctx.weight, None, None, None


def _all_gather(own: Tensor, shares: Shares, ranks: Ranks) -> Tensor:
    largest = shares.largest
    padded = own.contiguous()
    if shares.own < largest:
        padded = torch.cat([own, own.new_zeros(largest - shares.own, *own.shape[1:])])
    joined = own.new_empty(ranks.size * largest, *own.shape[1:])
    all_gather_single(joined, padded, group=ranks.process_group)
    if shares.total == len(joined):
        return joined
    return torch.cat([block[:count] for block, count in zip(joined.split(largest), shares.counts, strict=True)])


def _reduce_scatter(gradient: Tensor, shares: Shares, ranks: Ranks) -> Tensor:
    largest = shares.largest
    padded = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).contiguous()
    if shares.total < ranks.size * largest:
        unpadded, padded = padded, padded.new_zeros(ranks.size * largest, padded.shape[1])
        for place, rows in zip(padded.split(largest), shares.slices, strict=True):
            place[: rows.stop - rows.start] = unpadded[rows]
    own = padded.new_empty(largest, padded.shape[1])
    reduce_scatter_single(own, padded, group=ranks.process_group)
    return own[: shares.own]
