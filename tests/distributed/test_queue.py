"""Queues with groups over many processes, and losses as parts of a model that DDP wraps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hicl_fast import FusedHiCLLoss, FusedInfoNCELoss, HardNegativeMixing
from tests.distributed.cluster import Cluster

COUNTS = (4, 1, 6, 3)
STEPS = 3
CASES: dict[str, dict[str, Any]] = {
    "queue": {"queue_size": 9},
    "positives": {"queue_size": 9, "same_group": "positive"},
    "symmetric": {"queue_size": 9, "symmetric": True},
    "previous": {"hard_negative_mixing": {"bank": "previous", "queue_size": 9, "k": 6, "seed": 3}},
}


def batches(size: int) -> tuple[list[list[Tensor]], list[Tensor]]:
    """For each step, each rank's rows; and their groups, which come again in each step."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        [torch.randn(n, 5, generator=generator, dtype=torch.float64) + 0.5 for n in COUNTS[:size]] for _ in range(STEPS)
    ]
    return rows, list((torch.arange(sum(COUNTS[:size])) // 2).split(COUNTS[:size]))


def build(options: dict[str, Any], gather: bool) -> FusedInfoNCELoss:
    options = dict(options)
    if "hard_negative_mixing" in options:
        options["hard_negative_mixing"] = HardNegativeMixing(**options["hard_negative_mixing"])
    return FusedInfoNCELoss(0.2, gather=gather, **options)


def losses_of(loss_fn: FusedInfoNCELoss, rows: list[Tensor], group: Tensor) -> list[Tensor]:
    return [loss_fn(x, x + 0.4 * x.roll(1, 1), query_group=group, key_group=group) for x in rows]


def losses_on_rank(rank: int, size: int, options: dict[str, Any]) -> list[Tensor]:
    rows, groups = batches(size)
    return losses_of(build(options, True), [step[rank] for step in rows], groups[rank])


@pytest.mark.parametrize("name", CASES)
def test_queues_with_groups_are_those_of_the_joined_batch(clusters: Any, name: str) -> None:
    rows, groups = batches(3)
    exact = losses_of(build(CASES[name], False), [torch.cat(step) for step in rows], torch.cat(groups))
    got = clusters(3).run(losses_on_rank, CASES[name])
    torch.testing.assert_close([torch.stack(by_rank).mean() for by_rank in zip(*got, strict=True)], exact)


def hicl(loss_fn: FusedHiCLLoss, rows: list[Tensor], group: Tensor) -> list[Tensor]:
    offsets, lengths = torch.arange(0, 2 * len(group) + 1, 2), torch.ones(2 * len(group))
    segments = [x.repeat_interleave(2, 0) for x in rows]
    return [loss_fn(x, x + 0.4 * x.roll(1, 1), offsets, lengths, sequence_group=group) for x in segments]


def hicl_on_rank(rank: int, size: int) -> list[Tensor]:
    rows, groups = batches(size)
    return hicl(FusedHiCLLoss(0.2, queue_size=9, gather=True), [step[rank] for step in rows], groups[rank])


def test_sequences_keep_their_groups(clusters: Any) -> None:
    rows, groups = batches(2)
    exact = hicl(FusedHiCLLoss(0.2, queue_size=9), [torch.cat(step) for step in rows], torch.cat(groups))
    got = clusters(2).run(hicl_on_rank)
    torch.testing.assert_close([torch.stack(by_rank).mean() for by_rank in zip(*got, strict=True)], exact)


class ModelWithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Linear(5, 8).double()
        self.loss = FusedInfoNCELoss(
            queue_size=9,
            learnable_temperature=True,
            hard_negative_mixing=HardNegativeMixing(bank="previous", queue_size=9, seed=0),
        )

    def forward(self, rows: Tensor) -> Tensor:
        return self.loss(self.encoder(rows), self.encoder(rows + 0.3))


def trained_on_rank(rank: int, size: int, wrapped: bool) -> tuple[list[Tensor], Tensor]:
    model: nn.Module = ModelWithLoss()
    inner = model
    if wrapped:
        model = DistributedDataParallel(model)
    losses = []
    for step in batches(size)[0]:
        loss = model(step[rank])
        loss.backward()
        losses.append(loss.detach())
    return losses, inner.loss.queue.rows()


def test_each_process_keeps_its_own_queue_under_ddp(clusters: Any) -> None:
    """As buffers they would all be the first process's."""
    cluster: Cluster = clusters(2)
    plain, wrapped = cluster.run(trained_on_rank, False), cluster.run(trained_on_rank, True)
    torch.testing.assert_close(wrapped, plain)
    assert not torch.equal(wrapped[0][1][:1], wrapped[1][1][:1])
