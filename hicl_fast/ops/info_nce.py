"""``hicl_fast::info_nce``: schema, fake kernel, autograd.

Two operators, because what can be saved depends on what is known in the forward pass:

``info_nce_mean`` knows every row's weight (1/N or 1), so one sweep over the similarities gives loss *and* gradients:
three matrix products in all. Backward only scales what was saved.

``info_nce_rows`` returns a loss per row; the rows' weights arrive in the backward pass, which sweeps again:
one product forward, three backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hicl_fast.backend import registry
from hicl_fast.backend.features import features
from hicl_fast.ops import by_reference, hard_negatives, mixed_negatives
from hicl_fast.ops.autograd import (
    Again,
    Value,
    first_derivatives,
    holds_values,
    is_one,
    is_transformed,
    runs_eagerly,
    without_autocast,
)
from hicl_fast.ops.problem import DIFFERENTIABLE, NOTHING, Gradients, Mixing, Problem, RowStatistics, Wanted
from hicl_fast.ops.shapes import check_shapes

_PROBLEM = (
    "Tensor query, Tensor key, Tensor scale, Tensor? target, Tensor? negatives, Tensor? bank, Tensor? extra_logits, "
    "Tensor? query_group, Tensor? key_group, float hard_negative_weight, str same_group, float margin, bool symmetric, "
    "str precision"
)
_GRADIENTS = "Tensor query_grad, Tensor key_grad, Tensor negatives_grad, Tensor extra_logits_grad, Tensor scale_grad"
_FIELDS = [field.name for field in fields(Problem)]

_library = torch.library.Library("hicl_fast", "FRAGMENT")
_library.define(
    f"info_nce_mean({_PROBLEM}, str reduction, bool[] wanted, str backend) "
    f"-> (Tensor loss, Tensor positive, Tensor hardest, {_GRADIENTS})"
)
_library.define(
    f"info_nce_rows({_PROBLEM}, str backend) "
    "-> (Tensor loss, Tensor positive, Tensor hardest, Tensor negative_lse, Tensor column_lse)"
)
_library.define(
    f"info_nce_rows_backward({_PROBLEM}, Tensor negative_lse, Tensor column_lse, Tensor loss_grad, bool[] wanted, str backend) "
    f"-> ({_GRADIENTS})"
)


class Result(NamedTuple):
    """What a call gives; all but the loss is detached."""

    loss: Tensor  # (), or (N,) with reduction="none"
    positive: Tensor  # (N,) similarity of each row's positive
    hardest: Tensor  # (N,) and of its hardest negative; −inf where there is none
    hard_negatives: Tensor | None = None  # (N, k) int64, the keys that were mixed


def apply(
    problem: Problem,
    reduction: str,
    backend: str,
    mixing: Mixing | None = None,
    bank_group: Tensor | None = None,  # (B,) int64
) -> Result:
    if problem.same_group == "negative":
        bank_group = None
    if is_transformed(*problem.differentiable()):
        return _apply_transformed(problem, reduction, backend, mixing, bank_group)
    if mixing is not None:
        return _apply_mixing(problem, reduction, backend, mixing, bank_group)
    if problem.symmetric and not _one_sweep_covers_both_directions(problem):
        return _average_of_directions(problem, reduction, backend, bank_group)
    if bank_group is not None:
        problem = _with_bank_among_keys(problem, bank_group)
    backend = registry.choose(backend, "info_nce", problem.query.device.type, problem.dtype, features(problem))
    inputs = problem.differentiable()
    wanted = _wanted(inputs)
    if not runs_eagerly(*inputs):
        return _apply_traced(problem, reduction, wanted, backend)
    if reduction == "none":
        return Result(*_Rows.apply(problem, backend, *inputs)[:3])
    return _apply_mean(problem, reduction, wanted, backend)


def _apply_mean(problem: Problem, reduction: str, wanted: Wanted, backend: str, mixing: Mixing | None = None) -> Result:
    if any(wanted):
        return Result(*_Mean.apply(problem, mixing, reduction, wanted, backend, *problem.differentiable()))
    return Result(*_sweep(problem, reduction, wanted, backend, mixing)[0])


def _apply_traced(problem: Problem, reduction: str, wanted: Wanted, backend: str) -> Result:
    if reduction == "none":
        outputs = torch.ops.hicl_fast.info_nce_rows(*_flat(problem), backend)
    else:
        outputs = torch.ops.hicl_fast.info_nce_mean(*_flat(problem), reduction, list(wanted), backend)
    return Result(*outputs[:3])


def _with_bank_among_keys(problem: Problem, bank_group: Tensor) -> Problem:
    """Bank rows as keys without gradient, behind the others: then groups mean for them what they mean for keys."""
    assert problem.bank is not None and problem.key_group is not None
    keys, groups = torch.cat([problem.key, problem.bank]), torch.cat([problem.key_group, bank_group])
    return replace(problem, key=keys, key_group=groups, bank=None)


def _apply_mixing(problem: Problem, reduction: str, backend: str, mixing: Mixing, bank_group: Tensor | None) -> Result:
    """In the sweep over the similarities where the backend does that; else hard negatives and mixtures come first."""
    chosen = registry.choose(backend, "info_nce", problem.query.device.type, problem.dtype, features(problem))
    inputs = problem.differentiable()
    can_sweep = bank_group is None and reduction != "none" and runs_eagerly(*inputs, mixing.pairs)
    if can_sweep and _mixes_while_sweeping(chosen):
        mixed_negatives.check_indices("pairs", mixing.pairs, mixing.k, "places among the k")
        return _apply_mean(problem, reduction, _wanted(inputs), chosen, mixing)

    groups = (None, None) if problem.same_group == "negative" else (problem.query_group, problem.key_group)
    problem = _in_type_of_sums(problem)
    query, key = problem.query, problem.key
    _, index = hard_negatives.apply(query, key, mixing.k, problem.target, *groups, True, backend)
    logits = mixed_negatives.apply(query, key, index, mixing.pairs, mixing.alpha, problem.scale, backend)
    if problem.extra_logits is not None:
        logits = torch.cat([problem.extra_logits.to(logits.dtype), logits], dim=1)
    with_mixtures = replace(problem, extra_logits=logits)
    return apply(with_mixtures, reduction, backend, bank_group=bank_group)._replace(hard_negatives=index)


def _mixes_while_sweeping(backend: str) -> bool:
    return getattr(registry.implementation("info_nce", backend), "MIXES_WHILE_SWEEPING", False)


def _apply_transformed(
    problem: Problem, reduction: str, backend: str, mixing: Mixing | None, bank_group: Tensor | None
) -> Result:
    registry.choose(backend, "info_nce", problem.query.device.type, problem.dtype, features(problem))  # or its refusal
    problem.check_values()
    index = mixed = None
    if mixing is not None:
        mixed_negatives.check_indices("pairs", mixing.pairs, mixing.k, "places among the k")
        index = by_reference.hardest_keys(problem, mixing.k)
        hard_negatives.check_found(index, mixing.k)
        mixed = by_reference.mixed_logits(problem, mixing, index)
    return Result(*by_reference.info_nce(problem, reduction, mixed, bank_group), index)


def _one_sweep_covers_both_directions(problem: Problem) -> bool:
    """Columns beyond the keys, and several positives, look different from the other side."""
    only_keys = problem.negatives is None and problem.bank is None and problem.extra_logits is None
    return only_keys and problem.same_group != "positive"


def _average_of_directions(problem: Problem, reduction: str, backend: str, bank_group: Tensor | None) -> Result:
    forward = replace(_in_type_of_sums(problem), symmetric=False)
    exchanged = replace(
        forward,
        query=forward.key,
        key=forward.query,
        query_group=problem.key_group,
        key_group=problem.query_group,
    )
    rows, columns = (apply(one, reduction, backend, bank_group=bank_group) for one in (forward, exchanged))
    return rows._replace(loss=(rows.loss + columns.loss) / 2)


def _in_type_of_sums(problem: Problem) -> Problem:
    """For inputs that go into two operators: autograd adds their two gradients in this type, and rounds once."""
    dtype, inputs = problem.dtype, ("query", "key", "negatives", "extra_logits")
    rows = [x for x in (problem.query, problem.key, problem.negatives, problem.bank) if x is not None]
    are_bf16 = problem.precision == "default" and all(x.dtype == torch.bfloat16 for x in rows)
    cast = {name: x.to(dtype) for name in inputs if (x := getattr(problem, name)) is not None}
    return replace(problem, **cast, precision="bf16" if are_bf16 else problem.precision)


def _wanted(inputs: tuple[Tensor | None, ...]) -> Wanted:
    if not torch.is_grad_enabled():
        return NOTHING
    return Wanted(*(x is not None and x.requires_grad for x in inputs))


def _flat(problem: Problem) -> list[Any]:
    return [getattr(problem, name) for name in _FIELDS]


# --- what the operators do -------------------------------------------------------------------------------------------


def _sweep(
    problem: Problem, reduction: str, wanted: Wanted, backend: str, mixing: Mixing | None = None
) -> tuple[Result, Gradients]:
    problem.check_values()
    row_weight = 1.0 / problem.query.shape[0] if reduction == "mean" else 1.0
    forward = registry.implementation("info_nce", backend).forward
    with without_autocast(problem.query.device.type):
        options = (problem, row_weight, wanted)
        statistics, gradients = forward(*options) if mixing is None else forward(*options, mixing)
        loss = statistics.loss.sum() * row_weight if statistics.total is None else statistics.total
    if mixing is None:
        return Result(loss, statistics.positive, statistics.hardest), gradients
    hard_negatives.check_found(statistics.hard_negatives, mixing.k)
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


def _distinct(outputs: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """A backend may give one empty tensor for all gradients that nobody wants; an operator's outputs must not alias."""
    return tuple(x if x.numel() else x.clone() for x in outputs)


