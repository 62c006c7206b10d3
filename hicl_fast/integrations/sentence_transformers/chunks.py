"""A mean over rows, computed chunk by chunk together with its gradients: no chunk outlives its turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hicl_fast.ops.common.autograd import once_differentiable


def mean_over_chunks(loss_of_rows: Callable[..., Tensor], num_rows: int, chunk_rows: int, *inputs: Tensor) -> Tensor:
    """Mean of a loss over ``num_rows`` rows, ``chunk_rows`` of them at a time.

    Args:
        loss_of_rows: called as ``loss_of_rows(rows, *inputs)`` with a slice of rows; returns their mean loss, a scalar.
        num_rows: at least 1.
        chunk_rows: at least 1.
        inputs: what the loss depends on; those that require a gradient get one.

    Returns:
        A scalar. It can be differentiated once.
    """
    return _MeanOverChunks.apply(loss_of_rows, num_rows, chunk_rows, torch.is_grad_enabled(), *inputs)


class _MeanOverChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        loss_of_rows: Callable[..., Tensor],
        num_rows: int,
        chunk_rows: int,
        grad_enabled: bool,
        *inputs: Tensor,
    ) -> Tensor:
        wanted = [grad_enabled and x.requires_grad for x in inputs]
        leaves = [x.detach().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
        total = torch.zeros((), device=inputs[0].device, dtype=torch.promote_types(inputs[0].dtype, torch.float32))
        gradients = [torch.zeros_like(x) if want else None for x, want in zip(inputs, wanted, strict=True)]
        for begin in range(0, num_rows, chunk_rows):
            rows = slice(begin, min(begin + chunk_rows, num_rows))
            with torch.set_grad_enabled(any(wanted)):
                loss = loss_of_rows(rows, *leaves)
                share = loss * ((rows.stop - rows.start) / num_rows)
            if any(wanted):
                differentiable = [x for x, want in zip(leaves, wanted, strict=True) if want]
                found = iter(torch.autograd.grad(share, differentiable, allow_unused=True))
                for gradient in gradients:
                    if gradient is not None and (of_chunk := next(found)) is not None:
                        gradient += of_chunk
            total = total + share.detach()
        ctx.gradients = gradients
        return total.to(loss.dtype)

    @staticmethod
    @once_differentiable("mean_over_chunks")
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if x is None else (x * upstream).to(x.dtype) for x in ctx.gradients)
        return None, None, None, None, *scaled
