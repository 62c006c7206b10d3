"""Log-sum-exps over the keys of all other ranks, which travel round a ring: no rank ever holds more than three blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hicl_fast.distributed.agreement import Shares
from hicl_fast.distributed.ranks import Ranks
from hicl_fast.ops.backends import registry
from hicl_fast.ops.common.autograd import once_differentiable
from hicl_fast.ops.common.numbers import sum_type
from hicl_fast.ops.info_nce.problem import Problem
from hicl_fast.ops.log_sum_exp import operator as log_sum_exp


@dataclass(frozen=True)
class Travelling:
    """A kind of column that goes round, of all ranks."""

    shares: Shares  # rows of each rank
    group: Tensor | None = None  # (K₀ + K₁ + …, G) int64
    hardness: float = 0.0


@dataclass(frozen=True)
class Settings:
    """What stays as it is all the way round."""

    ranks: Ranks
    key: Travelling
    negatives: Travelling | None
    query_group: Tensor | None  # (N, G) int64
    limit: Tensor | None  # (N,)
    precision: str
    backend: str

    def num_negatives(self, rank: int) -> int:
        return 0 if self.negatives is None else self.negatives.shares.counts[rank]

    def rows_of(self, rank: int) -> int:
        """A block has a rank's negatives, then its keys."""
        return self.num_negatives(rank) + self.key.shares.counts[rank]