def _checked(*flat: Any, **others: tuple[Tensor, str]) -> Problem:
    problem = Problem(*flat)
    check_shapes(
        "info_nce",
        query=(problem.query, "ND"),
        key=(problem.key, "ND" if problem.symmetric else "MD"),
        target=(problem.target, "N"),
        negatives=(problem.negatives, "ND" if problem.hard_negative_weight else "PD"),
        bank=(problem.bank, "BD"),
        extra_logits=(problem.extra_logits, "NE"),
        query_group=(problem.query_group, "N"),
        key_group=(problem.key_group, "N" if problem.symmetric else "M"),
        **others,
    )
    n, m = problem.query.shape[0], problem.key.shape[0]
    if problem.target is None and m < n:
        raise ValueError(f"info_nce: key: expected at least {n} rows without a target, got {m}")
    if (problem.query_group is None) != (problem.key_group is None):
        raise ValueError("info_nce: query_group, key_group: expected both or neither, got one")
    return problem


def _run_mean(*args: Any) -> tuple[Tensor, ...]:
    *flat, reduction, wanted, backend = args
    result, gradients = _sweep(_checked(*flat), reduction, Wanted(*wanted), backend)
    return _distinct((*result[:3], *gradients))


def _run_rows(*args: Any) -> tuple[Tensor, ...]:
    *flat, backend = args
    return _sweep_rows(_checked(*flat), backend)


