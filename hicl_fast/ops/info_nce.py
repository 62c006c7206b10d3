"""``hicl_fast::info_nce``: schema, fake kernel, autograd.

Two operators, because what can be saved depends on what is known in the forward pass:

``info_nce_mean`` knows every row's weight (1/N or 1), so one sweep over the similarities gives loss *and* gradients:
three matrix products in all. Backward only scales what was saved.

``info_nce_rows`` returns a loss per row; the rows' weights arrive in the backward pass, which sweeps again:
one product forward, three backward.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from hicl_fast.backend import registry
from hicl_fast.ops.autograd import once_differentiable, runs_eagerly, without_autocast
from hicl_fast.ops.problem import Gradients, Problem, RowStatistics, Wanted

_PROBLEM = (
    "Tensor query, Tensor key, Tensor scale, Tensor? target, Tensor? negatives, Tensor? bank, Tensor? extra_logits, "
    "Tensor? query_group, Tensor? key_group, float hard_negative_weight, str same_group, float margin, bool symmetric, "
    "str precision"
)
_GRADIENTS = "Tensor query_grad, Tensor key_grad, Tensor negatives_grad, Tensor extra_logits_grad, Tensor scale_grad"
_NUM_FIELDS = len(fields(Problem))
_DIFFERENTIABLE = ("query", "key", "negatives", "extra_logits", "scale")

_library = torch.library.Library("hicl_fast", "FRAGMENT")
_library.define(
    f"info_nce_mean({_PROBLEM}, float row_weight, bool[] wanted, str backend) "
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


def apply(problem: Problem, reduction: str, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (reduced), and the similarities of each row's positive and hardest negative, (N,) each, detached."""
    if problem.symmetric and not _one_sweep_covers_both_directions(problem):
        return _average_of_directions(problem, reduction, backend)
    backend = registry.choose("info_nce", backend, problem)
    wanted = _wanted(problem)
    args = _flat(problem)
    eager = runs_eagerly(problem.query, problem.key, problem.negatives, problem.extra_logits, problem.scale)
    if reduction == "none":
        rows = _Rows.apply if eager else torch.ops.hicl_fast.info_nce_rows
        loss, positive, hardest, *_ = rows(*args, backend)
        return loss, positive, hardest
    row_weight = 1.0 / problem.query.shape[0] if reduction == "mean" else 1.0
    if not eager:
        mean = torch.ops.hicl_fast.info_nce_mean
    elif any(wanted):
        mean = _Mean.apply
    else:
        mean = _run_mean
    loss, positive, hardest, *_ = mean(*args, row_weight, list(wanted), backend)
    return loss, positive, hardest


def _one_sweep_covers_both_directions(problem: Problem) -> bool:
    """Columns beyond the keys, and several positives, look different from the other side."""
    only_keys = problem.negatives is None and problem.bank is None and problem.extra_logits is None
    return only_keys and problem.same_group != "positive"


