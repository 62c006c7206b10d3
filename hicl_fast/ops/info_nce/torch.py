"""InfoNCE in chunks of rows: a chunk's logits (R, C) are the largest thing there ever is.

With the rows' weights known, one sweep takes each chunk from logits to loss to gradients (three products);
the symmetric loss needs every row of a column first, so it sweeps twice (four products).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hicl_fast.ops.common.constants import Groups, Special
from hicl_fast.ops.common.numbers import scale_on
from hicl_fast.ops.common.precision import brought_to
from hicl_fast.ops.common.ragged import row_of_each
from hicl_fast.ops.common.unit_rows import UnitRows, row_dot
from hicl_fast.ops.info_nce.problem import Gradients, KindOfColumn, Problem, RowStatistics, Wanted
from hicl_fast.ops.info_nce.rows import RowWeights, limits, with_margin

# Up to ten temporaries of a chunk's size are in the allocator's hands at once; on a CPU, rows beyond some hundred gain nothing.
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
_OTHER_DEVICE_CHUNK_BYTES = 256 << 20


@dataclass
class _Kind:
    """A kind of column made ready: unit rows, their places among a row's logits, and their gradient as it grows."""

    rules: KindOfColumn
    unit: UnitRows  # (C, D)
    place: slice
    grad: Tensor  # (C, D); empty where it isn't wanted
    row_of_left_out: Tensor | None  # (T,) int64, the row that each of the columns in the rules' list is left out of


@dataclass
class _Chunk:
    """The logits of a few rows against every column."""

    rows: slice
    logits: Tensor  # (R, C) with −inf where a column is left out of the denominator, and at the positive
    target: Tensor  # (R,)
    positive: Tensor  # (R,) the positive's similarity
    positive_logit: Tensor  # (R,) with the margin
    margin_derivative: Tensor | float  # (R,) derivative of the positive's (margin-adjusted) similarity
    further_positives: list[tuple[_Kind, Tensor]]  # (R, C) bool of a kind's columns: positives beside the target
    num_positives: Tensor | float  # (R,)
    shift: Tensor | float  # (R,) positive_logit minus the mean logit of all positives


def forward(problem: Problem, row_weight: float, wanted: Wanted) -> tuple[RowStatistics, Gradients]:
    statistics, gradients = _forward(problem.with_exact_products(), row_weight, wanted)
    return brought_to(problem.dtype, statistics), brought_to(problem.dtype, gradients)


def backward(
    problem: Problem, negative_lse: Tensor, column_lse: Tensor, loss_grad: Tensor, wanted: Wanted
) -> Gradients:
    sweep = _Sweep(problem.with_exact_products(), wanted)
    return brought_to(problem.dtype, sweep.again(negative_lse, column_lse, loss_grad=loss_grad))


def log_sum_exp_backward(problem: Problem, negative_lse: Tensor, weights: RowWeights, wanted: Wanted) -> Gradients:
    sweep = _Sweep(problem.with_exact_products(), wanted)
    return brought_to(problem.dtype, sweep.again(negative_lse, negative_lse.new_empty(0), weights=weights))


def _forward(problem: Problem, row_weight: float, wanted: Wanted) -> tuple[RowStatistics, Gradients]:
    sweep = _Sweep(problem, wanted)
    loss, negative_lse, positive, hardest = (sweep.unit_query.factor.new_empty(sweep.num_rows) for _ in range(4))
    column_lse = loss.new_full((problem.key.shape[0] if problem.symmetric else 0,), -torch.inf)
    gradients_now = any(wanted) and not problem.symmetric
    weight = loss.new_full((), row_weight).expand(sweep.num_rows)

    for rows in sweep.chunks():
        chunk = sweep.chunk(rows)
        positive[rows] = chunk.positive
        hardest[rows] = sweep.hardest(chunk)
        sweep.add_to_logits(chunk)
        negative_lse[rows] = torch.logsumexp(chunk.logits, dim=1)
        loss[rows] = _loss(negative_lse[rows], chunk)
        if problem.symmetric:
            column_lse = torch.logaddexp(column_lse, torch.logsumexp(chunk.logits, dim=0))
        if gradients_now:
            weights = sweep.weights_of_loss(chunk, negative_lse[rows], weight[rows])
            sweep.accumulate(chunk, negative_lse[rows], column_lse, weights)

    statistics = RowStatistics(loss, negative_lse, column_lse, positive, hardest)
    if problem.symmetric:
        column_loss = _log1p_exp(column_lse - with_margin(positive, problem.margin)[0] * sweep.scale)
        statistics = statistics._replace(loss=(loss + column_loss) / 2)
        if any(wanted):
            return statistics, _Sweep(problem, wanted).again(negative_lse, column_lse, loss_grad=weight)
    return statistics, sweep.gradients()


