"""HNCSE's mixing over the keys of all ranks, against one process with the joined batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hicl_fast import FusedHiCLLoss, FusedInfoNCELoss, HardNegativeMixing, PositiveMixing
from tests.distributed.cluster import Cluster

COUNTS = (4, 1, 6, 3)
STEPS = 3


def rows(size: int, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(n, 5, generator=generator, dtype=torch.float64) + 0.5 for n in COUNTS[:size]]


def groups(options: dict[str, Any], size: int) -> list[Any]:
    """Pairs of neighbours, some of them on two ranks."""
    if "groups" not in options:
        return [None] * size
    return list((torch.arange(sum(COUNTS[:size])) // 2).split(COUNTS[:size]))


def encoder() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(5, 8).double()


def build(options: dict[str, Any], gather: bool) -> FusedInfoNCELoss:
    mixing: dict[str, Any] = {}
    if "hnm" in options:
        mixing["hard_negative_mixing"] = HardNegativeMixing(seed=3, **options["hnm"])
    if "pm" in options:
        mixing["positive_mixing"] = PositiveMixing(**options["pm"])
    return FusedInfoNCELoss(0.2, **mixing, hard_negative_weight=options.get("weight", 0.0), gather=gather)


def train(model: nn.Module, loss_fn: FusedInfoNCELoss, batches: list[Tensor], group: Tensor | None) -> list[Tensor]:
    losses = []
    for batch in batches:
        first, second = model(torch.cat([batch, batch + 0.4 * batch.roll(1, 1)])).chunk(2)
        negatives = second.flip(1) if loss_fn.hard_negative_weight else None
        loss = loss_fn(first, second, negatives, query_group=group, key_group=group)
        loss.backward()
        losses.append(loss.detach())
    return losses


def train_on_rank(rank: int, size: int, options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    model = encoder()
    batches = [rows(size, step)[rank] for step in range(STEPS)]
    losses = train(DistributedDataParallel(model), build(options, True), batches, groups(options, size)[rank])
    return losses, [p.grad for p in model.parameters()]


@pytest.mark.parametrize(
    "options",
    [
        {"hnm": {"k": 3, "num_mixed": 5}},
        {"hnm": {"k": 2}, "groups": True},
        {"hnm": {"k": 3}, "weight": 0.7},
        {"hnm": {}},
        {"hnm": {"k": "auto"}, "pm": {}, "groups": True},
        {"pm": {"threshold": 0.5}},
        {"hnm": {"k": 3}, "pm": {"threshold": 0.5, "weights": (0.7, 0.4)}},
        {"hnm": {"bank": "previous", "queue_size": 7, "k": 4}},
    ],
    ids=str,
)
def test_mixing_is_that_of_the_joined_batch(cluster: Cluster, options: dict[str, Any]) -> None:
    model = encoder()
    batches = [torch.cat(rows(cluster.size, step)) for step in range(STEPS)]
    parts = groups(options, cluster.size)
    exact = train(model, build(options, False), batches, None if parts[0] is None else torch.cat(parts))
    got = cluster.run(train_on_rank, options)
    torch.testing.assert_close(
        [torch.stack(by_rank).mean() for by_rank in zip(*(g[0] for g in got), strict=True)], exact
    )
    for _, gradients in got:
        torch.testing.assert_close(gradients, [p.grad for p in model.parameters()])


def test_what_can_not_be_mixed() -> None:
    with pytest.raises(ValueError, match="hard_negative_mixing: expected None with gather="):
        FusedInfoNCELoss(hard_negative_mixing=HardNegativeMixing(), gather="ring")
    with pytest.raises(ValueError, match="positive_mixing: expected a pair of weights with gather"):
        FusedHiCLLoss(positive_mixing=PositiveMixing(weights="search"), gather=True)


def too_few_on_rank(rank: int, size: int) -> str:
    group = torch.zeros(2, dtype=torch.int64) if rank == 0 else torch.tensor([0, 1])
    loss_fn = FusedInfoNCELoss(hard_negative_mixing=HardNegativeMixing(k=size, require_k=True), gather=True)
    with pytest.raises(ValueError) as raised:
        loss_fn(torch.ones(2, 3), torch.ones(2, 3), query_group=group, key_group=group)
    return str(raised.value)


def test_all_ranks_hear_of_a_row_with_too_few_negatives(cluster: Cluster) -> None:
    for told in cluster.run(too_few_on_rank):
        most, k = cluster.size - 1, cluster.size
        assert told == f"k: expected at most {most}, the negatives that every row has, got {k}"
