"""What the operators' autograd has in common."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def runs_eagerly(*tensors: Tensor | None) -> bool:
    """Whether real data can be handed to a backend now.

    Then the registered operator is stepped over: its Python autograd costs more than the loss of a small batch.
    Tracing (torch.compile, export, fake tensors, functorch) must see the registered operator instead.
    """
    if torch.compiler.is_compiling():
        return False
    return all(x is None or type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Backends choose the type of every product themselves."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def is_one(loss_grad: Tensor) -> bool:
    """Whether this is a plain ``loss.backward()``; only host memory is looked at.

    What was saved can then be handed out: autograd drops its own reference first, or copies where the graph is kept.
    """
    return type(loss_grad) is Tensor and loss_grad.device.type == "cpu" and loss_grad.item() == 1.0


def once_differentiable(operator: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a backward function whose results can't be differentiated again, and say so where someone tries."""
    message = (
        f"hicl_fast: {operator} can be differentiated once; its gradient has no gradient of its own. "
        f"For second derivatives use hicl_fast.reference.{operator}, which is plain PyTorch."
    )

    def decorate(backward: Callable[..., Sequence[Tensor | None]]) -> Callable[..., Any]:
        def run(ctx: Any, *upstream: Tensor | None) -> Any:
            if not torch.is_grad_enabled():  # the ordinary backward pass
                return backward(ctx, *upstream)
            with torch.no_grad():
                gradients = backward(ctx, *upstream)
            wants_second = any(g is not None and g.requires_grad for g in upstream)
            if not wants_second or torch.compiler.is_compiling():
                return gradients
            refuse = torch._C._functions.DelayedError(message.encode(), len(gradients))
            return refuse(*(None if g is None else g.detach().requires_grad_() for g in gradients))  # type: ignore[arg-type]

        return run

    return decorate