class _Sweep:
    """The normalised inputs, and the gradients as they grow chunk by chunk."""

    def __init__(self, problem: Problem, wanted: Wanted) -> None:
        dtype, device = problem.dtype, problem.query.device
        self.problem, self.wanted = problem, wanted
        self.scale = scale_on(problem.scale, device, dtype)
        self.num_rows = problem.query.shape[0]
        self.unit_query = UnitRows.of(problem.query, dtype)
        self.nothing = self.scale.new_empty(0)
        self.kinds: list[_Kind] = []
        self.num_similarities = 0
        for columns in problem.columns(wanted):
            self._add(columns, UnitRows.of(columns.vectors, dtype))
        self.query_grad = torch.empty_like(self.unit_query.rows) if wanted.query else self.nothing
        self.extra_grad = (
            torch.empty_like(problem.extra_logits, dtype=dtype)
            if wanted.extra_logits and problem.extra_logits is not None
            else self.nothing
        )
        self.scale_grad = torch.zeros_like(self.scale) if wanted.scale else self.nothing

    def _add(self, columns: KindOfColumn, unit: UnitRows) -> None:
        first, self.num_similarities = self.num_similarities, self.num_similarities + columns.count
        grad = torch.zeros_like(unit.rows) if columns.wants_gradient else self.nothing
        rows = None
        if columns.left_out is not None and columns.left_out_offsets is not None:
            rows = row_of_each(columns.left_out_offsets, columns.left_out.shape[0])
        self.kinds.append(_Kind(columns, unit, slice(first, self.num_similarities), grad, rows))

    def chunks(self) -> list[slice]:
        extra = 0 if self.problem.extra_logits is None else self.problem.extra_logits.shape[1]
        row_bytes = (self.num_similarities + extra) * self.scale.element_size()
        budget = CHUNK_BYTES.get(self.scale.device.type, _OTHER_DEVICE_CHUNK_BYTES)
        size = max(16, budget // max(row_bytes, 1))
        return [slice(begin, min(begin + size, self.num_rows)) for begin in range(0, self.num_rows, size)]

    def chunk(self, rows: slice) -> _Chunk:
        problem, scale = self.problem, self.scale
        scaled_query = self.unit_query.rows[rows] * scale
        parts = [scaled_query @ kind.unit.rows.T for kind in self.kinds]
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
        positive_logit, derivative = with_margin(positive, problem.margin)
        chunk = _Chunk(rows, logits, target, positive, positive_logit * scale, derivative, [], 1.0, 0.0)
        for kind in self.kinds:
            self._mask_groups(chunk, kind)
            self._mask_listed(chunk, kind)
        self._mask_above_limit(chunk)
        logits.scatter_(1, target[:, None], -torch.inf)
        return chunk

    def _mask_groups(self, chunk: _Chunk, kind: _Kind) -> None:
        rules = kind.rules
        if rules.groups == Groups.ORDINARY or rules.query_group is None or rules.group is None:
            return
        in_group = same_group(rules.query_group[chunk.rows], rules.group)  # (R, C)
        logits = chunk.logits[:, kind.place]
        if rules.groups == Groups.EXCLUDED:
            logits.masked_fill_(in_group, -torch.inf)
            return
        if rules.special == Special.POSITIVE:
            in_group.scatter_(1, chunk.target[:, None], False)
        others = (logits - chunk.positive_logit[:, None]).masked_fill_(~in_group, 0.0).sum(dim=1)
        shift_of_all = chunk.shift * chunk.num_positives - others
        chunk.num_positives = chunk.num_positives + in_group.sum(dim=1, dtype=logits.dtype)
        chunk.shift = shift_of_all / chunk.num_positives
        chunk.further_positives.append((kind, in_group))

    def _mask_listed(self, chunk: _Chunk, kind: _Kind) -> None:
        """The columns of the chunk's rows among those of all rows, each at its place: no device is asked where a list begins."""
        columns, row = kind.rules.left_out, kind.row_of_left_out
        if columns is None or row is None:
            return
        num_rows, row_length = chunk.logits.shape
        row = row - chunk.rows.start
        outside = (row < 0) | (row >= num_rows)
        place = row.clamp(0, num_rows - 1) * row_length + kind.place.start + columns
        most = chunk.logits.new_full(place.shape, -torch.inf).masked_fill_(outside, torch.inf)
        chunk.logits.view(-1).scatter_reduce_(0, place, most, "amin")

    def _mask_above_limit(self, chunk: _Chunk) -> None:
        limit = limits(self.problem, chunk.positive, chunk.rows)
        if limit is None:
            return
        above = chunk.logits[:, : self.num_similarities] > (limit * self.scale)[:, None]
        for kind, positives in chunk.further_positives:
            above[:, kind.place] &= ~positives
        chunk.logits[:, : self.num_similarities].masked_fill_(above, -torch.inf)

    def hardest(self, chunk: _Chunk) -> Tensor:
        """The largest similarity among a row's negatives. Call before anything is added to logits."""
        similarities = chunk.logits[:, : self.num_similarities]
        if chunk.further_positives:
            similarities = similarities.clone()
        for kind, positives in chunk.further_positives:
            similarities[:, kind.place].masked_fill_(positives, -torch.inf)
        return similarities.amax(dim=1) / self.scale

    def add_to_logits(self, chunk: _Chunk) -> None:
        """Hardness, and the bias of own negatives."""
        for kind in self.kinds:
            if kind.rules.hardness:
                chunk.logits[:, kind.place] *= 1 + kind.rules.hardness / self.scale
        for kind, own in self._own_negatives(chunk.rows, chunk.logits):
            own += kind.rules.bias

    def _own_negatives(self, rows: slice, of_columns: Tensor) -> Iterator[tuple[_Kind, Tensor]]:
        """The entries (R,) of (R, C) that stand at the rows' own negatives: a view, by kind of column."""
        for kind in self.kinds:
            if kind.rules.special == Special.OWN_NEGATIVE:
                yield kind, of_columns[:, kind.place].diagonal(rows.start)

    def again(
        self,
        negative_lse: Tensor,
        column_lse: Tensor,
        *,
        loss_grad: Tensor | None = None,
        weights: RowWeights | None = None,
    ) -> Gradients:
        """The gradients, with the rows' statistics known: of the loss, or with the rows' weights (N,) as they are given."""
        if loss_grad is not None and self.problem.symmetric:
            weights = self._weights_of_both_directions(negative_lse, column_lse, loss_grad)
        for rows in self.chunks():
            chunk = self.chunk(rows)
            self.add_to_logits(chunk)
            if weights is None:
                assert loss_grad is not None
                of_chunk = self.weights_of_loss(chunk, negative_lse[rows], loss_grad[rows])
            else:
                of_chunk = RowWeights(weights.negative[rows], weights.positive[rows], weights.column)
            self.accumulate(chunk, negative_lse[rows], column_lse, of_chunk)
        return self.gradients()

    def weights_of_loss(self, chunk: _Chunk, negative_lse: Tensor, loss_grad: Tensor) -> RowWeights:  # (R,) each
        return RowWeights.of_loss(
            loss_grad.to(self.scale.dtype),
            negative_lse,
            self.nothing,
            chunk.positive_logit,
            has_several_positives=bool(chunk.further_positives),
        )

    def _weights_of_both_directions(self, negative_lse: Tensor, column_lse: Tensor, loss_grad: Tensor) -> RowWeights:
        positive = row_dot(self.unit_query.rows, self.kinds[0].unit.rows)
        positive_logit = with_margin(positive, self.problem.margin)[0] * self.scale
        return RowWeights.of_loss(
            loss_grad.to(self.scale.dtype), negative_lse, column_lse, positive_logit, has_several_positives=False
        )

    def accumulate(self, chunk: _Chunk, negative_lse: Tensor, column_lse: Tensor, weights: RowWeights) -> None:
        """Turn the chunk's logits into ``∂/∂ℓ`` in place, and add what follows from it to the gradients."""
        wanted, rows = self.wanted, chunk.rows
        logits_grad = (chunk.logits - _finite(negative_lse)[:, None]).exp_().mul_(weights.negative[:, None])
        target_grad = weights.positive
        if weights.shift is not None:
            target_grad = target_grad + (1 - 1 / chunk.num_positives) * weights.shift
            share = (weights.shift / chunk.num_positives)[:, None]
            for kind, positives in chunk.further_positives:
                logits_grad[:, kind.place].sub_(positives * share)
        if weights.column is not None:
            logits_grad += (chunk.logits - _finite(column_lse)[None, :]).exp_().mul_(weights.column[None, :])
        if wanted.extra_logits:
            self.extra_grad[rows] = logits_grad[:, self.num_similarities :]
        similarity_grad = logits_grad[:, : self.num_similarities]  # up to the scale
        if wanted.scale:
            self._accumulate_scale(chunk, similarity_grad, target_grad)
        similarity_grad.scatter_(1, chunk.target[:, None], (target_grad * chunk.margin_derivative)[:, None])
        self._accumulate_products(rows, similarity_grad.mul_(self.scale))

    def _accumulate_scale(self, chunk: _Chunk, logits_grad: Tensor, target_grad: Tensor) -> None:
        products = logits_grad * chunk.logits[:, : self.num_similarities].masked_fill(logits_grad == 0, 0.0)
        for (kind, own), (_, own_grad) in zip(
            self._own_negatives(chunk.rows, products), self._own_negatives(chunk.rows, logits_grad), strict=True
        ):
            own -= own_grad * kind.rules.bias
        for kind in self.kinds:  # what is added isn't scaled
            if kind.rules.hardness:
                products[:, kind.place] *= self.scale / (self.scale + kind.rules.hardness)
        total = products.sum() + (target_grad * chunk.positive_logit).sum()
        self.scale_grad += total / self.scale

    def _accumulate_products(self, rows: slice, similarity_grad: Tensor) -> None:
        """``dQ = A K̂`` and ``dK = Aᵀ Q̂`` with A = ∂loss/∂s."""
        query_grad = None
        for kind in self.kinds:
            part = similarity_grad[:, kind.place]
            if self.wanted.query:
                query_grad = part @ kind.unit.rows if query_grad is None else query_grad.addmm_(part, kind.unit.rows)
            if kind.rules.wants_gradient:
                kind.grad.addmm_(part.T, self.unit_query.rows[rows])
        if query_grad is not None:
            self.query_grad[rows] = self.unit_query.gradient(query_grad, rows)

    def gradients(self) -> Gradients:
        of_kinds = {
            kind.rules.name: kind.unit.gradient(kind.grad) if kind.rules.wants_gradient else kind.grad
            for kind in self.kinds
        }
        negatives_grad = of_kinds.get("negatives", self.nothing)
        return Gradients(self.query_grad, of_kinds["key"], negatives_grad, self.extra_grad, self.scale_grad)


def same_group(query_group: Tensor, group: Tensor) -> Tensor:  # (R, G), (C, G) -> (R, C)
    """Whether one of row's and column's ids is the same."""
    found = query_group[:, None, 0] == group[None, :, 0]
    for relation in range(1, group.shape[1]):
        found |= query_group[:, None, relation] == group[None, :, relation]
    return found


def _loss(negative_lse: Tensor, chunk: _Chunk) -> Tensor:
    return _log1p_exp(negative_lse - chunk.positive_logit) + chunk.shift


def _finite(lse: Tensor) -> Tensor:
    """What is subtracted from logits that are all −∞ is 0: they stay −∞."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _log1p_exp(x: Tensor) -> Tensor:
    """``log(1 + eˣ)`` that keeps the digits of a small result and NaN."""
    return torch.logaddexp(x, torch.zeros_like(x))