def _run_rows_backward(*args: Any) -> tuple[Tensor, ...]:
    *flat, negative_lse, column_lse, loss_grad, wanted, backend = args
    problem = _checked(*flat, negative_lse=(negative_lse, "N"), loss_grad=(loss_grad, "N"))
    return _distinct(_sweep_rows_backward(problem, negative_lse, column_lse, loss_grad, Wanted(*wanted), backend))


for _name, _run in (
    ("info_nce_mean", _run_mean),
    ("info_nce_rows", _run_rows),
    ("info_nce_rows_backward", _run_rows_backward),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")


# --- what shapes and types they return -------------------------------------------------------------------------------


def _fake_statistics(problem: Problem) -> RowStatistics:
    def empty(length: int) -> Tensor:
        return problem.query.new_empty(length, dtype=problem.dtype)

    n = problem.query.shape[0]
    return RowStatistics(
        empty(n), empty(n), empty(problem.key.shape[0] if problem.symmetric else 0), empty(n), empty(n)
    )


def _fake_gradients(problem: Problem, wanted: Wanted) -> Gradients:
    def like(name: str, is_wanted: bool) -> Tensor:
        value = getattr(problem, name)
        return problem.query.new_empty(value.shape if is_wanted else (0,), dtype=problem.dtype)

    return Gradients(*(like(name, flag) for name, flag in zip(DIFFERENTIABLE, wanted, strict=True)))


@torch.library.register_fake("hicl_fast::info_nce_mean", lib=_library)
def _fake_mean(*args: Any) -> tuple[Tensor, ...]:
    *flat, _, wanted, _ = args
    problem = Problem(*flat)
    statistics = _fake_statistics(problem)
    gradients = _fake_gradients(problem, Wanted(*wanted))
    return statistics.loss.new_empty(()), statistics.positive, statistics.hardest, *gradients


@torch.library.register_fake("hicl_fast::info_nce_rows", lib=_library)
def _fake_rows(*args: Any) -> tuple[Tensor, ...]:
    statistics = _fake_statistics(Problem(*args[: len(_FIELDS)]))
    return statistics.loss, statistics.positive, statistics.hardest, statistics.negative_lse, statistics.column_lse


@torch.library.register_fake("hicl_fast::info_nce_rows_backward", lib=_library)
def _fake_rows_backward(*args: Any) -> tuple[Tensor, ...]:
    *flat, _, _, _, wanted, _ = args
    return tuple(_fake_gradients(Problem(*flat), Wanted(*wanted)))


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


def _save_rows(ctx: Any, problem: Problem, backend: str, outputs: tuple[Tensor, ...]) -> None:
    flat = _flat(problem)
    ctx.backend = backend
    ctx.constants = [None if isinstance(x, Tensor) else x for x in flat]
    ctx.is_tensor = [isinstance(x, Tensor) for x in flat]
    ctx.save_for_backward(*outputs[3:], *(x for x in flat if isinstance(x, Tensor)))
    ctx.set_materialize_grads(False)


def _row_gradients(ctx: Any, loss_grad: Tensor | None, needs_grad: Iterable[bool]) -> Sequence[Tensor | None]:
    wanted = Wanted(*needs_grad)
    if loss_grad is None:
        return [None] * len(wanted)
    negative_lse, column_lse, *saved = ctx.saved_tensors
    tensors = iter(saved)
    flat = [next(tensors) if tensor else x for x, tensor in zip(ctx.constants, ctx.is_tensor, strict=True)]
    problem = Problem(*flat)

    def compute() -> list[Tensor | None]:
        if runs_eagerly(*saved):
            gradients = _sweep_rows_backward(problem, negative_lse, column_lse, loss_grad, wanted, ctx.backend)
        else:
            gradients = torch.ops.hicl_fast.info_nce_rows_backward(
                *flat, negative_lse, column_lse, loss_grad, list(wanted), ctx.backend
            )
        destinations = _destinations(problem.differentiable(), wanted)
        return [None if to is None else to.take(gradient) for gradient, to in zip(gradients, destinations, strict=True)]

    return first_derivatives(compute, _value(problem, "none"), loss_grad, problem.differentiable())


def _again(problem: Problem, reduction: str, mixing: Mixing | None = None, index: Tensor | None = None) -> Again:
    constants = (problem.target, problem.bank, problem.query_group, problem.key_group, index)
    pairs = None if mixing is None else mixing.pairs
    return Again("info_nce", _value(problem, reduction, mixing, index), problem.differentiable(), *constants, pairs)


def _value(problem: Problem, reduction: str, mixing: Mixing | None = None, index: Tensor | None = None) -> Value:
    """The loss as a function of what can have a gradient; ``index`` (N, k): the keys that were mixed."""

    def value(*inputs: Tensor | None) -> Tensor:
        again = replace(problem, **dict(zip(DIFFERENTIABLE, inputs, strict=True)))  # type: ignore[arg-type]
        mixed = None if mixing is None or index is None else by_reference.mixed_logits(again, mixing, index)
        return by_reference.info_nce(again, reduction, mixed).loss

    return value


class _Mean(torch.autograd.Function):
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
        result, gradients = _sweep(problem, reduction, wanted, backend, mixing)
        _save_gradients(ctx, inputs, wanted, gradients)
        ctx.again = _again(problem, reduction, mixing, result.hard_negatives)
        ctx.mark_non_differentiable(*(x for x in result[1:] if x is not None))
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return (*[None] * 5, *_mean_gradients(ctx, loss_grad))


class _Rows(torch.autograd.Function):
    """``info_nce_rows`` without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, backend: str, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        outputs = _sweep_rows(problem, backend)
        _save_rows(ctx, problem, backend, outputs)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return (None, None, *_row_gradients(ctx, loss_grad, ctx.needs_input_grad[2:]))


def _among_arguments(gradients: Iterable[Tensor | None], num_arguments: int) -> tuple[Tensor | None, ...]:
    """The gradients at their inputs' places among a registered operator's arguments."""
    placed: list[Tensor | None] = [None] * num_arguments
    for name, gradient in zip(DIFFERENTIABLE, gradients, strict=True):
        placed[_FIELDS.index(name)] = gradient
    return tuple(placed)


def _setup_mean(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *flat, reduction, wanted, _ = inputs
    problem = Problem(*flat)
    _save_gradients(ctx, problem.differentiable(), Wanted(*wanted), output[3:])
    ctx.again = _again(problem, reduction)
    ctx.mark_non_differentiable(*output[1:])


def _backward_mean(ctx: Any, loss_grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return _among_arguments(_mean_gradients(ctx, loss_grad), len(_FIELDS) + 3)


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *flat, backend = inputs
    _save_rows(ctx, Problem(*flat), backend, output)
    ctx.mark_non_differentiable(*output[1:])


def _backward_rows(ctx: Any, loss_grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needs_grad = [ctx.needs_input_grad[_FIELDS.index(name)] for name in DIFFERENTIABLE]
    return _among_arguments(_row_gradients(ctx, loss_grad, needs_grad), len(_FIELDS) + 1)


torch.library.register_autograd("hicl_fast::info_nce_mean", _backward_mean, setup_context=_setup_mean, lib=_library)
torch.library.register_autograd("hicl_fast::info_nce_rows", _backward_rows, setup_context=_setup_rows, lib=_library)
