"""GradCache's contract, with its cache in a few lines: representations in chunks, the loss of all, gradients back in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hicl_fast.integrations.grad_cache import FusedContrastiveLoss
from tests.distributed.cluster import Cluster, RankError


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


UNEQUAL = (4, 1, 3)


def parts(keys_per_query: int) -> list[list[Tensor]]:
    """Each process's queries and keys."""
    queries, keys = batch(sum(UNEQUAL)), batch(sum(UNEQUAL) * keys_per_query, seed=1)
    counts = [n * keys_per_query for n in UNEQUAL]
    return [list(pair) for pair in zip(queries.split(UNEQUAL), keys.split(counts), strict=True)]


def on_rank(rank: int, size: int, keys_per_query: int, target: Tensor | None) -> list[Tensor]:
    leaves = [x.requires_grad_() for x in parts(keys_per_query)[rank]]
    loss = FusedContrastiveLoss(0.1, gather=True)(*leaves, target=target)
    loss.backward()
    return [loss.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("has_target", [False, True])
@pytest.mark.parametrize("keys_per_query", [1, 3])
def test_all_processes(clusters: Callable[[int], Cluster], keys_per_query: int, has_target: bool) -> None:
    """Processes of unequal batches each have the joined batch's loss, and its gradients for their own rows."""
    rule = torch.arange(sum(UNEQUAL)) * keys_per_query
    target = rule.flip(0) if has_target else None
    whole = [torch.cat(column).requires_grad_() for column in zip(*parts(keys_per_query), strict=True)]
    logits = F.normalize(whole[0], dim=1) @ F.normalize(whole[1], dim=1).T / 0.1
    loss = F.cross_entropy(logits, rule if target is None else target)
    loss.backward()
    ranks = clusters(3).run(on_rank, keys_per_query, target)
    for place, x in enumerate(whole, start=1):
        torch.testing.assert_close(torch.cat([found[place] for found in ranks]), x.grad)
    for found in ranks:
        torch.testing.assert_close(found[0], loss.detach())


def with_other_rules(rank: int, size: int) -> None:
    FusedContrastiveLoss(0.1, gather=True)(batch(2), batch(2 if rank == 0 else 6))


def with_a_bad_batch(rank: int, size: int) -> None:
    FusedContrastiveLoss(0.1, gather=True)(batch(2), batch(4 if rank == 0 else 3))


def test_processes_fail_together(clusters: Callable[[int], Cluster]) -> None:
    """Joined, 2 + 6 + 6 keys would be a multiple of the queries, of whom the first would find others' keys."""
    with pytest.raises(RankError, match="rank 0: keys for each query 1\n.*rank 1: keys for each query 3"):
        clusters(3).run(with_other_rules)
    with pytest.raises(RankError, match="rank 1: ValueError: key: expected a multiple of 2 rows"):
        clusters(3).run(with_a_bad_batch)


def test_errors() -> None:
    with pytest.raises(TypeError, match="gather: expected True or False"):
        FusedContrastiveLoss(gather="ring")
    with pytest.raises(ValueError, match="backend: expected 'auto' or one of"):
        FusedContrastiveLoss(backend="nonsense")
    with pytest.raises(ValueError, match="key: expected a multiple of 3 rows"):
        FusedContrastiveLoss()(batch(3), batch(5))
    with pytest.raises(ValueError, match="temperature"):
        FusedContrastiveLoss(0.0)