@torch.compiler.disable
def foreign_log_sum_exp(
    query: Tensor,  # (N, D)
    block: Tensor,  # (P + K, D)
    scale: Tensor,  # ()
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    r"""The queries' log-sum-exps over the blocks of all ranks but this one.

    .. math:: \log \sum_{r \ne \mathrm{rank}} \sum_j e^{\mathrm{scale} \cdot \cos(q_i, k_{rj})}

    Added as one more logit of each row to the loss over the rank's own keys, this gives the loss over everyone's, and
    that loss's gradient times the row's softmax is what this function's backward pass spreads over the foreign keys.

    Forward, blocks go from rank to rank in their own type. Backward they go round again with their gradients, in the
    type of the sums, which every rank adds to before it passes them on: the order of additions is fixed. A step's
    message is under way while a block is scored.

    Args:
        query: (N, D) this rank's queries.
        block: (P + K, D) this rank's explicit negatives, then its keys, for the others.
        scale: () 1/τ.
        settings: the ranks, two at least, and the columns' rules.

    Returns:
        The log-sum-exps (N,), −inf for a row that no foreign key counts for, with gradients for query, block and
        scale; and the largest similarity among them (N,), detached.
    """
    return _ForeignLogSumExp.apply(query, block, scale, settings)


class _ForeignLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, block: Tensor, scale: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
        hardest = query.new_full((len(query),), -math.inf, dtype=sum_type(query, block))
        by_block = []
        carousel = _Carousel(block, settings)
        for _ in range(1, settings.ranks.size):
            owner, held = carousel.next()
            problem = _problem(query, held, scale, owner, settings)
            rows = log_sum_exp.Outputs(*torch.ops.hicl_fast.log_sum_exp(*problem.flat(), _choose(problem, settings)))
            by_block.append(rows.negative)
            hardest = torch.maximum(hardest, rows.hardest)
        block_lse = torch.stack(by_block)  # (ranks − 1, N)
        lse = torch.logsumexp(block_lse, dim=0)
        ctx.settings = settings
        ctx.save_for_backward(query, block, scale, block_lse, lse)
        ctx.mark_non_differentiable(hardest)
        return lse, hardest

    @staticmethod
    @once_differentiable("distributed.foreign_log_sum_exp")
    def backward(ctx: Any, lse_grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        query, block, scale, block_lse, lse = ctx.saved_tensors
        settings: Settings = ctx.settings
        wants_query, wants_block, wants_scale, _ = ctx.needs_input_grad
        query_grad = torch.zeros_like(query, dtype=lse.dtype)
        scale_grad = torch.zeros_like(scale, dtype=lse.dtype)

        carousel, luggage = _Carousel(block, settings), _Luggage(settings)
        for one_lse in block_lse:
            owner, held = carousel.next()
            weight = torch.where(one_lse == -math.inf, 0.0, lse_grad * torch.exp(one_lse - lse))  # this block's share
            problem = _problem(query, held, scale, owner, settings)
            wanted = [wants_query, wants_block, wants_block and problem.negatives is not None, False, wants_scale]
            to_query, to_key, to_negatives, _, to_scale = torch.ops.hicl_fast.log_sum_exp_backward(
                *problem.flat(), one_lse, weight, torch.zeros_like(weight), wanted, _choose(problem, settings)
            )
            if wants_query:
                query_grad += to_query
            if wants_scale:
                scale_grad += to_scale.to(scale_grad.device)
            if wants_block:
                to_key = to_key[:-1]
                luggage.add_and_pass_on(owner, torch.cat([to_negatives, to_key]) if wanted[2] else to_key)
        return (
            query_grad.to(query.dtype) if wants_query else None,
            luggage.home().to(block.dtype) if wants_block else None,
            scale_grad.to(scale.dtype) if wants_scale else None,
            None,
        )


class _Carousel:
    """Passes the blocks round: at step t a rank holds that of the rank t places before it."""

    def __init__(self, block: Tensor, settings: Settings) -> None:
        self.ranks, self.rows_of = settings.ranks, settings.rows_of
        self.step = 0
        self._start(block.contiguous())

    def next(self) -> tuple[int, Tensor]:
        """The rank that the next block comes from, and the block (P + K + 1, D) with a zero row at its end."""
        _wait(self.works)
        self.step += 1
        owner, held = (self.ranks.rank - self.step) % self.ranks.size, self.incoming
        if self.step < self.ranks.size - 1:
            self._start(held[:-1])
        return owner, held

    def _start(self, outgoing: Tensor) -> None:
        owner = (self.ranks.rank - self.step - 1) % self.ranks.size
        self.incoming = outgoing.new_empty(self.rows_of(owner) + 1, outgoing.shape[1])
        self.incoming[-1] = 0
        self.outgoing = outgoing  # alive until it has left
        self.works = _pass_on(outgoing, self.incoming[:-1], self.ranks)


class _Luggage:
    """The blocks' gradients, which travel one step behind the blocks and end where those began."""

    def __init__(self, settings: Settings) -> None:
        self.ranks, self.rows_of = settings.ranks, settings.rows_of
        self.incoming: Tensor | None = None
        self.works: list[dist.Work] = []

    def add_and_pass_on(self, owner: int, gradient: Tensor) -> None:
        if self.incoming is not None:
            _wait(self.works)
            gradient = gradient + self.incoming
        self.outgoing = gradient.contiguous()
        rows = self.rows_of((owner - 1) % self.ranks.size)
        self.incoming = gradient.new_empty(rows, gradient.shape[1])
        self.works = _pass_on(self.outgoing, self.incoming, self.ranks)

    def home(self) -> Tensor:
        """This rank's own block's gradient."""
        _wait(self.works)
        assert self.incoming is not None
        return self.incoming


def _pass_on(outgoing: Tensor, incoming: Tensor, ranks: Ranks) -> list[dist.Work]:
    """Send to the next rank and receive from the one before."""
    return dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, outgoing, ranks.neighbour(1), ranks.process_group),
            dist.P2POp(dist.irecv, incoming, ranks.neighbour(-1), ranks.process_group),
        ]
    )


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def _problem(query: Tensor, held: Tensor, scale: Tensor, owner: int, settings: Settings) -> Problem:
    """A block's columns. No foreign key is a positive: the block's zero row stands in for one, and nothing is asked of it."""
    first_key = settings.num_negatives(owner)
    negatives, keys = held[:first_key], held[first_key:]
    key_group = _group(settings.key, owner)
    if settings.query_group is not None and key_group is not None:
        key_group = torch.cat([key_group, settings.query_group[:1]])  # the positive is no negative, whatever its group
    return Problem(
        query=query,
        key=keys,
        scale=scale,
        target=torch.full((len(query),), len(keys) - 1, device=query.device),
        negatives=None if settings.negatives is None else negatives,
        query_group=settings.query_group,
        key_group=key_group,
        negatives_group=None if settings.negatives is None else _group(settings.negatives, owner),
        limit=settings.limit,
        key_hardness=settings.key.hardness,
        negatives_hardness=0.0 if settings.negatives is None else settings.negatives.hardness,
        precision=settings.precision,
    )


def _group(kind: Travelling, owner: int) -> Tensor | None:
    return None if kind.group is None else kind.group[kind.shares.slices[owner]]


def _choose(problem: Problem, settings: Settings) -> str:
    device_type = problem.query.device.type
    return registry.choose(settings.backend, "info_nce", device_type, problem.dtype, problem.features())
