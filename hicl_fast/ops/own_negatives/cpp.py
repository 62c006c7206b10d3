"""Own columns through csrc/cpu/own_negatives.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from hicl_fast.ops.own_negatives.problem import Gradients, Own, Wanted


def forward(problem: Own) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.hicl_fast_cpp.own_log_sum_exp(*_operands(problem))


def backward(problem: Own, lse: Tensor, lse_grad: Tensor, wanted: Wanted) -> Gradients:
    of_rows = (_ready(x, problem.dtype) for x in (lse, lse_grad))
    with torch._C._AutoDispatchBelowAutograd():
        return Gradients(*torch.ops.hicl_fast_cpp.own_log_sum_exp_backward(*_operands(problem), *of_rows, *wanted))


def _operands(problem: Own) -> list[Tensor | float | None]:
    tensors = (problem.query, problem.rows, problem.offsets, problem.limit, problem.query_group, problem.group)
    return [*(_ready(x, problem.dtype) for x in tensors), float(problem.scale), problem.hardness]


def _ready(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Contiguous, vectors and limits in one type."""
    return None if x is None else x.detach().to(x.dtype if x.dtype == torch.int64 else dtype).contiguous()
