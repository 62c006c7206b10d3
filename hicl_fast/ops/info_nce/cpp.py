"""InfoNCE through csrc/cpu/info_nce.cpp."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from hicl_fast.ops.common.precision import brought_to
from hicl_fast.ops.info_nce.problem import Gradients, KindOfColumn, Mixing, Problem, RowStatistics, Wanted
from hicl_fast.ops.info_nce.rows import RowWeights

MIXES_WHILE_SWEEPING = True  # `forward` takes a Mixing

# Of each kind of column the operator takes the tensors and the numbers among its fields, in their order.
_is_tensor = {one.name: "Tensor" in str(one.type) for one in fields(KindOfColumn) if one.name != "name"}
tensors_of = operator.attrgetter(*(name for name, is_tensor in _is_tensor.items() if is_tensor))
numbers_of = operator.attrgetter(*(name for name, is_tensor in _is_tensor.items() if not is_tensor))


def forward(
    problem: Problem, row_weight: float, wanted: Wanted, mixing: Mixing | None = None
) -> tuple[RowStatistics, Gradients]:
    return _run(problem, wanted, row_weight=row_weight, mixing=mixing)


def backward(
    problem: Problem, negative_lse: Tensor, column_lse: Tensor, loss_grad: Tensor, wanted: Wanted
) -> Gradients:
    """Sweeps again: with a block's whole rows in cache their statistics cost next to nothing."""
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
    mixing: Mixing | None = None,
) -> tuple[RowStatistics, Gradients]:
    asked, problem = problem, problem.with_exact_products()
    dtype, kinds = problem.dtype, problem.columns(wanted)
    # Below autograd: its fallback for operators that have no gradient costs as much as the rest of a small call.
    with torch._C._AutoDispatchBelowAutograd():
        loss, negative_lse, column_lse, positive, hardest, total, *gradients, hard_negatives = _operator()(
            _ready(problem.query, dtype),
            [_ready(x, dtype) for columns in kinds for x in tensors_of(columns)],
            [float(x) for columns in kinds for x in numbers_of(columns)],
            _ready(problem.extra_logits, dtype),
            _ready(loss_grad, dtype),
            *((None, None) if weights is None else (_ready(weights.negative, dtype), _ready(weights.positive, dtype))),
            _ready(problem.limit, dtype),
            problem.false_negative_margin,
            problem.false_negative_ratio,
            row_weight,
            float(problem.scale),
            problem.margin,
            problem.symmetric,
            *((None, 0, 0.0) if mixing is None else (mixing.pairs.contiguous(), mixing.k, mixing.alpha)),
            wanted.query,
            wanted.extra_logits,
            wanted.scale,
        )
    statistics = RowStatistics(loss, negative_lse, column_lse, positive, hardest, hard_negatives, total)
    query, of_columns, extra_logits, scale = gradients
    found = {columns.name: gradient for columns, gradient in zip(kinds, of_columns, strict=True)}
    nothing = loss.new_empty(0) if wanted.scale else scale
    by_input = Gradients(query, found["key"], found.get("negatives", nothing), extra_logits, scale)
    if problem is asked:
        return statistics, by_input
    return brought_to(asked.dtype, statistics), brought_to(asked.dtype, by_input)


def _ready(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Contiguous, vectors and logits in one type."""
    if x is None or (x.is_contiguous() and (x.dtype == dtype or x.dtype == torch.int64)):
        return x
    return x.detach().to(torch.int64 if x.dtype == torch.int64 else dtype).contiguous()


@functools.cache
def _operator() -> Callable[..., tuple[Any, ...]]:
    return torch.ops.hicl_fast_cpp.info_nce.default
