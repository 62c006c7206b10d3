"""InfoNCE for small batches through csrc/cuda/info_nce.cpp: loss and every gradient in two launches."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hicl_fast.ops.common.precision import operand_type
from hicl_fast.ops.info_nce.problem import Gradients, Problem, RowStatistics, Wanted
from hicl_fast.ops.info_nce.rows import RowWeights


def forward(problem: Problem, row_weight: float, wanted: Wanted) -> tuple[RowStatistics, Gradients]:
    return _run(problem, wanted, row_weight=row_weight)


def backward(
    problem: Problem, negative_lse: Tensor, column_lse: Tensor, loss_grad: Tensor, wanted: Wanted
) -> Gradients:
    """Computes the similarities again: for so few it takes as long as reading them would."""
    return _run(problem, wanted, loss_grad=loss_grad)[1]


def log_sum_exp_backward(problem: Problem, negative_lse: Tensor, weights: RowWeights, wanted: Wanted) -> Gradients:
    return _run(problem, wanted, weights=weights)[1]


def _run(
    problem: Problem,
    wanted: Wanted,
    *,
    row_weight: float = 1.0,
    loss_grad: Tensor | None = None,
    weights: RowWeights | None = None,
) -> tuple[RowStatistics, Gradients]:
    dtype = operand_type(problem.precision, problem.query, problem.key, problem.negatives)  # float32 never becomes TF32

    def ready(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(dtype).contiguous()

    extra = problem.extra_logits
    is_known = problem.scale.device.type == "cpu"
    with torch._C._AutoDispatchBelowAutograd():
        loss, negative_lse, positive, hardest, total, *gradients = _operator()(
            ready(problem.query),
            ready(problem.key),
            None if problem.target is None else problem.target.contiguous(),
            ready(problem.negatives),
            _floats(extra),
            *(None if x is None else x.contiguous() for x in problem.one_relation()),
            *(_floats(x) for x in (loss_grad, *((None, None) if weights is None else weights[:2]))),
            None if is_known else problem.scale.detach().to(torch.float32),
            float(problem.scale) if is_known else 0.0,
            row_weight,
            problem.hard_negative_weight,
            problem.margin,
            wanted.bits,
        )
    nothing = loss.new_empty(0)
    statistics = RowStatistics(loss, negative_lse, nothing, positive, hardest, total=total)
    found = Gradients(*gradients)
    return statistics, found if wanted.scale else found._replace(scale=nothing)


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().to(torch.float32).contiguous()


@functools.cache
def _operator() -> Callable[..., tuple[Tensor, ...]]:
    return torch.ops.hicl_fast_cuda.small_info_nce.default
