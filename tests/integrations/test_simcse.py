"""SimCSE's loss against its formula, written with broadcast cosines."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hicl_fast.integrations import simcse
from hicl_fast.integrations.simcse import simcse_loss


def rows(count: int, n: int = 6, d: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    base = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return [base + torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(count)]


def by_the_formula(z1: Tensor, z2: Tensor, z3: Tensor | None, temperature: float, weight: float) -> Tensor:
    logits = F.cosine_similarity(z1[:, None], z2[None], dim=-1) / temperature
    if z3 is not None:
        hard = F.cosine_similarity(z1[:, None], z3[None], dim=-1) / temperature
        logits = torch.cat([logits, hard + weight * torch.eye(len(z1))], dim=1)
    return F.cross_entropy(logits, torch.arange(len(z1)))


@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize(("hard_negatives", "weight"), [(False, 0.0), (False, 2.0), (True, 0.0), (True, 2.0)])
def test_the_formula(hard_negatives: bool, weight: float, temperature: float) -> None:
    results = []
    for fused in (True, False):
        leaves = [x.requires_grad_() for x in rows(3 if hard_negatives else 2)]
        z1, z2, z3 = (*leaves, None)[:3]
        if fused:
            loss = simcse_loss(z1, z2, z3, temperature=temperature, hard_negative_weight=weight)
        else:
            loss = by_the_formula(z1, z2, z3, temperature, weight)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 1 of 3: the joined batch, with gradients for its own rows."""
    parts = [rows(3, n=4), rows(3, n=5), rows(3, n=6)]
    parts = [[x[:4] for x in part] for part in parts]
    own = [x.clone().requires_grad_() for x in parts[1]]

    def all_gather(out: list[Tensor], mine: Tensor) -> None:
        assert not mine.requires_grad
        column = next(i for i, x in enumerate(parts[1]) if torch.equal(x, mine))
        for place, part in zip(out, parts, strict=True):
            place.copy_(part[column])

    group = SimpleNamespace(all_gather=all_gather, get_world_size=lambda: 3, get_rank=lambda: 1)
    group.is_available = group.is_initialized = lambda: True
    monkeypatch.setattr(simcse, "dist", group)
    simcse_loss(*own, temperature=0.1, hard_negative_weight=0.5, gather=True).backward()
    joined: list[Any] = [torch.cat([part[i] for part in parts]).requires_grad_() for i in range(3)]
    by_the_formula(*joined, 0.1, 0.5).backward()
    for mine, whole in zip(own, joined, strict=True):
        torch.testing.assert_close(mine.grad, whole.grad[4:8])


def test_without_a_process_group() -> None:
    z1, z2 = rows(2)
    assert torch.equal(simcse_loss(z1, z2, gather=True), simcse_loss(z1, z2))
