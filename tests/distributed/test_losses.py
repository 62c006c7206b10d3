"""The losses on several processes, under DDP, against the reference on the joined batch in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hicl_fast import FusedHiCLLoss, FusedInfoNCELoss, reference
from tests.distributed.cluster import Cluster

QUERIES = (3, 1, 4, 2)  # of each rank
MORE_KEYS = (0, 2, 1, 0)  # beside one for each query
NEGATIVES = (2, 5, 1, 3)
SEGMENTS = ((2, 1, 3), (4,), (1, 1), (2, 5, 1, 1))  # of each rank's sequences
WIDTH = 6


@dataclass(frozen=True)
class Case:
    """A loss, and what its batch consists of."""

    options: dict[str, Any] = field(default_factory=dict)
    negatives: str = ""  # "own": one for each query; "any"
    groups: bool = False
    more_keys: bool = False
    steps: int = 1
    dtype: torch.dtype = torch.float64
    equal: bool = False  # two rows on every rank

    def counts(self, size: int) -> list[int]:
        return [2] * size if self.equal else list(QUERIES[:size])


def encoder(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, WIDTH)).to(dtype)


def batch(case: Case, size: int, step: int) -> dict[str, list[Tensor]]:
    """Each rank's rows, by name."""
    generator = torch.Generator().manual_seed(step)
    counts = case.counts(size)
    key_counts = [n + more * case.more_keys for n, more in zip(counts, MORE_KEYS, strict=False)]
    negative_counts = counts if case.negatives == "own" else list(NEGATIVES[:size])
    made = {"query": counts, "key": key_counts, "negatives": negative_counts if case.negatives else []}
    rows = {
        name: [torch.randn(n, 5, generator=generator, dtype=torch.float64).to(case.dtype) for n in numbers]
        for name, numbers in made.items()
    }
    for query, key in zip(rows["query"], rows["key"], strict=True):
        key[: len(query)] += query
    if case.groups:
        rows["key_group"] = [torch.randint(-2, 3, (n,), generator=generator) for n in key_counts]
        rows["query_group"] = [group[:n] for group, n in zip(rows["key_group"], counts, strict=True)]
    return rows


def train_on_rank(rank: int, size: int, case: Case, gather: Any) -> dict[str, Any]:
    """Losses of the steps, their sum's averaged gradients, and the last step's log."""
    model = encoder(case.dtype)
    ddp = DistributedDataParallel(model)
    loss_fn = FusedInfoNCELoss(0.2, **case.options, gather=gather).to(case.dtype)
    loss_fn = loss_fn if not list(loss_fn.parameters()) else DistributedDataParallel(loss_fn)
    losses = []
    for step in range(case.steps):
        rows = {name: parts[rank] for name, parts in batch(case, size, step).items() if parts}
        names = [name for name in rows if not name.endswith("group")]
        encoded = dict(
            zip(names, ddp(torch.cat([rows[n] for n in names])).split([len(rows[n]) for n in names]), strict=True)
        )
        groups = {name: rows[name] for name in rows if name.endswith("group")}
        loss = loss_fn(encoded["query"], encoded["key"], encoded.get("negatives"), **groups)
        loss.sum().backward()
        losses.append(loss.detach())
    fused = getattr(loss_fn, "module", loss_fn)
    parameters = [*model.parameters(), *fused.parameters()]
    return {"losses": losses, "gradients": [p.grad for p in parameters], "last": fused.last}


def train_joined(case: Case, size: int) -> dict[str, Any]:
    """The same by the reference, in float64, in one process."""
    model = encoder(case.dtype).double()
    options = {
        name: value for name, value in case.options.items() if name not in ("queue_size", "learnable_temperature")
    }
    log_scale = torch.tensor(0.2).log().neg().to(case.dtype).double().requires_grad_()
    bank, losses = None, []
    for step in range(case.steps):
        rows = batch(case, size, step)
        joined = {name: torch.cat(parts) for name, parts in rows.items() if parts}
        encoded = {name: model(x.double()) for name, x in joined.items() if not name.endswith("group")}
        first_key = torch.tensor([0, *(len(x) for x in rows["key"])]).cumsum(0)
        target = torch.cat([start + torch.arange(len(q)) for start, q in zip(first_key, rows["query"], strict=False)])
        options["target"] = None if case.options.get("symmetric") else target
        groups = {name: joined[name] for name in joined if name.endswith("group")}
        negatives = encoded.get("negatives")
        learned = {"temperature": (-log_scale).exp()}
        loss = reference.info_nce(
            encoded["query"], encoded["key"], negatives=negatives, bank=bank, **learned, **options, **groups
        )
        loss.sum().backward()
        losses.append(loss.detach())
        if "queue_size" in case.options:
            keys = encoded["key"].detach()
            bank = (keys if bank is None else torch.cat([bank, keys]))[-case.options["queue_size"] :]
    gradients = [p.grad for p in model.parameters()]
    if "learnable_temperature" in case.options:
        gradients.append(log_scale.grad)
    return {"losses": losses, "gradients": gradients}


