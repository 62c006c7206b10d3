"""``hicl_fast::log_sum_exp``: schema, fake kernel, autograd.

It takes InfoNCE's :class:`Problem` and runs InfoNCE's backends: one product forward, three backward, as
``hicl_fast::info_nce_rows`` does, but what is differentiated are a row's two logits and not the loss that they make.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hicl_fast.ops.backends import registry
from hicl_fast.ops.common.autograd import (
    distinct,
    first_derivatives,
    is_transformed,
    runs_eagerly,
    save_problem,
    saved_problem,
    without_autocast,
)
from hicl_fast.ops.common.numbers import scale_on
from hicl_fast.ops.info_nce.operator import (
    among_arguments,
    checked,
    fake_gradients,
    fake_statistics,
    of_inputs,
)
from hicl_fast.ops.info_nce.problem import (
    DIFFERENTIABLE,
    FIELDS,
    GRADIENTS_SCHEMA,
    NOTHING,
    SCHEMA,
    Gradients,
    Problem,
    Wanted,
)
from hicl_fast.ops.info_nce.rows import RowWeights, limits_of, with_margin
from hicl_fast.ops.log_sum_exp import by_reference
from hicl_fast.ops.own_negatives.operator import apply as own_log_sum_exp
from hicl_fast.ops.own_negatives.problem import Own


class Outputs(NamedTuple):
    """The first two have gradients."""

    negative: Tensor  # (N,) log-sum-exp over the row's columns without its positive; −inf where there is none
    positive: Tensor  # (N,) the positive's logit; (T,) where rows have several targets
    similarity: Tensor  # (N,) the positive's similarity; likewise
    hardest: Tensor  # (N,) largest similarity among the negatives; −inf where there is none


_library = torch.library.Library("hicl_fast", "FRAGMENT")
_library.define(
    f"log_sum_exp({SCHEMA}, str backend) -> (Tensor negative, Tensor positive, Tensor similarity, Tensor hardest)"
)
_library.define(
    f"log_sum_exp_backward({SCHEMA}, Tensor negative, Tensor negative_grad, Tensor positive_grad, bool[] wanted, "
    f"str backend) -> ({GRADIENTS_SCHEMA})"
)


def apply(problem: Problem, backend: str, own: Own | None = None, *, in_batch: bool = True) -> Outputs:
    """The rows of a problem, with what each query alone is compared with; without ``in_batch`` the keys are positives alone."""
    if not in_batch or problem.targets is not None:
        return _apply_with_positives_apart(problem, backend, own, in_batch=in_batch)
    return _apply_with_own(problem, backend, own)


def _apply_with_own(problem: Problem, backend: str, own: Own | None) -> Outputs:
    if own is None:
        return _apply(problem, backend)
    problem, hardest = with_own_negatives(problem, own, backend)
    rows = _apply(problem, backend)
    return rows._replace(hardest=torch.maximum(rows.hardest, hardest))


def with_own_negatives(problem: Problem, own: Own, backend: str) -> tuple[Problem, Tensor]:
    """The problem with the own negatives' log-sum-exps as one more logit of each row; and their hardest (N,)."""
    problem = _with_query_for_two(problem)
    has_groups = problem.query_group is not None and own.group is not None
    own = replace(
        own,
        query=problem.query,
        limit=limits_of(problem),
        query_group=problem.query_group if has_groups else None,
        group=own.group if has_groups else None,
    )
    lse, hardest = own_log_sum_exp(own, backend)
    logits = lse[:, None]
    if problem.extra_logits is not None:
        dtype = torch.promote_types(problem.extra_logits.dtype, logits.dtype)
        logits = torch.cat([problem.extra_logits.to(dtype), logits.to(dtype)], dim=1)
    return replace(problem, extra_logits=logits), hardest


