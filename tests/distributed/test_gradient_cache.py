"""Gradient caching under DDP, with the loss of all ranks: gradients are exchanged once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import hicl_fast.functional as HF
from hicl_fast import FusedInfoNCELoss
from hicl_fast.trainer.gradient_cache import embed_in_chunks
from tests.distributed.cluster import Cluster

COUNTS = (3, 1, 7, 2)  # so that ranks have 1 to 5 chunks


def rows(size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in COUNTS[:size]]


def encoder() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8, affine=False).eval(), nn.Tanh(), nn.Linear(8, 4)).double()


def cached_on_rank(rank: int, size: int, gather: Any) -> list[Tensor]:
    model = encoder()
    ddp = DistributedDataParallel(model)
    for _ in range(2):  # twice, since DDP looks at its buffers differently after the first time
        model.zero_grad()
        both = torch.cat([rows(size)[rank], rows(size)[rank] + 0.3])
        embeddings = embed_in_chunks(ddp, lambda chunk: ddp(both[chunk]), len(both), 3, torch.device("cpu"))  # noqa: B023
        FusedInfoNCELoss(0.2, gather=gather)(*embeddings.chunk(2)).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("gather", [True, "ring"])
def test_cached_step_of_all_ranks(cluster: Cluster, gather: Any) -> None:
    model = encoder()
    joined = torch.cat(rows(cluster.size))
    HF.info_nce(model(joined), model(joined + 0.3), temperature=0.2).backward()
    for gradients in cluster.run(cached_on_rank, gather):
        torch.testing.assert_close(gradients, [p.grad for p in model.parameters()])
