"""``hicl_fast::paradigm``: schema, fake kernel, autograd.

One forward call computes loss and gradients; backward multiplies what was saved by the upstream gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hicl_fast.ops.backends import registry
from hicl_fast.ops.common.autograd import Again, is_one, is_transformed, runs_eagerly, without_autocast
from hicl_fast.ops.common.numbers import host_number, sum_type
from hicl_fast.ops.common.shapes import check_shapes
from hicl_fast.ops.info_nce import compose as info_nce
from hicl_fast.ops.info_nce.problem import Problem, Result
from hicl_fast.ops.paradigm import by_reference
from hicl_fast.ops.paradigm.objectives import OBJECTIVES, alone
from hicl_fast.ops.paradigm.settings import NUM_FIELDS, SCHEMA, Settings

_library = torch.library.Library("hicl_fast", "FRAGMENT")
_library.define(
    f"paradigm(Tensor u, Tensor v, {SCHEMA}, bool wants_gradients, str backend) "
    "-> (Tensor loss, Tensor positive, Tensor hardest, Tensor u_grad, Tensor v_grad)"
)
_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def apply(
    u: Tensor,  # (N, D)
    v: Tensor,  # (N, D)
    settings: Settings,
    backend: str,
) -> Result:
    """``hardest`` is (N,) or, where the objective looks at no single pair, empty."""
    if settings.objective in ("info_nce", "arccon"):
        return info_nce.apply(_as_info_nce(u, v, settings), "mean", backend)
    backend = registry.choose(backend, "paradigm", u.device.type, sum_type(u, v))
    if is_transformed(u, v):
        return Result(*by_reference.paradigm(u, v, settings))
    wants_gradients = torch.is_grad_enabled() and (u.requires_grad or v.requires_grad)
    if not runs_eagerly(u, v):
        if settings.has_callables:
            raise ValueError(
                "objective: expected parts by name or number under torch.compile and torch.export, got a callable"
            )
        outputs = torch.ops.hicl_fast.paradigm(u, v, *settings.flat(), wants_gradients, backend)
        return Result(*outputs[:3])
    if wants_gradients:
        return Result(*_Paradigm.apply(u, v, settings, backend))
    return Result(*_run(u, v, settings, False, backend)[:3])


def _as_info_nce(u: Tensor, v: Tensor, settings: Settings) -> Problem:
    return Problem(u, v, host_number(1.0 / settings.temperature), margin=settings.margin)


def _run(u: Tensor, v: Tensor, settings: Settings, wants_gradients: bool, backend: str) -> _Outputs:
    with torch.no_grad(), without_autocast(u.device.type):
        engine = registry.implementation("paradigm", backend)
        views = engine.views(u, v, sum_type(u, v))
        objective = OBJECTIVES[settings.objective] if len(u) > 1 else alone
        loss, u_terms, v_terms, hardest = objective(views, settings, engine)
        if wants_gradients:
            u_grad, v_grad = engine.gradient(views.u, u_terms), engine.gradient(views.v, v_terms)
            return loss, views.positive, hardest, u_grad, v_grad
    return loss, views.positive, hardest, loss.new_empty(0), loss.new_empty(0)


def _run_registered(u: Tensor, v: Tensor, *rest: Any) -> _Outputs:
    *flat, wants_gradients, backend = rest
    check_shapes("paradigm", u=(u, "ND"), v=(v, "ND"))
    return _run(u, v, Settings.of_flat(tuple(flat)), wants_gradients, backend)


_library.impl("paradigm", _run_registered, "CompositeExplicitAutograd")


@torch.library.register_fake("hicl_fast::paradigm", lib=_library)
def _fake(u: Tensor, v: Tensor, *rest: Any) -> _Outputs:
    *flat, wants_gradients, _ = rest
    n, dtype = u.shape[0], sum_type(u, v)

    def empty(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=dtype)

    hardest = empty(n if Settings.of_flat(tuple(flat)).knows_hardest else 0)
    gradients = [empty(*x.shape) if wants_gradients else empty(0) for x in (u, v)]
    return empty(), empty(n), hardest, gradients[0], gradients[1]


def _save(ctx: Any, u: Tensor, v: Tensor, settings: Settings, gradients: tuple[Tensor, Tensor]) -> None:
    ctx.types = u.dtype, v.dtype
    ctx.again = Again("paradigm", lambda u, v: by_reference.paradigm(u, v, settings).loss, (u, v))
    ctx.save_for_backward(*gradients)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, loss_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if loss_grad is None:
        return None, None
    return tuple(ctx.again.first_derivatives(lambda: _saved_gradients(ctx, loss_grad), loss_grad))


def _saved_gradients(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
    """In the type of the sums until the upstream gradient is in, so that a scaled float16 loss doesn't underflow."""
    gradients = ctx.saved_tensors
    if not is_one(loss_grad):
        gradients = [gradient * loss_grad for gradient in gradients]
    return tuple(
        gradient.to(dtype) if is_wanted else None
        for gradient, dtype, is_wanted in zip(gradients, ctx.types, ctx.needs_input_grad[:2], strict=True)
    )


class _Paradigm(torch.autograd.Function):
    """The operator without the dispatcher, and with callables."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, settings: Settings, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        loss, positive, hardest, *gradients = _run(u, v, settings, True, backend)
        _save(ctx, u, v, settings, (gradients[0], gradients[1]))
        ctx.mark_non_differentiable(positive, hardest)
        return loss, positive, hardest

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, loss_grad), None, None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: _Outputs) -> None:
    u, v, *flat = inputs
    _save(ctx, u, v, Settings.of_flat(tuple(flat[:NUM_FIELDS])), (output[3], output[4]))
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, loss_grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, loss_grad), *(None,) * (NUM_FIELDS + 2)


torch.library.register_autograd("hicl_fast::paradigm", _backward, setup_context=_setup, lib=_library)