def _with_query_for_two(problem: Problem, *, key_too: bool = False) -> Problem:
    """The query in the type of the sums, since it goes into two operators whose gradients are added, and rounded once."""
    are_bf16 = problem.precision == "default" and all(
        x is None or x.dtype == torch.bfloat16 for x in (problem.query, problem.key, problem.negatives, problem.bank)
    )
    precision = "bf16" if are_bf16 else problem.precision
    key = problem.key.to(problem.dtype) if key_too else problem.key
    return replace(problem, query=problem.query.to(problem.dtype), key=key, precision=precision)


def _apply_with_positives_apart(problem: Problem, backend: str, own: Own | None, *, in_batch: bool) -> Outputs:
    """Each row's logits with its positives by themselves, as many as it has, and its sum over the other columns."""
    problem.check_values()
    problem = _with_query_for_two(problem, key_too=in_batch)
    positive, similarity = _positives(problem, backend)
    others = replace(problem, margin=0.0) if in_batch else _without_batch(problem)
    rows = _apply_with_own(others, backend, own)
    return Outputs(rows.negative, positive, similarity, rows.hardest)


def _positives(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """The logits and similarities of a row's positive, (N,), or of all its positives, (T,)."""
    if problem.targets is not None:
        query = problem.query.index_select(0, problem.row_of_targets())
        positives = problem.key.index_select(0, problem.targets)
    else:
        query, n, target = problem.query, problem.query.shape[0], problem.target
        positives = problem.key[:n] if target is None else problem.key.index_select(0, target)
    one_each = torch.arange(query.shape[0] + 1, device=query.device)
    logit, similarity = own_log_sum_exp(Own(query, positives, one_each, problem.scale), backend)
    if problem.margin:
        scale = problem.scale.to(device=logit.device, dtype=logit.dtype)
        logit = with_margin(logit / scale, problem.margin)[0] * scale
    return logit, similarity


def _without_batch(problem: Problem) -> Problem:
    """The columns but the keys: nothing of the size of queries × keys is computed."""
    query, n = problem.query, problem.query.shape[0]
    return replace(
        problem,
        key=query.new_zeros(1, query.shape[1]),  # stands in for the positive, and nothing is asked of it
        target=torch.zeros(n, dtype=torch.int64, device=query.device),
        targets=None,
        target_offsets=None,
        key_group=None if problem.key_group is None or problem.query_group is None else problem.query_group[:1],
        limit=limits_of(problem),
        false_negative_margin=math.inf,
        false_negative_ratio=math.inf,
        margin=0.0,
    )


def _apply(problem: Problem, backend: str) -> Outputs:
    inputs = problem.differentiable()
    chosen = registry.choose(backend, "info_nce", problem.query.device.type, problem.dtype, problem.features())
    if is_transformed(*inputs):
        problem.check_values()
        return Outputs(*by_reference.log_sum_exp(problem))
    if not runs_eagerly(*inputs):
        return Outputs(*torch.ops.hicl_fast.log_sum_exp(*problem.flat(), chosen))
    return Outputs(*LogSumExp.apply(problem, chosen, *inputs))


# --- what the operators do -------------------------------------------------------------------------------------------


def _sweep(problem: Problem, backend: str) -> Outputs:
    problem.check_values()
    with without_autocast(problem.query.device.type):
        statistics, _ = registry.implementation("info_nce", backend).forward(problem, 1.0, NOTHING)
        similarity, _ = with_margin(statistics.positive, problem.margin)
        scale = scale_on(problem.scale, similarity.device, similarity.dtype)
    return Outputs(statistics.negative_lse, similarity * scale, statistics.positive, statistics.hardest)


def _sweep_backward(
    problem: Problem, negative: Tensor, negative_grad: Tensor, positive_grad: Tensor, wanted: Wanted, backend: str
) -> Gradients:
    with without_autocast(problem.query.device.type):
        weights = RowWeights(negative_grad.masked_fill(negative == -torch.inf, 0.0), positive_grad)
        return registry.implementation("info_nce", backend).log_sum_exp_backward(problem, negative, weights, wanted)


def _run(*args: Any) -> tuple[Tensor, ...]:
    *flat, backend = args
    return tuple(_sweep(checked("log_sum_exp", flat), backend))


def _run_backward(*args: Any) -> tuple[Tensor, ...]:
    *flat, negative, negative_grad, positive_grad, wanted, backend = args
    of_rows = {"negative": negative, "negative_grad": negative_grad, "positive_grad": positive_grad}
    problem = checked("log_sum_exp_backward", flat, **{name: (x, "N") for name, x in of_rows.items()})
    return distinct(_sweep_backward(problem, negative, negative_grad, positive_grad, Wanted(*wanted), backend))


for _name, _implementation in (("log_sum_exp", _run), ("log_sum_exp_backward", _run_backward)):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")


# --- what shapes and types they return -------------------------------------------------------------------------------


@torch.library.register_fake("hicl_fast::log_sum_exp", lib=_library)
def _fake(*args: Any) -> tuple[Tensor, ...]:
    statistics = fake_statistics(Problem(*args[: len(FIELDS)]))
    return statistics.negative_lse, statistics.loss, statistics.positive, statistics.hardest


@torch.library.register_fake("hicl_fast::log_sum_exp_backward", lib=_library)
def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    *flat, _, _, _, wanted, _ = args
    return tuple(fake_gradients(Problem(*flat), Wanted(*wanted)))


# --- autograd: for eager calls, and for the registered operators ---------------------------------------------------


def _gradients(
    ctx: Any, negative_grad: Tensor | None, positive_grad: Tensor | None, needs_grad: Iterable[bool]
) -> Sequence[Tensor | None]:
    wanted = Wanted(*needs_grad)
    if negative_grad is None and positive_grad is None:
        return [None] * len(wanted)
    problem, is_eager, (negative,) = saved_problem(ctx, Problem)
    by_negative = torch.zeros_like(negative) if negative_grad is None else negative_grad
    by_positive = torch.zeros_like(negative) if positive_grad is None else positive_grad

    def compute() -> list[Tensor | None]:
        if is_eager:
            found = _sweep_backward(problem, negative, by_negative, by_positive, wanted, ctx.backend)
        else:
            found = torch.ops.hicl_fast.log_sum_exp_backward(
                *problem.flat(), negative, by_negative, by_positive, list(wanted), ctx.backend
            )
        return of_inputs(problem, wanted, found)

    def value(*inputs: Tensor | None) -> Tensor:  # (2, N): as one, since it is differentiated by one upstream gradient
        again = replace(problem, **dict(zip(DIFFERENTIABLE, inputs, strict=True)))  # type: ignore[arg-type]
        return torch.stack(by_reference.log_sum_exp(again)[:2])

    if not torch.is_grad_enabled():
        return compute()
    return first_derivatives(compute, value, torch.stack([by_negative, by_positive]), problem.differentiable())


class LogSumExp(torch.autograd.Function):
    """``hicl_fast::log_sum_exp`` without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, backend: str, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        outputs = _sweep(problem, backend)
        save_problem(ctx, problem, backend, outputs.negative)
        ctx.mark_non_differentiable(*outputs[2:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, negative_grad: Tensor | None, positive_grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        return (None, None, *_gradients(ctx, negative_grad, positive_grad, ctx.needs_input_grad[2:]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *flat, backend = inputs
    save_problem(ctx, Problem(*flat), backend, output[0])
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx: Any, negative_grad: Tensor | None, positive_grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    needs_grad = [ctx.needs_input_grad[FIELDS.index(name)] for name in DIFFERENTIABLE]
    return among_arguments(_gradients(ctx, negative_grad, positive_grad, needs_grad), len(FIELDS) + 1)


torch.library.register_autograd("hicl_fast::log_sum_exp", _backward, setup_context=_setup, lib=_library)
