"""Own columns through kernels/own_negatives.py."""

from __future__ import annotations

import torch
from torch import Tensor

from hicl_fast.kernels import own_negatives as kernels
from hicl_fast.ops.common.constants import NORM_FLOOR
from hicl_fast.ops.common.numbers import scale_on
from hicl_fast.ops.common.row_kernels import row_kernels
from hicl_fast.ops.common.triton import on_device
from hicl_fast.ops.own_negatives.problem import Gradients, Own, Wanted


def forward(problem: Own) -> tuple[Tensor, Tensor]:
    with on_device(problem.query):
        return kernels.log_sum_exp(_columns(problem))


def backward(problem: Own, lse: Tensor, lse_grad: Tensor, wanted: Wanted) -> Gradients:
    with on_device(problem.query):
        columns = _columns(problem)
        query, rows, by_query = kernels.gradients(
            columns, lse.contiguous(), lse_grad.to(torch.float32).contiguous(), wants_rows=wanted.rows
        )
        nothing = lse.new_empty(0)
        return Gradients(
            query if wanted.query else nothing,
            nothing if rows is None else rows,
            by_query.sum() if wanted.scale else nothing,
        )


def _columns(problem: Own) -> kernels.Columns:
    device = problem.query.device
    query, rows = (
        row_kernels(device).normalise(x.detach().contiguous(), NORM_FLOOR) for x in (problem.query, problem.rows)
    )
    has_groups = problem.query_group is not None and problem.group is not None
    return kernels.Columns(
        query=query,
        rows=rows,
        offsets=problem.offsets.contiguous(),
        scale=scale_on(problem.scale, device, torch.float32).reshape(1),
        limit=None if problem.limit is None else problem.limit.detach().to(torch.float32).contiguous(),
        query_group=problem.query_group.contiguous() if has_groups else None,  # type: ignore[union-attr]
        group=problem.group.contiguous() if has_groups else None,  # type: ignore[union-attr]
        hardness=problem.hardness,
        floor=NORM_FLOOR,
    )
