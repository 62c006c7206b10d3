"""FSDP, torch.compile, half precision and groups of some of the ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import hicl_fast.functional as HF
from hicl_fast import FusedInfoNCELoss
from hicl_fast.distributed import joined_rows
from tests.distributed.cluster import Cluster

COUNTS = (3, 1, 4, 2)


def rows(size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in COUNTS[:size]]


def encoder() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def joined_gradients(size: int) -> tuple[Tensor, list[Tensor]]:
    model = encoder()
    joined = torch.cat(rows(size))
    loss = HF.info_nce(model(joined), model(joined + 0.3), temperature=0.2)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def sharded_on_rank(rank: int, size: int, gather: Any) -> tuple[Tensor, list[Tensor]]:
    model = encoder()
    mesh = init_device_mesh("cpu", (size,))
    fully_shard(model, mesh=mesh)
    own = rows(size)[rank]
    first, second = model(torch.cat([own, own + 0.3])).chunk(2)
    loss = FusedInfoNCELoss(0.2, gather=gather)(first, second)
    loss.backward()
    return loss.detach(), [p.grad.full_tensor() for p in model.parameters() if isinstance(p.grad, DTensor)]


@pytest.mark.parametrize("gather", [True, "ring"])
def test_sharded_parameters(cluster: Cluster, gather: Any) -> None:
    exact, gradients = joined_gradients(cluster.size)
    got = cluster.run(sharded_on_rank, gather)
    torch.testing.assert_close(torch.stack([loss for loss, _ in got]).mean(), exact)
    for _, found in got:
        torch.testing.assert_close(found, gradients)


def compiled_on_rank(rank: int, size: int, gather: Any) -> tuple[Tensor, list[Tensor]]:
    model = encoder()
    loss_fn = FusedInfoNCELoss(0.2, gather=gather)

    def step(own: Tensor) -> Tensor:
        return loss_fn(model(own), model(own + 0.3))

    loss = torch.compile(step, backend="aot_eager")(rows(size)[rank])
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("gather", [True, "ring"])
def test_compiled(clusters: Any, gather: Any) -> None:
    exact, gradients = joined_gradients(2)
    got = clusters(2).run(compiled_on_rank, gather)
    torch.testing.assert_close(torch.stack([loss for loss, _ in got]).mean(), exact)
    for found, gradient in zip(zip(*(found for _, found in got), strict=True), gradients, strict=True):
        torch.testing.assert_close(torch.stack(found).mean(dim=0), gradient)


def half_on_rank(rank: int, size: int, dtype: torch.dtype, gather: Any) -> tuple[Tensor, Tensor | None]:
    """What two equal calls give, if it is the same bits."""
    results = []
    for _ in range(2):
        own = rows(size)[rank].to(dtype).requires_grad_()
        key = (own.detach() + 0.3).requires_grad_()
        loss = FusedInfoNCELoss(0.2, gather=gather)(own, key)
        loss.backward()
        results.append((loss.detach(), torch.cat([own.grad, key.grad])))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    return results[0]


@pytest.mark.parametrize("gather", [True, "ring"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_deterministic(cluster: Cluster, dtype: torch.dtype, gather: Any) -> None:
    size = cluster.size
    parts = [part.to(dtype).requires_grad_() for part in rows(size)]
    keys = [(part.detach() + 0.3).requires_grad_() for part in parts]
    exact = HF.info_nce(torch.cat(parts).double(), torch.cat(keys).double(), temperature=0.2)
    (exact * size).backward()
    got = cluster.run(half_on_rank, dtype, gather)
    torch.testing.assert_close(
        torch.stack([loss for loss, _ in got]).mean().double(), exact.detach(), rtol=0.02, atol=0.0
    )
    for (_, gradient), part, key in zip(got, parts, keys, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, torch.cat([part.grad, key.grad]), rtol=0.05, atol=0.02)


def pairs_on_rank(rank: int, size: int, gather: Any) -> tuple[Tensor, int]:
    """Ranks 0 and 1 share a batch, and so do 2 and 3."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = groups[rank // 2]
    own = rows(size)[rank]
    loss = FusedInfoNCELoss(0.2, gather=gather, process_group=group)(own, own + 0.3)
    return loss, len(joined_rows(own, process_group=group))


@pytest.mark.parametrize("gather", [True, "ring"])
def test_groups_of_ranks(clusters: Any, gather: Any) -> None:
    got = clusters(4).run(pairs_on_rank, gather)
    for first in (0, 2):
        joined = torch.cat(rows(4)[first : first + 2])
        exact = HF.info_nce(joined, joined + 0.3, temperature=0.2)
        torch.testing.assert_close((got[first][0] + got[first + 1][0]) / 2, exact)
        assert got[first][1] == len(joined)
