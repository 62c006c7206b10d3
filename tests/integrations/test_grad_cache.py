"""GradCache's contract, with its cache in a few lines: representations in chunks, the loss of all, gradients back in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hicl_fast.integrations.grad_cache import FusedContrastiveLoss


def batch(n: int, d: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_the_formula(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(query)) * (len(key) // len(query)))


def cached_step(encoder: nn.Module, columns: list[Tensor], loss_fn: nn.Module, chunk: int) -> Tensor:
    """What GradCache does: no graph of the encoder is larger than a chunk's."""
    with torch.no_grad():
        leaves = [torch.cat([encoder(x) for x in column.split(chunk)]).requires_grad_() for column in columns]
    loss = loss_fn(*leaves)
    loss.backward()
    for column, leaf in zip(columns, leaves, strict=True):
        for x, gradient in zip(column.split(chunk), leaf.grad.split(chunk), strict=True):
            encoder(x).backward(gradient)
    return loss.detach()


@pytest.mark.parametrize("keys_per_query", [1, 3])
@pytest.mark.parametrize("chunk", [2, 100])
def test_cached_gradients_are_those_of_the_whole_batch(chunk: int, keys_per_query: int) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(8, 5), nn.Tanh()).double()
    columns = [batch(7), batch(7 * keys_per_query, seed=1)]
    loss = cached_step(encoder, columns, FusedContrastiveLoss(0.1), chunk)
    cached = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    whole = by_the_formula(*(encoder(x) for x in columns), 0.1)
    whole.backward()
    torch.testing.assert_close(loss, whole.detach())
    for mine, theirs in zip(cached, encoder.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.grad)


def test_a_given_target() -> None:
    query, key = batch(3), batch(5, seed=1)
    target = torch.tensor([4, 0, 2])
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / 0.05
    for reduction in ("mean", "sum", "none"):
        wanted = F.cross_entropy(logits, target, reduction=reduction)
        torch.testing.assert_close(FusedContrastiveLoss()(query, key, target, reduction=reduction), wanted)


def test_errors() -> None:
    with pytest.raises(ValueError, match="key: expected a multiple of 3 rows"):
        FusedContrastiveLoss()(batch(3), batch(5))
    with pytest.raises(ValueError, match="temperature"):
        FusedContrastiveLoss(0.0)
