"""``--check_every``: the fused loss of a live batch against the pure-PyTorch reference in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float32).eps


class LossMismatch(RuntimeError):
    """The fused loss or its gradient is further from the reference than float rounding explains."""


def check_loss(loss: Tensor, embeddings: Tensor, reference: Callable[[Tensor], Tensor], step: int) -> None:
    """Compares a fused loss of the embeddings (R, D), and its gradient, with the reference's.

    The loss is the very one that training goes on with; its graph is kept.

    Rounding is measured, not guessed: the reference runs in float32 too, and the fused loss may be 8 times as far
    from float64 as that, plus 64 units in the last place of the value's own size.

    Raises:
        LossMismatch: with the step, the difference, and what rounding explains.
    """
    exact_loss, exact_gradient = _loss_and_gradient(reference, embeddings.double())
    float_loss, float_gradient = _loss_and_gradient(reference, embeddings.float())
    (fused_gradient,) = torch.autograd.grad(loss, embeddings, retain_graph=True)
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
    relative = f"{difference / largest:.2%} of" if largest > 0 else "beside"
    raise LossMismatch(
        f"step {step}: the fused {what} differs from the float64 reference by {difference:.3g} ({relative} the reference's "
        f"{largest:.3g}), where float rounding explains {allowed:.3g}. Training was stopped; --backend torch may still be right."
    )