CASES = {
    "plain": Case(),
    "equal ranks": Case(equal=True),
    "more keys": Case(more_keys=True),
    "symmetric": Case({"symmetric": True}),
    "negatives": Case(negatives="any"),
    "own negatives": Case({"hard_negative_weight": 0.7}, negatives="own"),
    "own negatives, groups": Case({"hard_negative_weight": 0.7}, negatives="own", groups=True),
    "symmetric, own negatives": Case({"symmetric": True, "hard_negative_weight": 0.7}, negatives="own"),
    "groups left out": Case(groups=True, more_keys=True),
    "groups as negatives": Case({"same_group": "negative"}, groups=True),
    "symmetric, groups": Case({"symmetric": True}, groups=True),
    "negatives, groups": Case(negatives="any", groups=True),
    "margin": Case({"margin": 0.2}),
    "learned temperature": Case({"learnable_temperature": True, "symmetric": True}, negatives="any"),
    "sum": Case({"reduction": "sum"}),
    "none": Case({"reduction": "none"}),
    "float32": Case(dtype=torch.float32),
}
GATHERED_ONLY = {
    "groups as positives": Case({"same_group": "positive"}, groups=True, more_keys=True),
    "symmetric, positives": Case({"same_group": "positive", "symmetric": True}, groups=True),
    "queue": Case({"queue_size": 7}, steps=3),
    "queue alone": Case({"queue_size": 7, "in_batch": False}, steps=3),
}


@pytest.mark.parametrize(
    ("name", "gather"),
    [(name, True) for name in CASES | GATHERED_ONLY] + [(name, "ring") for name in CASES],
    ids=str,
)
def test_info_nce_is_that_of_the_joined_batch(cluster: Cluster, name: str, gather: Any) -> None:
    case = (CASES | GATHERED_ONLY)[name]
    exact = train_joined(case, cluster.size)
    got = cluster.run(train_on_rank, case, gather)
    tolerance = {} if case.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    per_row = case.options.get("reduction") == "none"
    for step, exact_loss in enumerate(exact["losses"]):
        by_rank = [answer["losses"][step].double() for answer in got]
        joined = torch.cat(by_rank) if per_row else torch.stack(by_rank).mean()
        torch.testing.assert_close(joined, exact_loss, **tolerance)
    averaged = cluster.size if per_row else 1  # rows' losses are the user's to weight: DDP averages them
    for answer in got:
        for gradient, exact_gradient in zip(answer["gradients"], exact["gradients"], strict=True):
            torch.testing.assert_close(gradient.double() * averaged, exact_gradient, **tolerance)
        torch.testing.assert_close(answer["last"]["loss"].double(), exact["losses"][-1].mean(), **tolerance)
        assert answer["last"] == got[0]["last"]


@dataclass(frozen=True)
class HiCLCase:
    options: dict[str, Any] = field(default_factory=dict)
    with_offsets: bool = True


