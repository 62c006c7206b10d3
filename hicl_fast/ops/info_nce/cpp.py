"""InfoNCE through csrc/cpu/info_nce.cpp."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hicl_fast.ops.common.precision import brought_to, with_exact_products
from hicl_fast.ops.info_nce.problem import Gradients, Mixing, Problem, RowStatistics, Wanted

MIXES_WHILE_SWEEPING = True  # `forward` takes a Mixing
_SAME_GROUP = {"exclude": 0, "negative": 1, "positive": 2}


def forward(
    problem: Problem, row_weight: float, wanted: Wanted, mixing: Mixing | None = None
) -> tuple[RowStatistics, Gradients]:
    return _run(problem, row_weight, None, wanted, mixing)


def backward(
    problem: Problem, negative_lse: Tensor, column_lse: Tensor, loss_grad: Tensor, wanted: Wanted
) -> Gradients:
    """Sweeps again: with a block's whole rows in cache their statistics cost next to nothing."""
    return _run(problem, 1.0, loss_grad, wanted)[1]


def _run(
    problem: Problem, row_weight: float, loss_grad: Tensor | None, wanted: Wanted, mixing: Mixing | None = None
) -> tuple[RowStatistics, Gradients]:
    sum_type, problem = problem.dtype, with_exact_products(problem)
    dtype = problem.dtype

    def ready(x: Tensor | None) -> Tensor | None:
        if x is None or (x.dtype == dtype and x.is_contiguous()):
            return x
        return x.detach().to(dtype).contiguous()

    def index(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.contiguous()

    # Below autograd: its fallback for operators that have no gradient costs as much as the rest of a small call.
    with torch._C._AutoDispatchBelowAutograd():
        loss, negative_lse, column_lse, positive, hardest, total, *gradients, hard_negatives = _operator()(
            ready(problem.query),
            ready(problem.key),
            index(problem.target),
            ready(problem.negatives),
            ready(problem.bank),
            ready(problem.extra_logits),
            index(problem.query_group),
            index(problem.key_group),
            ready(loss_grad),
            row_weight,
            float(problem.scale),
            problem.hard_negative_weight,
            _SAME_GROUP[problem.same_group],
            problem.margin,
            problem.symmetric,
            *((None, 0, 0.0) if mixing is None else (mixing.pairs.contiguous(), mixing.k, mixing.alpha)),
            wanted.bits,
        )
    statistics = RowStatistics(loss, negative_lse, column_lse, positive, hardest, hard_negatives, total)
    found = Gradients(*gradients)
    return (statistics, found) if dtype == sum_type else (brought_to(sum_type, statistics), brought_to(sum_type, found))


@functools.cache
def _operator() -> Callable[..., tuple[Tensor, ...]]:
    return torch.ops.hicl_fast_cpp.info_nce.default
