"""``hicl_fast::own_log_sum_exp``: schema, fake kernel, autograd."""

from __future__ import annotations

from collections.abc import Sequence
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
from hicl_fast.ops.common.shapes import check_shapes
from hicl_fast.ops.own_negatives import by_reference
from hicl_fast.ops.own_negatives.problem import DIFFERENTIABLE, FIELDS, SCHEMA, Gradients, Own, Wanted

_GRADIENTS = ", ".join(f"Tensor {name}_grad" for name in DIFFERENTIABLE)
_library = torch.library.Library("hicl_fast", "FRAGMENT")
_library.define(f"own_log_sum_exp({SCHEMA}, str backend) -> (Tensor lse, Tensor hardest)")
_library.define(
    f"own_log_sum_exp_backward({SCHEMA}, Tensor lse, Tensor lse_grad, bool[] wanted, str backend) -> ({_GRADIENTS})"
)


class Outputs(NamedTuple):
    lse: Tensor  # (N,) −inf, with gradient 0, for a query that has no column
    hardest: Tensor  # (N,) largest similarity, detached; −inf likewise


def apply(problem: Own, backend: str) -> Outputs:
    inputs = problem.differentiable()
    chosen = registry.choose(backend, "own_negatives", problem.query.device.type, problem.dtype)
    if is_transformed(*inputs):
        problem.check_values()
        return Outputs(*by_reference.log_sum_exp(problem))
    if not runs_eagerly(*inputs, problem.offsets):
        return Outputs(*torch.ops.hicl_fast.own_log_sum_exp(*problem.flat(), chosen))
    return Outputs(*_OwnLogSumExp.apply(*problem.flat(), chosen))


def _run(problem: Own, backend: str) -> tuple[Tensor, Tensor]:
    problem.check_values()
    with without_autocast(problem.query.device.type):
        return registry.implementation("own_negatives", backend).forward(problem)


def _run_backward(problem: Own, lse: Tensor, lse_grad: Tensor, wanted: Wanted, backend: str) -> Gradients:
    with without_autocast(problem.query.device.type):
        weight = lse_grad.masked_fill(lse == -torch.inf, 0.0)
        return registry.implementation("own_negatives", backend).backward(problem, lse, weight, wanted)


def _checked(operator: str, flat: Sequence[Any], **others: tuple[Tensor, str]) -> Own:
    problem = Own(*flat)
    check_shapes(operator, **problem.shapes(), **others)
    if (problem.query_group is None) != (problem.group is None):
        raise ValueError(f"{operator}: query_group, group: expected both or neither, got one")
    return problem


def _run_registered(*args: Any) -> tuple[Tensor, Tensor]:
    *flat, backend = args
    return _run(_checked("own_log_sum_exp", flat), backend)


def _run_backward_registered(*args: Any) -> tuple[Tensor, ...]:
    *flat, lse, lse_grad, wanted, backend = args
    problem = _checked("own_log_sum_exp_backward", flat, lse=(lse, "N"), lse_grad=(lse_grad, "N"))
    problem.check_values()
    return distinct(_run_backward(problem, lse, lse_grad, Wanted(*wanted), backend))


_library.impl("own_log_sum_exp", _run_registered, "CompositeExplicitAutograd")
_library.impl("own_log_sum_exp_backward", _run_backward_registered, "CompositeExplicitAutograd")


@torch.library.register_fake("hicl_fast::own_log_sum_exp", lib=_library)
def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    problem = Own(*args[: len(FIELDS)])
    lse = problem.query.new_empty(problem.query.shape[0], dtype=problem.dtype)
    return lse, torch.empty_like(lse)


@torch.library.register_fake("hicl_fast::own_log_sum_exp_backward", lib=_library)
def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    *flat, _, _, wanted, _ = args
    problem = Own(*flat)
    return tuple(
        problem.query.new_empty(x.shape if is_wanted else (0,), dtype=problem.dtype)
        for x, is_wanted in zip(problem.differentiable(), wanted, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *flat, backend = inputs
    save_problem(ctx, Own(*flat), backend, output[0])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, lse_grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    placed: list[Tensor | None] = [None] * (len(FIELDS) + 1)
    if lse_grad is None:
        return tuple(placed)
    problem, is_eager, (lse,) = saved_problem(ctx, Own)
    inputs = problem.differentiable()
    wanted = Wanted(*(ctx.needs_input_grad[FIELDS.index(name)] for name in DIFFERENTIABLE))

    def compute() -> list[Tensor | None]:
        if is_eager:
            found = _run_backward(problem, lse, lse_grad, wanted, ctx.backend)
        else:
            found = torch.ops.hicl_fast.own_log_sum_exp_backward(
                *problem.flat(), lse, lse_grad, list(wanted), ctx.backend
            )
        return [
            gradient.to(device=x.device, dtype=x.dtype).reshape(x.shape) if is_wanted else None
            for gradient, x, is_wanted in zip(found, inputs, wanted, strict=True)
        ]

    def value(*inputs: Tensor) -> Tensor:
        again = replace(problem, **dict(zip(DIFFERENTIABLE, inputs, strict=True)))  # type: ignore[arg-type]
        return by_reference.log_sum_exp(again)[0]

    for name, gradient in zip(DIFFERENTIABLE, first_derivatives(compute, value, lse_grad, inputs), strict=True):
        placed[FIELDS.index(name)] = gradient
    return tuple(placed)


torch.library.register_autograd("hicl_fast::own_log_sum_exp", _backward, setup_context=_setup, lib=_library)


class _OwnLogSumExp(torch.autograd.Function):
    """``own_log_sum_exp`` without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *flat, backend = inputs
        outputs = _run(Own(*flat), backend)
        _setup(ctx, inputs, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, lse_grad: Tensor | None, hardest_grad: Any) -> tuple[Tensor | None, ...]:
        return _backward(ctx, lse_grad, hardest_grad)
