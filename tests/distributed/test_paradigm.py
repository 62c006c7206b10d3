"""The gradient paradigm on several processes, under DDP, against the reference on the joined batch in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hicl_fast import GradientParadigmLoss, reference
from hicl_fast.analysis import gradient_terms
from tests.distributed.cluster import Cluster, RankError

ROWS = (3, 1, 4, 2)  # of each rank

CASES: dict[str, dict[str, Any]] = {
    "info_nce": {"temperature": 0.2},
    "arccon": {"temperature": 0.2},
    "mpt": {},
    "met": {},
    "mat": {},
    "custom": {"dissipation": 0.3, "weight": ("power", 2), "ratio": "met"},
    "mhe": {"modified": ("gd", "w", "r"), "ratio": 1.75, "temperature": 0.2},
    "mhs": {"modified": ("r",), "ratio": 1.75},
    "vicreg": {"strength": 0.7},
    "barlow_twins": {"modified": ("w",), "temperature": 0.2},
}


def encoder() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6)).double()


def views(size: int) -> list[tuple[Tensor, Tensor]]:
    """Each rank's two views."""
    generator = torch.Generator().manual_seed(3)
    first = [torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in ROWS[:size]]
    return [(x, x + 0.8 * torch.randn(x.shape, generator=generator, dtype=torch.float64)) for x in first]


def train_on_rank(rank: int, size: int, objective: Any, options: dict[str, Any]) -> dict[str, Any]:
    model = encoder()
    ddp = DistributedDataParallel(model)
    loss_fn = GradientParadigmLoss(objective, **options, gather=True)
    first, second = views(size)[rank]
    loss = loss_fn(*ddp(torch.cat([first, second])).split(len(first)))
    loss.backward()
    return {"loss": loss.detach(), "gradients": [p.grad for p in model.parameters()], "last": loss_fn.last}


@pytest.mark.parametrize("objective", CASES)
def test_it_is_that_of_the_joined_batch(cluster: Cluster, objective: Any) -> None:
    options, model = CASES[objective], encoder()
    first, second = (torch.cat(parts) for parts in zip(*views(cluster.size), strict=True))
    exact = reference.paradigm(model(first), model(second), objective, **options)
    exact.backward()
    assert any(p.grad.abs().max() > 1e-3 for p in model.parameters())

    got = cluster.run(train_on_rank, objective, options)
    torch.testing.assert_close(torch.stack([answer["loss"] for answer in got]).mean(), exact.detach())
    for answer in got:
        for gradient, parameter in zip(answer["gradients"], model.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)
        torch.testing.assert_close(answer["last"]["loss"], exact.detach())
        assert answer["last"] == got[0]["last"]


def logged_on_rank(rank: int, size: int, objective: Any) -> dict[str, Tensor]:
    loss_fn = GradientParadigmLoss(objective, temperature=0.2, log_gradient_terms=True, gather=True)
    loss_fn(*views(size)[rank])
    return loss_fn.last


@pytest.mark.parametrize("objective", ["arccon", "met"])
def test_what_is_logged_is_the_joined_batch_s(cluster: Cluster, objective: Any) -> None:
    joined = (torch.cat(parts) for parts in zip(*views(cluster.size), strict=True))
    exact = gradient_terms(*joined, objective, temperature=0.2).means()
    for last in cluster.run(logged_on_rank, objective):
        for name, value in exact.items():
            torch.testing.assert_close(last[name], value)


def refuse_on_rank(rank: int, size: int, differing: bool) -> None:
    u, v = torch.randn(2, 1 if differing else 3 - rank, 4)
    GradientParadigmLoss("met", margin=0.1 * rank if differing else 0.1, gather=True)(u, v[:1])


def test_ranks_fail_together(cluster: Cluster) -> None:
    with pytest.raises(RankError, match=r"expected the same on every rank(.|\n)*rank 1: options 'met', margin=0.1"):
        cluster.run(refuse_on_rank, True)
    with pytest.raises(RankError, match=r"rank 0: ValueError: v: expected shape \(3, 4\), as u has"):
        cluster.run(refuse_on_rank, False)


def test_what_gather_can_not_be() -> None:
    with pytest.raises(ValueError, match="gather: expected True or False"):
        GradientParadigmLoss("met", gather="ring")  # type: ignore[arg-type]
    u, v = torch.randn(2, 5, 4)
    torch.testing.assert_close(GradientParadigmLoss("met", gather=True)(u, v), GradientParadigmLoss("met")(u, v))
