"""SimCSE's loss against its formula, written with broadcast cosines."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hicl_fast.integrations.simcse import simcse_loss
from tests.distributed.cluster import Cluster


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


COUNTS = (4, 1, 6)  # rows of each process


def columns_of(rank: int, count: int) -> list[Tensor]:
    return [x[: COUNTS[rank]] for x in rows(count, n=6 + rank)]


def on_rank(rank: int, size: int, count: int, weight: float) -> list[Tensor]:
    leaves = [x.requires_grad_() for x in columns_of(rank, count)]
    loss = simcse_loss(*leaves, temperature=0.1, hard_negative_weight=weight, gather=True)
    loss.backward()
    return [loss.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize(("count", "weight"), [(2, 0.0), (3, 0.0), (3, 0.5)])
def test_all_processes(clusters: Callable[[int], Cluster], count: int, weight: float) -> None:
    """On every process the joined batch's loss, and its gradients for the process's own rows."""
    parts = [columns_of(rank, count) for rank in range(len(COUNTS))]
    whole = [torch.cat(column).requires_grad_() for column in zip(*parts, strict=True)]
    loss = by_the_formula(*(*whole, None)[:3], 0.1, weight)
    loss.backward()
    gradients = zip(*(x.grad.split(COUNTS) for x in whole), strict=True)
    for got, expected in zip(clusters(len(COUNTS)).run(on_rank, count, weight), gradients, strict=True):
        torch.testing.assert_close(got, [loss.detach(), *expected])


def test_without_a_process_group() -> None:
    z1, z2 = rows(2)
    assert torch.equal(simcse_loss(z1, z2, gather=True), simcse_loss(z1, z2))