def _average_of_directions(problem: Problem, reduction: str, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    from dataclasses import replace

    forward = replace(problem, symmetric=False)
    exchanged = replace(
        forward,
        query=problem.key,
        key=problem.query,
        query_group=problem.key_group,
        key_group=problem.query_group,
    )
    row_loss, positive, hardest = apply(forward, reduction, backend)
    column_loss, _, _ = apply(exchanged, reduction, backend)
    return (row_loss + column_loss) / 2, positive, hardest


def _wanted(problem: Problem) -> Wanted:
    grad_mode = torch.is_grad_enabled()
    inputs = (getattr(problem, name) for name in _DIFFERENTIABLE)
    return Wanted(*(grad_mode and x is not None and x.requires_grad for x in inputs))


def _flat(problem: Problem) -> list[Any]:
    return [getattr(problem, field.name) for field in fields(Problem)]


# --- what the operators do -------------------------------------------------------------------------------------------


def _run_mean(*args: Any) -> tuple[Tensor, ...]:
    *flat, row_weight, wanted, backend = args
    problem = Problem(*flat)
    problem.check_values()
    with without_autocast(problem.query.device.type):
        statistics, gradients = registry.implementation("info_nce", backend).forward(
            problem, row_weight, Wanted(*wanted)
        )
        loss = statistics.loss.sum() * row_weight
    return loss, statistics.positive, statistics.hardest, *gradients


def _run_rows(*args: Any) -> tuple[Tensor, ...]:
    *flat, backend = args
    problem = Problem(*flat)
    problem.check_values()
    nothing = Wanted(False, False, False, False, False)
    with without_autocast(problem.query.device.type):
        statistics, _ = registry.implementation("info_nce", backend).forward(problem, 1.0, nothing)
    return statistics.loss, statistics.positive, statistics.hardest, statistics.negative_lse, statistics.column_lse


def _run_rows_backward(*args: Any) -> tuple[Tensor, ...]:
    *flat, negative_lse, column_lse, loss_grad, wanted, backend = args
    problem = Problem(*flat)
    with without_autocast(problem.query.device.type):
        return tuple(
            registry.implementation("info_nce", backend).backward(problem, negative_lse, column_lse, loss_grad, Wanted(*wanted))
        )


for _name, _run in (
    ("info_nce_mean", _run_mean),
    ("info_nce_rows", _run_rows),
    ("info_nce_rows_backward", _run_rows_backward),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")


# --- what shapes and types they return -------------------------------------------------------------------------------


def _fake_statistics(problem: Problem) -> RowStatistics:
    row = problem.query.new_empty(problem.query.shape[0], dtype=problem.dtype)
    columns = problem.key.shape[0] if problem.symmetric else 0
    return RowStatistics(
        *(torch.empty_like(row) for _ in range(2)), row.new_empty(columns), *(torch.empty_like(row) for _ in range(2))
    )


def _fake_gradients(problem: Problem, wanted: Wanted) -> Gradients:
    def like(name: str, is_wanted: bool) -> Tensor:
        value = getattr(problem, name)
        return problem.query.new_empty(value.shape if is_wanted else (0,), dtype=problem.dtype)

    return Gradients(*(like(name, flag) for name, flag in zip(_DIFFERENTIABLE, wanted, strict=True)))


@torch.library.register_fake("hicl_fast::info_nce_mean", lib=_library)
def _fake_mean(*args: Any) -> tuple[Tensor, ...]:
    *flat, _, wanted, _ = args
    problem = Problem(*flat)
    statistics = _fake_statistics(problem)
    gradients = _fake_gradients(problem, Wanted(*wanted))
    return statistics.loss.new_empty(()), statistics.positive, statistics.hardest, *gradients


@torch.library.register_fake("hicl_fast::info_nce_rows", lib=_library)
def _fake_rows(*args: Any) -> tuple[Tensor, ...]:
    statistics = _fake_statistics(Problem(*args[:_NUM_FIELDS]))
    return statistics.loss, statistics.positive, statistics.hardest, statistics.negative_lse, statistics.column_lse


@torch.library.register_fake("hicl_fast::info_nce_rows_backward", lib=_library)
def _fake_rows_backward(*args: Any) -> tuple[Tensor, ...]:
    *flat, _, _, _, wanted, _ = args
    return tuple(_fake_gradients(Problem(*flat), Wanted(*wanted)))


# --- autograd --------------------------------------------------------------------------------------------------------


def _place(gradients: tuple[Tensor, ...], types: tuple[Any, ...], num_args: int) -> tuple[Tensor | None, ...]:
    """Gradients in the inputs' types and devices, at the inputs' positions among an operator's arguments."""
    by_name = {
        name: gradient.to(device=where[1], dtype=where[0])
        for name, gradient, where in zip(_DIFFERENTIABLE, gradients, types, strict=True)
        if where is not None
    }
    placed = [by_name.get(field.name) for field in fields(Problem)]
    return tuple(placed + [None] * (num_args - len(placed)))


def _types(problem: Problem, wanted: tuple[bool, ...]) -> tuple[Any, ...]:
    inputs = (getattr(problem, name) for name in _DIFFERENTIABLE)
    return tuple((x.dtype, x.device) if flag else None for x, flag in zip(inputs, wanted, strict=True))


def _setup_mean(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *flat, _, wanted, _ = inputs
    ctx.types = _types(Problem(*flat), wanted)
    ctx.save_for_backward(*output[3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@once_differentiable("info_nce")
def _backward_mean(ctx: Any, loss_grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    num_args = _NUM_FIELDS + 3
    if loss_grad is None:
        return (None,) * num_args
    gradients = tuple(g * loss_grad.to(g.device) if g.numel() else g for g in ctx.saved_tensors)
    return _place(gradients, ctx.types, num_args)


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *flat, ctx.backend = inputs
    is_tensor = [isinstance(x, Tensor) for x in flat]
    ctx.save_for_backward(*output[3:], *(x for x in flat if isinstance(x, Tensor)))
    ctx.flat = [None if tensor else x for x, tensor in zip(flat, is_tensor, strict=True)]
    ctx.is_tensor = is_tensor
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@once_differentiable("info_nce")
def _backward_rows(ctx: Any, loss_grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    num_args = _NUM_FIELDS + 1
    if loss_grad is None:
        return (None,) * num_args
    negative_lse, column_lse, *tensors = ctx.saved_tensors
    remaining = iter(tensors)
    flat = [next(remaining) if tensor else x for x, tensor in zip(ctx.flat, ctx.is_tensor, strict=True)]
    problem = Problem(*flat)
    position = {field.name: i for i, field in enumerate(fields(Problem))}
    wanted = tuple(bool(ctx.needs_input_grad[position[name]]) for name in _DIFFERENTIABLE)
    backward = _run_rows_backward if runs_eagerly(*tensors) else torch.ops.hicl_fast.info_nce_rows_backward
    gradients = backward(*flat, negative_lse, column_lse, loss_grad, list(wanted), ctx.backend)
    return _place(tuple(gradients), _types(problem, wanted), num_args)


torch.library.register_autograd(
    "hicl_fast::info_nce_mean", _backward_mean, setup_context=_setup_mean, lib=_library
)
torch.library.register_autograd(
    "hicl_fast::info_nce_rows", _backward_rows, setup_context=_setup_rows, lib=_library
)


class _Mean(torch.autograd.Function):
    """``info_nce_mean`` without the dispatcher."""

    forward = staticmethod(_run_mean)
    setup_context = staticmethod(_setup_mean)
    backward = staticmethod(_backward_mean)


class _Rows(torch.autograd.Function):
    """``info_nce_rows`` without the dispatcher."""

    forward = staticmethod(_run_rows)
    setup_context = staticmethod(_setup_rows)
    backward = staticmethod(_backward_rows)
