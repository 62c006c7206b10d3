"""Own columns in chunks of rows (H', D): nothing of the size of the rows but their gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from hicl_fast.ops.common.numbers import scale_on
from hicl_fast.ops.common.unit_rows import UnitRows, row_dot
from hicl_fast.ops.own_negatives.problem import Gradients, Own, Wanted

CHUNK_BYTES = {"cpu": 4 << 20}
_OTHER_DEVICE_CHUNK_BYTES = 256 << 20


def forward(problem: Own) -> tuple[Tensor, Tensor]:
    sweep = _Sweep(problem)
    logits, similarity = sweep.logits(torch.cat([sweep.similarity(rows) for rows in sweep.chunks()] or [sweep.nothing]))
    most = sweep.by_query(logits, "max", -torch.inf)
    offset = most.masked_fill(most == -torch.inf, 0.0)
    total = sweep.by_query((logits - offset[sweep.query_of_rows]).exp(), "sum", 0.0)
    return total.log() + offset, sweep.by_query(similarity, "max", -torch.inf)


def backward(problem: Own, lse: Tensor, lse_grad: Tensor, wanted: Wanted) -> Gradients:
    sweep = _Sweep(problem)
    query_grad = torch.zeros_like(sweep.query.rows) if wanted.query else sweep.nothing
    rows_grad = torch.empty_like(problem.rows, dtype=problem.dtype) if wanted.rows else sweep.nothing
    scale_grad = torch.zeros_like(sweep.scale) if wanted.scale else sweep.nothing
    lse, lse_grad = lse.masked_fill(lse == -torch.inf, 0.0), lse_grad.to(problem.dtype)
    for rows in sweep.chunks():
        query_of_rows = sweep.query_of_rows[rows]
        unit, query = sweep.unit(rows), sweep.query.rows[query_of_rows]
        logits, similarity = sweep.logits(row_dot(unit.rows, query), rows)
        weight = (logits - lse[query_of_rows]).exp_() * lse_grad[query_of_rows]  # ∂/∂ℓ
        if wanted.scale:
            scale_grad += (weight * similarity.masked_fill(weight == 0, 0.0)).sum()
        weight = (weight * sweep.scale)[:, None]
        if wanted.query:
            query_grad.index_add_(0, query_of_rows, weight * unit.rows)
        if wanted.rows:
            rows_grad[rows] = unit.gradient(weight * query)
    return Gradients(sweep.query.gradient(query_grad) if wanted.query else query_grad, rows_grad, scale_grad)


class _Sweep:
    def __init__(self, problem: Own) -> None:
        self.problem = problem
        self.query = UnitRows.of(problem.query, problem.dtype)
        self.scale = scale_on(problem.scale, problem.query.device, problem.dtype)
        self.query_of_rows = problem.query_of_rows()
        self.nothing = self.scale.new_empty(0)

    def chunks(self) -> list[slice]:
        num_rows, dim = self.problem.rows.shape
        budget = CHUNK_BYTES.get(self.scale.device.type, _OTHER_DEVICE_CHUNK_BYTES)
        size = max(1, budget // (dim * self.scale.element_size()))
        return [slice(begin, min(begin + size, num_rows)) for begin in range(0, num_rows, size)]

    def unit(self, rows: slice) -> UnitRows:
        return UnitRows.of(self.problem.rows[rows], self.problem.dtype)

    def similarity(self, rows: slice) -> Tensor:
        return row_dot(self.unit(rows).rows, self.query.rows[self.query_of_rows[rows]])

    def logits(self, similarity: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Logits and similarities of some rows, −∞ where a column is left out."""
        problem = self.problem
        group = None if problem.group is None else problem.group[rows]
        some = Own(
            problem.query, problem.rows, problem.offsets, problem.scale, problem.limit, problem.query_group, group
        )
        left_out = some.left_out(self.query_of_rows[rows], similarity)
        if left_out is not None:
            similarity = similarity.masked_fill(left_out, -torch.inf)
        return similarity * (self.scale + problem.hardness), similarity

    def by_query(self, x: Tensor, reduce: str, initial: float) -> Tensor:  # (H,) -> (N,)
        return torch.segment_reduce(x, reduce, offsets=self.problem.offsets, initial=initial, unsafe=True)
