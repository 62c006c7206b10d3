"""``hicl_fast::info_nce``: schema, fake kernel, autograd.

Two operators, because what can be saved depends on what is known in the forward pass:

``info_nce_mean`` knows every row's weight (1/N or 1), so one sweep over the similarities gives loss *and* gradients:
three matrix products in all. Backward only scales what was saved.

``info_nce_rows`` returns a loss per row; the rows' weights arrive in the backward pass, which sweeps again:
one product forward, three backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hicl_fast.ops.backends import registry
from hicl_fast.ops.common.autograd import (
    Again,
    Value,
    distinct,
    first_derivatives,
    holds_values,
    is_one,
    save_problem,
    saved_problem,
    without_autocast,
)
from hicl_fast.ops.common.shapes import check_shapes
from hicl_fast.ops.hard_negatives.operator import check_found
from hicl_fast.ops.info_nce import by_reference
from hicl_fast.ops.info_nce.problem import (
    DIFFERENTIABLE,
    FIELDS,
    GRADIENTS_SCHEMA,
    NOTHING,
    SCHEMA,
    Gradients,
    Mixing,
    Problem,
    Result,
    RowStatistics,
    Wanted,
)

_library = torch.library.Library("hicl_fast", "FRAGMENT")
_library.define(
    f"info_nce_mean({SCHEMA}, str reduction, bool[] wanted, str backend) "
    f"-> (Tensor loss, Tensor positive, Tensor hardest, {GRADIENTS_SCHEMA})"
)
_library.define(
    f"info_nce_rows({SCHEMA}, str backend) "
    "-> (Tensor loss, Tensor positive, Tensor hardest, Tensor negative_lse, Tensor column_lse)"
)
_library.define(
    f"info_nce_rows_backward({SCHEMA}, Tensor negative_lse, Tensor column_lse, Tensor loss_grad, bool[] wanted, str backend) "
    f"-> ({GRADIENTS_SCHEMA})"
)


# --- what the operators do -------------------------------------------------------------------------------------------


def sweep(
    problem: Problem, reduction: str, wanted: Wanted, backend: str, mixing: Mixing | None = None
) -> tuple[Result, Gradients]:
    problem.check_values()
    row_weight = 1.0 / problem.query.shape[0] if reduction == "mean" else 1.0
    forward = registry.implementation("info_nce", backend).forward
    with without_autocast(problem.query.device.type):
        options = (problem, row_weight, wanted)
        statistics, gradients = forward(*options) if mixing is None else forward(*options, mixing)
        loss = statistics.total
        if loss is None:
            loss = statistics.loss.mean() if reduction == "mean" else statistics.loss.sum()
    if mixing is None:
        return Result(loss, statistics.positive, statistics.hardest), gradients
    check_found(statistics.hard_negatives, mixing.k)
    return Result(loss, statistics.positive, statistics.hardest, statistics.hard_negatives), gradients


def _sweep_rows(problem: Problem, backend: str) -> tuple[Tensor, ...]:
    problem.check_values()
    with without_autocast(problem.query.device.type):
        statistics, _ = registry.implementation("info_nce", backend).forward(problem, 1.0, NOTHING)
    return statistics.loss, statistics.positive, statistics.hardest, statistics.negative_lse, statistics.column_lse


def _sweep_rows_backward(
    problem: Problem, negative_lse: Tensor, column_lse: Tensor, loss_grad: Tensor, wanted: Wanted, backend: str
) -> Gradients:
    with without_autocast(problem.query.device.type):
        implementation = registry.implementation("info_nce", backend)
        return implementation.backward(problem, negative_lse, column_lse, loss_grad, wanted)


def checked(operator: str, flat: Sequence[Any], **others: tuple[Tensor, str]) -> Problem:
    problem = Problem(*flat)
    check_shapes(operator, **problem.shapes(), **others)
    n, m = problem.query.shape[0], problem.key.shape[0]
    if problem.target is None and m < n:
        raise ValueError(f"{operator}: key: expected at least {n} rows without a target, got {m}")
    if problem.hard_negative_weight and (problem.negatives is None or problem.negatives.shape[0] < n):
        raise ValueError(f"{operator}: negatives: expected at least {n} rows with hard_negative_weight")
    groups = (problem.key_group, problem.negatives_group, problem.bank_group)
    if problem.query_group is None and any(group is not None for group in groups):
        raise ValueError(f"{operator}: query_group: expected an int64 tensor with groups of columns, got none")
    return problem


def _run_mean(*args: Any) -> tuple[Tensor, ...]:
    *flat, reduction, wanted, backend = args
    result, gradients = sweep(checked("info_nce", flat), reduction, Wanted(*wanted), backend)
    return distinct((*result[:3], *gradients))


def _run_rows(*args: Any) -> tuple[Tensor, ...]:
    *flat, backend = args
    return _sweep_rows(checked("info_nce", flat), backend)


def _run_rows_backward(*args: Any) -> tuple[Tensor, ...]:
    *flat, negative_lse, column_lse, loss_grad, wanted, backend = args
    problem = checked("info_nce", flat, negative_lse=(negative_lse, "N"), loss_grad=(loss_grad, "N"))
    return distinct(_sweep_rows_backward(problem, negative_lse, column_lse, loss_grad, Wanted(*wanted), backend))


for _name, _run in (
    ("info_nce_mean", _run_mean),
    ("info_nce_rows", _run_rows),
    ("info_nce_rows_backward", _run_rows_backward),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")


# --- what shapes and types they return -------------------------------------------------------------------------------


def fake_statistics(problem: Problem) -> RowStatistics:
    def empty(length: int) -> Tensor:
        return problem.query.new_empty(length, dtype=problem.dtype)

    n = problem.query.shape[0]
    return RowStatistics(
        empty(n), empty(n), empty(problem.key.shape[0] if problem.symmetric else 0), empty(n), empty(n)
    )


def fake_gradients(problem: Problem, wanted: Wanted) -> Gradients:
    def like(name: str, is_wanted: bool) -> Tensor:
        value = getattr(problem, name)
        return problem.query.new_empty(value.shape if is_wanted else (0,), dtype=problem.dtype)

    return Gradients(*(like(name, flag) for name, flag in zip(DIFFERENTIABLE, wanted, strict=True)))


@torch.library.register_fake("hicl_fast::info_nce_mean", lib=_library)
def _fake_mean(*args: Any) -> tuple[Tensor, ...]:
    *flat, _, wanted, _ = args
    problem = Problem(*flat)
    statistics = fake_statistics(problem)
    gradients = fake_gradients(problem, Wanted(*wanted))
    return statistics.loss.new_empty(()), statistics.positive, statistics.hardest, *gradients


@torch.library.register_fake("hicl_fast::info_nce_rows", lib=_library)
def _fake_rows(*args: Any) -> tuple[Tensor, ...]:
    statistics = fake_statistics(Problem(*args[: len(FIELDS)]))
    return statistics.loss, statistics.positive, statistics.hardest, statistics.negative_lse, statistics.column_lse


@torch.library.register_fake("hicl_fast::info_nce_rows_backward", lib=_library)
def _fake_rows_backward(*args: Any) -> tuple[Tensor, ...]:
    *flat, _, _, _, wanted, _ = args
    return tuple(fake_gradients(Problem(*flat), Wanted(*wanted)))


# --- autograd --------------------------------------------------------------------------------------------------------
#
# Twice over the same few functions: for the registered operators, whose arguments are flat, and for eager calls, which
# step over the dispatcher and hand the problem through as it is.


class _Destination(NamedTuple):
    """Where a gradient goes."""

    dtype: torch.dtype
    device: torch.device

    def take(self, gradient: Tensor) -> Tensor:
        if gradient.dtype == self.dtype and gradient.device == self.device:
            return gradient
        return gradient.to(device=self.device, dtype=self.dtype)

    def take_scaled(self, gradient: Tensor, factor: Tensor) -> Tensor:  # factor ()
        """The product in the wider type, rounded once; in one pass where nobody watches."""
        factor = factor.to(gradient.device)
        if gradient.device != self.device or torch.is_grad_enabled() or not holds_values(gradient, factor):
            return self.take(gradient * factor)
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=self.dtype))


def _destinations(inputs: Iterable[Tensor | None], wanted: Iterable[bool]) -> list[_Destination | None]:
    return [
        _Destination(x.dtype, x.device) if x is not None and is_wanted else None
        for x, is_wanted in zip(inputs, wanted, strict=True)
    ]


def _save_gradients(ctx: Any, inputs: Iterable[Tensor | None], wanted: Wanted, gradients: Iterable[Tensor]) -> None:
    ctx.destinations = _destinations(inputs, wanted)
    ctx.save_for_backward(*gradients)
    ctx.set_materialize_grads(False)


def _mean_gradients(ctx: Any, loss_grad: Tensor | None) -> Sequence[Tensor | None]:
    if loss_grad is None:
        return [None] * len(ctx.destinations)
    return ctx.again.first_derivatives(lambda: _saved_gradients(ctx, loss_grad), loss_grad)


def _saved_gradients(ctx: Any, loss_grad: Tensor) -> list[Tensor | None]:
    """The saved gradients times the upstream one: kept in the type of the sums until here, so that a scaled float16
    loss doesn't underflow."""
    handed_out = is_one(loss_grad)

    def give(gradient: Tensor, to: _Destination | None) -> Tensor | None:
        if to is None:
            return None
        return to.take(gradient) if handed_out else to.take_scaled(gradient, loss_grad)

    return [give(gradient, to) for gradient, to in zip(ctx.saved_tensors, ctx.destinations, strict=True)]


