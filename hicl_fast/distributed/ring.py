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


@dataclass(frozen=True)
class Settings:
    """What stays as it is all the way round."""

    ranks: Ranks
    shares: Shares  # rows of each rank's block
    query_group: Tensor | None  # (N,) int64
    key_group: Tensor | None  # (all blocks' rows,) int64
    precision: str
    backend: str


@torch.compiler.disable
def foreign_log_sum_exp(
    query: Tensor,  # (N, D)
    block: Tensor,  # (K, D)
    scale: Tensor,  # ()
    *,
    ranks: Ranks,
    shares: Shares,
    query_group: Tensor | None = None,  # (N,) int64
    key_group: Tensor | None = None,  # (K₀ + K₁ + …,) int64
    precision: str = "default",
    backend: str = "auto",
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
        block: (K, D) this rank's keys, for the others.
        scale: () 1/τ.
        ranks: the processes, two at least.
        shares: how many rows each rank's block has.
        query_group: (N,) group of each query; keys of the same group don't count. Given with ``key_group``.
        key_group: group of each row of all blocks, in the order of ranks.
        precision: of the products, as a :class:`hicl_fast.ops.info_nce.problem.Problem` has it.
        backend: ``"auto"``, ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Returns:
        The log-sum-exps (N,), −inf for a row that no foreign key counts for, with gradients for query, block and
        scale; and the largest similarity among them (N,), detached.
    """
    settings = Settings(ranks, shares, query_group, key_group, precision, backend)
    return _ForeignLogSumExp.apply(query, block, scale, settings)


class _ForeignLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, block: Tensor, scale: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
        hardest = query.new_full((len(query),), -math.inf, dtype=sum_type(query, block))
        by_block = []
        carousel = _Carousel(block, settings)
        for _ in range(1, settings.ranks.size):
            owner, held = carousel.next()
            _, _, block_hardest, negative_lse, _ = _score(_problem(query, held, scale, owner, settings), settings)
            by_block.append(negative_lse)
            hardest = torch.maximum(hardest, block_hardest)
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
        floor = -scale.to(device=lse.device, dtype=lse.dtype)

        carousel, luggage = _Carousel(block, settings), _Luggage(settings)
        for one_lse in block_lse:
            owner, held = carousel.next()
            # The operator's softmax is over this block and the floor; its share of the whole is the rows' weight.
            row_lse = torch.logaddexp(one_lse, floor)
            weight = torch.where(lse == -math.inf, 0.0, lse_grad * torch.exp(row_lse - lse))
            to_query, to_block, _, _, to_scale = _score_backward(
                _problem(query, held, scale, owner, settings), one_lse, weight, ctx.needs_input_grad, settings
            )
            if wants_query:
                query_grad += to_query
            if wants_scale:  # without what the floor, whose similarity is −1, adds to it
                scale_grad += to_scale.to(scale_grad.device) - (weight * torch.exp(one_lse - row_lse)).sum().to(
                    scale_grad.device
                )
            if wants_block:
                luggage.add_and_pass_on(owner, to_block[:-1])
        return (
            query_grad.to(query.dtype) if wants_query else None,
            luggage.home().to(block.dtype) if wants_block else None,
            scale_grad.to(scale.dtype) if wants_scale else None,
            None,
        )


class _Carousel:
    """Passes the blocks round: at step t a rank holds that of the rank t places before it."""

    def __init__(self, block: Tensor, settings: Settings) -> None:
        self.ranks, self.shares = settings.ranks, settings.shares
        self.step = 0
        self._start(block.contiguous())

    def next(self) -> tuple[int, Tensor]:
        """The rank that the next block comes from, and the block (K + 1, D) with a zero row at its end."""
        _wait(self.works)
        self.step += 1
        owner, held = (self.ranks.rank - self.step) % self.ranks.size, self.incoming
        if self.step < self.ranks.size - 1:
            self._start(held[:-1])
        return owner, held

    def _start(self, outgoing: Tensor) -> None:
        owner = (self.ranks.rank - self.step - 1) % self.ranks.size
        self.incoming = outgoing.new_empty(self.shares.counts[owner] + 1, outgoing.shape[1])
        self.incoming[-1] = 0
        self.outgoing = outgoing  # alive until it has left
        self.works = _pass_on(outgoing, self.incoming[:-1], self.ranks)


class _Luggage:
    """The blocks' gradients, which travel one step behind the blocks and end where those began."""

    def __init__(self, settings: Settings) -> None:
        self.ranks, self.shares = settings.ranks, settings.shares
        self.incoming: Tensor | None = None
        self.works: list[dist.Work] = []

    def add_and_pass_on(self, owner: int, gradient: Tensor) -> None:
        if self.incoming is not None:
            _wait(self.works)
            gradient = gradient + self.incoming
        self.outgoing = gradient.contiguous()
        rows = self.shares.counts[(owner - 1) % self.ranks.size]
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
    """Log-sum-exp over a block as InfoNCE's operator has it, over everything but the positive.

    No foreign key is a positive, so the block's zero row stands in for one. A margin of a right angle takes its
    similarity from 0 to −1, below all others: a softmax over block and stand-in then never loses the block's digits.
    """
    rows = settings.shares.slices[owner]
    query_group = key_group = None
    if settings.query_group is not None and settings.key_group is not None:
        query_group = settings.query_group
        nobody = (query_group.max() + 1)[None]
        key_group = torch.cat([settings.key_group[rows], nobody])
    return Problem(
        query=query,
        key=held,
        scale=scale,
        target=torch.full((len(query),), len(held) - 1, device=query.device),
        query_group=query_group,
        key_group=key_group,
        margin=math.pi / 2,
        precision=settings.precision,
    )


def _choose(problem: Problem, settings: Settings) -> str:
    device_type = problem.query.device.type
    return registry.choose(settings.backend, "info_nce", device_type, problem.dtype, problem.features())


def _score(problem: Problem, settings: Settings) -> tuple[Tensor, ...]:
    return torch.ops.hicl_fast.info_nce_rows(*problem.flat(), _choose(problem, settings))


def _score_backward(
    problem: Problem, lse: Tensor, weight: Tensor, needs_grad: tuple[bool, ...], settings: Settings
) -> tuple[Tensor, ...]:
    wants_query, wants_block, wants_scale, _ = needs_grad
    wanted = [wants_query, wants_block, False, False, wants_scale]
    return torch.ops.hicl_fast.info_nce_rows_backward(
        *problem.flat(), lse, lse.new_empty(0), weight, wanted, _choose(problem, settings)
    )