def documents(size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each rank's segments, offsets and lengths."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for counts in SEGMENTS[:size]:
        rows = torch.randn(sum(counts), 5, generator=generator, dtype=torch.float64)
        lengths = torch.randint(1, 33, (sum(counts),), generator=generator)
        made.append((rows, torch.tensor([0, *counts]).cumsum(0), lengths))
    return made


def hicl_on_rank(rank: int, size: int, case: HiCLCase, gather: Any) -> dict[str, Any]:
    model = encoder(torch.float64)
    ddp = DistributedDataParallel(model)
    loss_fn = FusedHiCLLoss(0.2, **case.options, gather=gather)
    rows, offsets, lengths = documents(size)[rank]
    first, second = ddp(torch.cat([rows, rows + 0.3])).chunk(2)
    loss = loss_fn(first, second, offsets, lengths) if case.with_offsets else loss_fn(first, second)
    loss.backward()
    return {"loss": loss.detach(), "gradients": [p.grad for p in model.parameters()], "last": loss_fn.last}


@pytest.mark.parametrize("gather", [True, "ring"])
@pytest.mark.parametrize(
    "case",
    [
        HiCLCase(),
        HiCLCase({"local_weight": 0.6, "global_weight": 1.5, "pooling": "mean"}),
        HiCLCase({"same_sequence": "negative"}),
        HiCLCase({"same_sequence": "positive"}),
        HiCLCase(with_offsets=False),
    ],
    ids=lambda case: str(case.options) if case.with_offsets else "without offsets",
)
def test_hicl_is_that_of_the_joined_batch(cluster: Cluster, case: HiCLCase, gather: Any) -> None:
    if gather == "ring" and case.options.get("same_sequence") == "positive":
        pytest.skip("refused: test_what_a_ring_can_not_do")
    model = encoder(torch.float64)
    parts = documents(cluster.size)
    rows, lengths = torch.cat([part[0] for part in parts]), torch.cat([part[2] for part in parts])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat([part[1].diff() for part in parts]).cumsum(0)])
    arguments = (offsets, lengths) if case.with_offsets else ()
    exact = reference.hicl_loss(
        *model(torch.cat([rows, rows + 0.3])).chunk(2), *arguments, temperature=0.2, **case.options
    )
    exact.backward()

    got = cluster.run(hicl_on_rank, case, gather)
    torch.testing.assert_close(torch.stack([answer["loss"] for answer in got]).mean(), exact.detach())
    for answer in got:
        for gradient, parameter in zip(answer["gradients"], model.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)
        torch.testing.assert_close(answer["last"]["loss"], exact.detach())
        assert set(answer["last"]) >= {"positive_similarity", "hardest_negative_similarity"}
        assert case.with_offsets == ("local" in answer["last"])


def extreme_on_rank(rank: int, size: int, gather: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """All similarities −1 at a temperature of 0.01: e^(1/τ) is more than float32 holds."""
    query, key = torch.ones(2, 4, requires_grad=True), (-torch.ones(2, 4)).requires_grad_()
    with torch.no_grad():
        query[0, 0], key[0, 1] = 1.1, -1.1
    temperature = torch.tensor(0.01, requires_grad=True)
    loss_fn = FusedInfoNCELoss(0.01, gather=gather)
    loss_fn.temperature.forward = lambda: temperature  # type: ignore[method-assign]
    loss = loss_fn(query, key)
    loss.backward()
    return loss.detach(), query.grad, temperature.grad


def test_opposite_vectors_at_a_low_temperature(cluster: Cluster) -> None:
    for gathered, ring in zip(cluster.run(extreme_on_rank, True), cluster.run(extreme_on_rank, "ring"), strict=True):
        # The temperature's gradient is a small difference of similarities near −1.
        for got, expected, tolerance in zip(ring, gathered, (1e-4, 1e-4, 0.05), strict=True):
            assert torch.isfinite(expected).all() and expected.abs().max() > 0
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=1e-4)


def one_group_on_rank(rank: int, size: int, gather: Any) -> tuple[Tensor, Tensor | None]:
    """Rank 0's rows have no negative at all, the others' have those of rank 0."""
    query = torch.eye(2, 4, dtype=torch.float64).requires_grad_()
    group = torch.full((2,), min(rank, 1))
    if size == 2 and rank == 0:
        group = torch.ones(2, dtype=torch.int64)
    loss = FusedInfoNCELoss(0.5, gather=gather)(query, query.detach() + 0.1, query_group=group, key_group=group)
    loss.backward()
    return loss.detach(), query.grad


@pytest.mark.parametrize("gather", [True, "ring"])
def test_rows_without_a_negative(clusters: Callable[[int], Cluster], gather: Any) -> None:
    for loss, gradient in clusters(2).run(one_group_on_rank, gather):
        assert loss == 0 and (gradient == 0).all()
    for gathered, ring in zip(
        clusters(3).run(one_group_on_rank, True), clusters(3).run(one_group_on_rank, "ring"), strict=True
    ):
        torch.testing.assert_close(ring, gathered)


def test_one_process_needs_no_group() -> None:
    query, key = torch.randn(2, 5, 4)
    for gather in (True, "ring"):
        torch.testing.assert_close(FusedInfoNCELoss(gather=gather)(query, key), FusedInfoNCELoss()(query, key))


def test_what_a_ring_can_not_do() -> None:
    with pytest.raises(ValueError, match="queue_size: expected 0 with gather"):
        FusedInfoNCELoss(queue_size=3, gather="ring")
    with pytest.raises(ValueError, match="same_group: expected"):
        FusedInfoNCELoss(same_group="positive", gather="ring")
    with pytest.raises(ValueError, match="same_sequence: expected"):
        FusedHiCLLoss(same_sequence="positive", gather="ring")
    with pytest.raises(ValueError, match="gather: expected one of False, True, 'ring', got 'rings'"):
        FusedInfoNCELoss(gather="rings")  # type: ignore[arg-type]