def of_inputs(problem: Problem, wanted: Wanted, gradients: Iterable[Tensor]) -> list[Tensor | None]:
    """The gradients in their inputs' types."""
    destinations = _destinations(problem.differentiable(), wanted)
    return [None if to is None else to.take(gradient) for gradient, to in zip(gradients, destinations, strict=True)]


def _row_gradients(ctx: Any, loss_grad: Tensor | None, needs_grad: Iterable[bool]) -> Sequence[Tensor | None]:
    wanted = Wanted(*needs_grad)
    if loss_grad is None:
        return [None] * len(wanted)
    problem, is_eager, (negative_lse, column_lse) = saved_problem(ctx, Problem)

    def compute() -> list[Tensor | None]:
        if is_eager:
            gradients = _sweep_rows_backward(problem, negative_lse, column_lse, loss_grad, wanted, ctx.backend)
        else:
            gradients = torch.ops.hicl_fast.info_nce_rows_backward(
                *problem.flat(), negative_lse, column_lse, loss_grad, list(wanted), ctx.backend
            )
        return of_inputs(problem, wanted, gradients)

    return first_derivatives(compute, _value(problem, "none"), loss_grad, problem.differentiable())


def _again(problem: Problem, reduction: str, mixing: Mixing | None = None, index: Tensor | None = None) -> Again:
    constants = (*problem.constants(), index, None if mixing is None else mixing.pairs)
    return Again("info_nce", _value(problem, reduction, mixing, index), problem.differentiable(), *constants)


