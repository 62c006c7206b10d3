"""As plain PyTorch, for derivatives that no backend has: second ones, forward mode, ``torch.func``."""

from __future__ import annotations

import torch
from torch import Tensor

from hicl_fast.ops.info_nce.reference import normalise
from hicl_fast.ops.own_negatives.problem import Own


def log_sum_exp(problem: Own) -> tuple[Tensor, Tensor]:  # (N,), (N,)
    """Each query's log-sum-exp over its own columns, −inf where it has none, and the largest similarity among them."""
    dtype, query_of_rows = problem.dtype, problem.query_of_rows()
    num_rows = problem.query.shape[0]
    unit_query, unit = normalise(problem.query.to(dtype)), normalise(problem.rows.to(dtype))
    similarity = (unit_query[query_of_rows] * unit).sum(dim=1)  # (H,)
    scale = problem.scale.to(device=similarity.device, dtype=dtype)
    logits = similarity * scale + problem.hardness * similarity.detach()
    left_out = problem.left_out(query_of_rows, similarity.detach())
    counted = similarity.detach()
    if left_out is not None:
        logits, counted = (x.masked_fill(left_out, -torch.inf) for x in (logits, counted))

    def largest(x: Tensor) -> Tensor:  # (H,) -> (N,)
        return x.new_full((num_rows,), -torch.inf).scatter_reduce(0, query_of_rows, x.detach(), "amax")

    most = largest(logits)
    has_any = most != -torch.inf
    most = torch.where(has_any, most, 0.0)
    total = logits.new_zeros(num_rows).index_add(0, query_of_rows, (logits - most[query_of_rows]).exp())
    total = torch.where(has_any, total, 1.0)
    return torch.where(has_any, total.log() + most, -torch.inf), largest(counted)
