"""InfoNCE for small batches through csrc/cuda/info_nce.cpp: loss and every gradient in two launches."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hicl_fast.ops.common.precision import operand_type
from hicl_fast.ops.info_nce.problem import Gradients, Problem, RowStatistics, Wanted


def forward(problem: Problem, row_weight: float, wanted: Wanted) -> tuple[RowStatistics, Gradients]:
    return _run(problem, row_weight, None, wanted)


def backward(
    problem: Problem, negative_lse: Tensor, column_lse: Tensor, loss_grad: Tensor, wanted: Wanted
) -> Gradients:
    """Computes the similarities again: for so few it takes as long as reading them would."""
    return _run(problem, 1.0, loss_grad.to(torch.float32).contiguous(), wanted)[1]


def _run(
    problem: Problem, row_weight: float, loss_grad: Tensor | None, wanted: Wanted
) -> tuple[RowStatistics, Gradients]:
    dtype = operand_type(problem.precision, problem.query, problem.key, problem.negatives)  # float32 never becomes TF32

    def ready(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(dtype).contiguous()

    extra = problem.extra_logits
    groups = (None, None) if problem.same_group == "negative" else (problem.query_group, problem.key_group)
    is_known = problem.scale.device.type == "cpu"
    with torch._C._AutoDispatchBelowAutograd():
        loss, negative_lse, positive, hardest, total, *gradients = _operator()(
            ready(problem.query),
            ready(problem.key),
            None if problem.target is None else problem.target.contiguous(),
            ready(problem.negatives),
            None if extra is None else extra.detach().to(torch.float32).contiguous(),
            *(None if x is None else x.contiguous() for x in groups),
            loss_grad,
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


@functools.cache
def _operator() -> Callable[..., tuple[Tensor, ...]]:
    return torch.ops.hicl_fast_cuda.small_info_nce.default