def _value(problem: Problem, reduction: str, mixing: Mixing | None = None, index: Tensor | None = None) -> Value:
    """The loss as a function of what can have a gradient; ``index`` (N, k): the keys that were mixed."""

    def value(*inputs: Tensor | None) -> Tensor:
        again = replace(problem, **dict(zip(DIFFERENTIABLE, inputs, strict=True)))  # type: ignore[arg-type]
        mixed = None if mixing is None or index is None else by_reference.mixed_logits(again, mixing, index)
        return by_reference.info_nce(again, reduction, mixed).loss

    return value


class InfoNCEMean(torch.autograd.Function):
    """``info_nce_mean`` without the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: Problem,
        mixing: Mixing | None,
        reduction: str,
        wanted: Wanted,
        backend: str,
        *inputs: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        result, gradients = sweep(problem, reduction, wanted, backend, mixing)
        _save_gradients(ctx, inputs, wanted, gradients)
        ctx.again = _again(problem, reduction, mixing, result.hard_negatives)
        ctx.mark_non_differentiable(*(x for x in result[1:] if x is not None))
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return (*[None] * 5, *_mean_gradients(ctx, loss_grad))


class InfoNCERows(torch.autograd.Function):
    """``info_nce_rows`` without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, backend: str, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        outputs = _sweep_rows(problem, backend)
        save_problem(ctx, problem, backend, *outputs[3:])
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return (None, None, *_row_gradients(ctx, loss_grad, ctx.needs_input_grad[2:]))


def among_arguments(gradients: Iterable[Tensor | None], num_arguments: int) -> tuple[Tensor | None, ...]:
    """The gradients at their inputs' places among a registered operator's arguments."""
    placed: list[Tensor | None] = [None] * num_arguments
    for name, gradient in zip(DIFFERENTIABLE, gradients, strict=True):
        placed[FIELDS.index(name)] = gradient
    return tuple(placed)


def _setup_mean(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *flat, reduction, wanted, _ = inputs
    problem = Problem(*flat)
    _save_gradients(ctx, problem.differentiable(), Wanted(*wanted), output[3:])
    ctx.again = _again(problem, reduction)
    ctx.mark_non_differentiable(*output[1:])


def _backward_mean(ctx: Any, loss_grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return among_arguments(_mean_gradients(ctx, loss_grad), len(FIELDS) + 3)


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *flat, backend = inputs
    save_problem(ctx, Problem(*flat), backend, *output[3:])
    ctx.mark_non_differentiable(*output[1:])


def _backward_rows(ctx: Any, loss_grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needs_grad = [ctx.needs_input_grad[FIELDS.index(name)] for name in DIFFERENTIABLE]
    return among_arguments(_row_gradients(ctx, loss_grad, needs_grad), len(FIELDS) + 1)


torch.library.register_autograd("hicl_fast::info_nce_mean", _backward_mean, setup_context=_setup_mean, lib=_library)
torch.library.register_autograd("hicl_fast::info_nce_rows", _backward_rows, setup_context=_setup_rows, lib=_library)
