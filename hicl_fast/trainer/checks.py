"""What stops a run: numbers that are not finite any more, and a fused loss that is not its reference's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float32).eps


class Diverged(RuntimeError):
    """The loss, the embeddings or the parameters are not finite: further steps would train nothing."""


class LossMismatch(RuntimeError):
    """The fused loss or its gradient is further from the reference than float rounding explains."""


def check_finite(
    loss: Tensor, embeddings: Tensor, parameters: Iterable[tuple[str, Tensor]], step: int, learning_rate: float
) -> None:
    """Looks at the loss alone, which is NaN or infinite where anything before it is; at the rest once it is.

    Args:
        loss: () of the batch.
        embeddings: (R, D) that it is of.
        parameters: names and values of the model's.
        step: optimiser steps done so far.
        learning_rate: the highest one of the run.

    Raises:
        Diverged: with the step, the learning rate, and what is not finite.
    """
    if bool(loss.isfinite()):
        return
    lost = int((~embeddings.isfinite()).any(dim=1).sum())
    raise Diverged(
        f"step {step}: the model diverged: the loss is {float(loss.detach()):g}, {lost} of {len(embeddings)} embeddings "
        f"are not finite, and {_state_of(parameters)}. The learning rate is {learning_rate:g}: go on from an earlier "
        f"checkpoint, or begin anew, with a lower one."
        + (
            ""
            if lost
            else " Since the embeddings are finite, --check_every 1 says whether it is the loss that is wrong."
        )
    )


def _state_of(parameters: Iterable[tuple[str, Tensor]]) -> str:
    largest = 0.0
    for name, parameter in parameters:
        if parameter.numel():
            size = float(parameter.detach().abs().max())  # NaN, if one is
            if not math.isfinite(size):
                return f"the first parameter that is not finite is {name}"
            largest = max(largest, size)
    return f"all parameters are finite, up to {largest:.3g}"


def check_loss(loss: Tensor, embeddings: Tensor, reference: Callable[[Tensor], Tensor], step: int) -> None:
    """Compares a fused loss of the embeddings (R, D), and its gradient, with the reference's.

    The loss is the very one that training goes on with; its graph is kept.

    Rounding is measured, not guessed: the reference runs in float32 too, and the fused loss may be 8 times as far
    from float64 as that, plus 64 units in the last place of the value's own size.

    Raises:
        LossMismatch: with the step, the difference, and what rounding explains.
        Diverged: the reference is not finite either.
    """
    exact_loss, exact_gradient = _loss_and_gradient(reference, embeddings.double())
    float_loss, float_gradient = _loss_and_gradient(reference, embeddings.float())
    (fused_gradient,) = torch.autograd.grad(loss, embeddings, retain_graph=True)
    if not bool(exact_loss.isfinite() & exact_gradient.isfinite().all()):
        raise Diverged(
            f"step {step}: the model diverged: of these embeddings the float64 reference too has the loss {exact_loss:g} "
            "with a gradient that is not finite. Go on from an earlier checkpoint with a lower learning rate."
        )
    fused_loss, fused_gradient = loss.detach().double(), fused_gradient.double()

    rows = embeddings.shape[0]
    untrained_gradient = 1.0 / (rows * float(embeddings.detach().double().norm(dim=1).mean()) + 1e-30)
    _compare("loss", step, fused_loss, float_loss, exact_loss, size=1.0 + abs(float(exact_loss)))
    _compare(
        "gradient",
        step,
        fused_gradient,
        float_gradient,
        exact_gradient,
        size=float(exact_gradient.abs().max()) + untrained_gradient,
    )


def _loss_and_gradient(loss_of: Callable[[Tensor], Tensor], embeddings: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = embeddings.detach().clone().requires_grad_()
        loss = loss_of(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach().double(), gradient.double()


def _compare(what: str, step: int, fused: Tensor, rounded: Tensor, exact: Tensor, *, size: float) -> None:
    difference = float((fused - exact).abs().max())
    allowed = 8 * float((rounded - exact).abs().max()) + 64 * EPSILON * size
    if difference <= allowed:
        return
    largest = float(exact.abs().max())
    if not math.isfinite(difference):
        raise LossMismatch(
            f"step {step}: the fused {what} is not finite, where the float64 reference's is, up to {largest:.3g}. "
            "Training was stopped; --backend torch may still be right."
        )
    relative = f"{difference / largest:.2%} of" if largest > 0 else "beside"
    raise LossMismatch(
        f"step {step}: the fused {what} differs from the float64 reference by {difference:.3g} ({relative} the reference's "
        f"{largest:.3g}), where float rounding explains {allowed:.3g}. Training was stopped; --backend torch may still be right."
    )
