"""InfoNCE in chunks of rows: a chunk's logits (R, C) are the largest thing there ever is.

With the rows' weights known, one sweep takes each chunk from logits to loss to gradients (three products);
the symmetric loss needs every row of a column first, so it sweeps twice (four products).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hicl_fast.ops.common.constants import ANGLE_CLAMP
from hicl_fast.ops.common.numbers import scale_on
from hicl_fast.ops.common.precision import brought_to, with_exact_products
from hicl_fast.ops.common.unit_rows import UnitRows
from hicl_fast.ops.info_nce.problem import Gradients, Problem, RowStatistics, Wanted

# Up to ten temporaries of a chunk's size are in the allocator's hands at once; on a CPU, rows beyond some hundred gain nothing.
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
_OTHER_DEVICE_CHUNK_BYTES = 256 << 20


@dataclass
class _Chunk:
    """The logits of a few rows against every column."""

    rows: slice
    logits: Tensor  # (R, C) with −inf where a column is left out of the denominator, and at the positive
    target: Tensor  # (R,)
    positive: Tensor  # (R,) the positive's similarity
    positive_logit: Tensor  # (R,) with the margin
    margin_slope: Tensor | float  # (R,) derivative of the positive's (margin-adjusted) similarity
    shift: Tensor | float  # (R,) positive_logit minus the mean logit of all positives
    positives: Tensor | None  # (R, M) bool: further positives beside the target
    num_positives: Tensor | float  # (R,)


def forward(problem: Problem, row_weight: float, wanted: Wanted) -> tuple[RowStatistics, Gradients]:
    statistics, gradients = _forward(with_exact_products(problem), row_weight, wanted)
    return brought_to(problem.dtype, statistics), brought_to(problem.dtype, gradients)


def backward(
    problem: Problem, negative_lse: Tensor, column_lse: Tensor, loss_grad: Tensor, wanted: Wanted
) -> Gradients:
    gradients = _backward(with_exact_products(problem), negative_lse, column_lse, loss_grad, wanted)
    return brought_to(problem.dtype, gradients)


def _forward(problem: Problem, row_weight: float, wanted: Wanted) -> tuple[RowStatistics, Gradients]:
    sweep = _Sweep(problem, wanted)
    loss, negative_lse, positive, hardest = (sweep.unit_query.factor.new_empty(sweep.num_rows) for _ in range(4))
    column_lse = loss.new_full((problem.key.shape[0] if problem.symmetric else 0,), -torch.inf)
    gradients_now = any(wanted) and not problem.symmetric

    for rows in sweep.chunks():
        chunk = sweep.chunk(rows)
        positive[rows] = chunk.positive
        hardest[rows] = sweep.hardest(chunk)
        sweep.add_own_bias(chunk)
        negative_lse[rows] = torch.logsumexp(chunk.logits, dim=1)
        loss[rows] = _loss(negative_lse[rows], chunk)
        if problem.symmetric:
            column_lse = torch.logaddexp(column_lse, torch.logsumexp(chunk.logits, dim=0))
        if gradients_now:
            sweep.accumulate(chunk, negative_lse, column_lse, loss.new_full((), row_weight).expand(sweep.num_rows))

    statistics = RowStatistics(loss, negative_lse, column_lse, positive, hardest)
    if problem.symmetric:
        column_loss = _log1p_exp(column_lse - sweep.margin(positive)[0] * sweep.scale)
        statistics = statistics._replace(loss=(loss + column_loss) / 2)
        if any(wanted):
            return statistics, _backward(problem, negative_lse, column_lse, torch.full_like(loss, row_weight), wanted)
    return statistics, sweep.gradients()


def _backward(
    problem: Problem, negative_lse: Tensor, column_lse: Tensor, loss_grad: Tensor, wanted: Wanted
) -> Gradients:
    sweep = _Sweep(problem, wanted)
    for rows in sweep.chunks():
        chunk = sweep.chunk(rows)
        sweep.add_own_bias(chunk)
        sweep.accumulate(chunk, negative_lse, column_lse, loss_grad.to(problem.dtype))
    return sweep.gradients()


class _Sweep:
    """The normalised inputs, and the gradients as they grow chunk by chunk."""

    def __init__(self, problem: Problem, wanted: Wanted) -> None:
        dtype, device = problem.dtype, problem.query.device
        self.problem, self.wanted = problem, wanted
        self.scale = scale_on(problem.scale, device, dtype)
        self.num_rows, self.num_keys = problem.query.shape[0], problem.key.shape[0]
        self.unit_query = UnitRows.of(problem.query, dtype)
        self.unit_columns = [
            UnitRows.of(x, dtype) for x in (problem.key, problem.negatives, problem.bank) if x is not None
        ]
        self.num_similarities = sum(unit.rows.shape[0] for unit in self.unit_columns)
        self.column_is_wanted = [wanted.key] + [wanted.negatives] * (problem.negatives is not None)

        nothing = self.scale.new_empty(0)
        self.query_grad = torch.empty_like(self.unit_query.rows) if wanted.query else nothing
        self.column_grads = [
            torch.zeros_like(unit.rows) if is_wanted else nothing
            for unit, is_wanted in zip(self.unit_columns, self.column_is_wanted, strict=False)
        ]
        self.extra_grad = (
            torch.empty_like(problem.extra_logits, dtype=dtype)
            if wanted.extra_logits and problem.extra_logits is not None
            else nothing
        )
        self.scale_grad = torch.zeros_like(self.scale) if wanted.scale else nothing

    def chunks(self) -> list[slice]:
        extra = 0 if self.problem.extra_logits is None else self.problem.extra_logits.shape[1]
        row_bytes = (self.num_similarities + extra) * self.scale.element_size()
        budget = CHUNK_BYTES.get(self.scale.device.type, _OTHER_DEVICE_CHUNK_BYTES)
        size = max(16, budget // max(row_bytes, 1))
        return [slice(begin, min(begin + size, self.num_rows)) for begin in range(0, self.num_rows, size)]

    def chunk(self, rows: slice) -> _Chunk:
        problem, scale = self.problem, self.scale
        scaled_query = self.unit_query.rows[rows] * scale
        parts = [scaled_query @ unit.rows.T for unit in self.unit_columns]
        if problem.extra_logits is not None:
            extra = problem.extra_logits[rows].to(scale.dtype)
            parts.append(extra.masked_fill(extra == torch.inf, torch.nan))  # −inf: a column that is left out
        logits = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

        target = (
            torch.arange(rows.start, rows.stop, device=logits.device)
            if problem.target is None
            else problem.target[rows]
        )
        positive = logits.gather(1, target[:, None]).squeeze(1) / scale
        with_margin, slope = self.margin(positive)
        chunk = _Chunk(rows, logits, target, positive, with_margin * scale, slope, 0.0, None, 1.0)
        self._mask_groups(chunk)
        logits.scatter_(1, target[:, None], -torch.inf)
        return chunk

    def margin(self, positive: Tensor) -> tuple[Tensor, Tensor | float]:
        """The positive's similarity with the angular margin, and its derivative ``sin(θ + u) / sin θ``."""
        u = self.problem.margin
        if u == 0.0:
            return positive, 1.0
        inside = (positive >= -1 + ANGLE_CLAMP) & (positive <= 1 - ANGLE_CLAMP)
        theta = torch.arccos(positive.clamp(-1 + ANGLE_CLAMP, 1 - ANGLE_CLAMP))
        return torch.cos(theta + u), torch.where(inside, torch.sin(theta + u) / torch.sin(theta), 0.0)

    def _mask_groups(self, chunk: _Chunk) -> None:
        problem = self.problem
        if problem.query_group is None or problem.key_group is None or problem.same_group == "negative":
            return
        in_group = problem.query_group[chunk.rows, None] == problem.key_group[None, :]  # (R, M)
        keys = chunk.logits[:, : self.num_keys]
        if problem.same_group == "exclude":
            keys.masked_fill_(in_group, -torch.inf)
            return
        in_group.scatter_(1, chunk.target[:, None], False)
        chunk.positives = in_group
        chunk.num_positives = 1 + in_group.sum(dim=1, dtype=keys.dtype)
        others = (keys - chunk.positive_logit[:, None]).masked_fill_(~in_group, 0.0).sum(dim=1)
        chunk.shift = -others / chunk.num_positives

    def hardest(self, chunk: _Chunk) -> Tensor:
        """The largest similarity among a row's negatives. Call before the own negative's bias is added."""
        similarities = chunk.logits[:, : self.num_similarities]
        if chunk.positives is not None:
            similarities = similarities.clone()
            similarities[:, : self.num_keys].masked_fill_(chunk.positives, -torch.inf)
        return similarities.amax(dim=1) / self.scale

    def add_own_bias(self, chunk: _Chunk) -> None:
        if self.problem.hard_negative_weight:
            own = chunk.logits[:, self.num_keys :].diagonal(chunk.rows.start)
            own += self.problem.hard_negative_weight

    def accumulate(self, chunk: _Chunk, negative_lse: Tensor, column_lse: Tensor, row_weight: Tensor) -> None:
        """Turn the chunk's logits into ``∂loss/∂ℓ`` in place, and add what follows from it to the gradients."""
        problem, wanted, rows = self.problem, self.wanted, chunk.rows
        weight = row_weight[rows, None] / (2 if problem.symmetric else 1)
        lse = torch.logaddexp(negative_lse[rows], chunk.positive_logit)
        target_weight = (1 - 1 / chunk.num_positives) - torch.exp(negative_lse[rows] - lse)
        by_row = (chunk.logits - lse[:, None]).exp_().mul_(weight)
        target_weight = target_weight * weight.squeeze(1)
        if chunk.positives is not None:
            by_row[:, : self.num_keys].sub_(chunk.positives * (weight / chunk.num_positives[:, None]))  # type: ignore[index]
        if problem.symmetric:
            column_weight = row_weight / 2
            full_lse = torch.logaddexp(column_lse[rows], chunk.positive_logit)
            target_weight -= torch.exp(column_lse[rows] - full_lse) * column_weight[rows]
            all_lse = self._full_column_lse(column_lse)
            by_row += (chunk.logits - all_lse[None, :]).exp_().mul_(column_weight[None, :])
        if wanted.extra_logits:
            self.extra_grad[rows] = by_row[:, self.num_similarities :]
        slope = by_row[:, : self.num_similarities]
        if wanted.scale:
            self._accumulate_scale(chunk, slope, target_weight)
        slope.scatter_(1, chunk.target[:, None], (target_weight * chunk.margin_slope)[:, None])
        self._accumulate_products(rows, slope.mul_(self.scale))

    def _full_column_lse(self, column_lse: Tensor) -> Tensor:
        """Log-sum-exp down the columns, their positives included."""
        if not hasattr(self, "_column_lse"):
            positive = (self.unit_query.rows * self.unit_columns[0].rows).sum(dim=1)
            self._column_lse = torch.logaddexp(column_lse, self.margin(positive)[0] * self.scale)
        return self._column_lse

    def _accumulate_scale(self, chunk: _Chunk, slope: Tensor, target_weight: Tensor) -> None:
        similarity = chunk.logits[:, : self.num_similarities].masked_fill(slope == 0, 0.0)
        total = (slope * similarity).sum() + (target_weight * chunk.positive_logit).sum()
        if self.problem.hard_negative_weight:
            own = slope[:, self.num_keys :].diagonal(chunk.rows.start)
            total = total - own.sum() * self.problem.hard_negative_weight
        self.scale_grad += total / self.scale

    def _accumulate_products(self, rows: slice, slope: Tensor) -> None:
        """``dQ = A K̂`` and ``dK = Aᵀ Q̂`` with A = ∂loss/∂s."""
        begin = 0
        query_grad = None
        for i, unit in enumerate(self.unit_columns):
            part = slope[:, begin : begin + unit.rows.shape[0]]
            begin += unit.rows.shape[0]
            if self.wanted.query:
                query_grad = part @ unit.rows if query_grad is None else query_grad.addmm_(part, unit.rows)
            if i < len(self.column_grads) and self.column_is_wanted[i]:
                self.column_grads[i].addmm_(part.T, self.unit_query.rows[rows])
        if query_grad is not None:
            self.query_grad[rows] = self.unit_query.gradient(query_grad, rows)

    def gradients(self) -> Gradients:
        columns = [
            unit.gradient(grad) if is_wanted else grad
            for unit, grad, is_wanted in zip(self.unit_columns, self.column_grads, self.column_is_wanted, strict=False)
        ]
        negatives_grad = columns[1] if len(columns) > 1 else self.scale.new_empty(0)
        return Gradients(self.query_grad, columns[0], negatives_grad, self.extra_grad, self.scale_grad)


def _loss(negative_lse: Tensor, chunk: _Chunk) -> Tensor:
    return _log1p_exp(negative_lse - chunk.positive_logit) + chunk.shift


def _log1p_exp(x: Tensor) -> Tensor:
    """``log(1 + eˣ)`` that keeps the digits of a small result and NaN."""
    return torch.logaddexp(x, torch.zeros_like(x))
