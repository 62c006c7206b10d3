"""What the benchmarks feed to the losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from measure import Step
from torch import Tensor


def embeddings(n: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Queries and keys (n, d) with a common direction, as an encoder's have, and keys that resemble their queries."""
    generator = torch.Generator(device).manual_seed(n)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    query = noise(n, d) + 0.7 * noise(1, d)
    return query, query + 1.5 * noise(n, d)


def gradient_step(loss: Callable[[Tensor, Tensor], Tensor], query: Tensor, key: Tensor) -> Step:
    """Forward and backward; the gradients are let go, as an optimiser's ``zero_grad`` does."""
    query, key = query.detach().requires_grad_(), key.detach().requires_grad_()

    def run() -> None:
        query.grad = key.grad = None
        loss(query, key).backward()
        query.grad = key.grad = None

    return run
