"""The rules of InfoNCE's columns over several processes: the joined batch's loss and gradients, gathered and round a ring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hicl_fast.functional as HF
from hicl_fast import FusedInfoNCELoss
from tests.distributed.cluster import Cluster

QUERIES, KEYS, NEGATIVES, OWN = (3, 1, 4, 2), (4, 3, 5, 2), (4, 2, 5, 2), (2, 3, 5, 0)
D = 5

# What a loss is made with, and which of the rules its columns have.
CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "margin of false negatives": ({"false_negative_margin": -0.1}, set()),
    "ratio of false negatives": ({"false_negative_ratio": 0.8}, {"negatives"}),
    "relations": ({}, {"relations", "negatives"}),
    "groups, not of negatives": ({}, {"groups"}),
    "hardness": ({}, {"hardness", "negatives"}),
    "own negatives": ({"false_negative_margin": 0.1}, {"own", "relations", "negatives"}),
    "target": ({}, {"target", "groups"}),
    "several targets": ({}, {"several targets", "relations", "negatives", "own"}),
    "everything": ({"false_negative_margin": 0.05}, {"own", "relations", "negatives", "hardness", "target"}),
    "symmetric": ({"symmetric": True, "false_negative_margin": 0.05}, {"own", "relations", "negatives", "hardness"}),
    "symmetric, no groups of keys": ({"symmetric": True}, {"own", "relations", "negatives", "keys without"}),
    "rows": ({"reduction": "none"}, {"relations", "negatives", "hardness"}),
    "own negatives' weight": ({"hard_negative_weight": 0.7}, {"negatives", "relations", "hardness"}),
    "no batch": ({"in_batch": False}, {"own", "negatives", "target"}),
}


def parts(case: str, size: int) -> list[dict[str, Any]]:
    """Each rank's batch: rows, groups and targets."""
    options, rules = CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    symmetric, weighted = options.get("symmetric"), "hard_negative_weight" in options
    found = []
    for rank in range(size):
        n = QUERIES[rank]
        m = n if symmetric else KEYS[rank] + n * 0
        counts = {"query": n, "key": max(m, n), "negatives": n if weighted else NEGATIVES[rank], "own": OWN[rank]}
        rows = {x: torch.randn(count, D, generator=generator, dtype=torch.float64) for x, count in counts.items()}
        rows["key"][:n] += rows["query"]
        relations = (2,) if "relations" in rules else ()
        ids = {x: torch.randint(0, 6, (count, *relations), generator=generator) for x, count in counts.items()}
        offsets = torch.tensor([0, *([OWN[rank]] * n)])
        part = {"rows": rows, "ids": ids, "offsets": offsets}
        how_many = torch.ones(n, dtype=torch.int64)
        if "several targets" in rules:
            how_many = torch.randint(1, 4, (n,), generator=generator)
            part["target_offsets"] = torch.cat([torch.tensor([0]), how_many.cumsum(0)])
        part["target"] = torch.randint(0, counts["key"], (int(how_many.sum()),), generator=generator)
        found.append(part)
    return found


def arguments(case: str, part: dict[str, Any], rows: dict[str, Tensor]) -> dict[str, Any]:
    _, rules = CASES[case]
    has_groups = bool(rules & {"relations", "groups"})
    ids = part["ids"] if has_groups else {}

    def columns(name: str) -> HF.Columns:
        group = ids.get(name) if name == "key" or "relations" in rules else None
        if name == "key" and "keys without" in rules:
            group = None
        return HF.Columns(rows[name], group=group, hardness=3.0 if "hardness" in rules else 0.0)

    found = {"query": rows["query"], "key": columns("key"), "query_group": ids.get("query")}
    if "negatives" in rules:
        found["negatives"] = columns("negatives")
    if rules & {"target", "several targets"}:
        found["target"] = part["target"]
    if "target_offsets" in part:
        found["target_offsets"] = part["target_offsets"]
    if "own" in rules:
        group = ids.get("own") if "relations" in rules else None
        found["own_negatives"] = HF.OwnNegatives(rows["own"], part["offsets"], group=group)
    return found


def on_rank(rank: int, size: int, case: str, gather: Any) -> tuple[Tensor, dict[str, Tensor]]:
    part = parts(case, size)[rank]
    rows = {name: x.requires_grad_() for name, x in part["rows"].items()}
    loss = FusedInfoNCELoss(0.2, **CASES[case][0], gather=gather)(**arguments(case, part, rows))
    loss.sum().backward()
    return loss.detach(), {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in rows.items()}


def joined_offsets(parts: list[Tensor]) -> Tensor:
    ends = torch.stack([part[-1] for part in parts]).cumsum(0) - parts[0].new_tensor([int(part[-1]) for part in parts])
    return torch.cat([parts[0][:1], *(part[1:] + end for part, end in zip(parts, ends, strict=True))])


def joined(case: str, size: int) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """The same in one process."""
    found, options = parts(case, size), dict(CASES[case][0])
    rows = {name: torch.cat([part["rows"][name] for part in found]).requires_grad_() for name in found[0]["rows"]}
    ids = {name: torch.cat([part["ids"][name] for part in found]) for name in found[0]["ids"]}
    counts = {name: [len(part["rows"][name]) for part in found] for name in rows}
    first_key = torch.tensor([0, *counts["key"]]).cumsum(0)
    is_given = CASES[case][1] & {"target", "several targets"}
    own_place = [p["target"] for p in found] if is_given else [torch.arange(n) for n in counts["query"]]
    target = torch.cat([place + first for place, first in zip(own_place, first_key, strict=False)])
    whole = {"rows": rows, "ids": ids, "target": target}
    for name in ("offsets", "target_offsets"):
        if name in found[0]:
            whole[name] = joined_offsets([part[name] for part in found])
    call = arguments(case, whole, rows)
    if not options.get("symmetric"):
        call["target"] = target
    loss = HF.info_nce(**call, temperature=0.2, **options)
    loss.sum().backward()
    gradients = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in rows.items()}
    return loss.detach(), {name: list(x.split(counts[name])) for name, x in gradients.items()}


@pytest.mark.parametrize("gather", [True, "ring"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_that_of_the_joined_batch(cluster: Cluster, case: str, gather: Any) -> None:
    options, rules = CASES[case]
    if gather == "ring" and "in_batch" in options:
        with pytest.raises(ValueError, match="in_batch: expected True"):
            FusedInfoNCELoss(0.2, **options, gather=gather)
        return
    exact, gradients = joined(case, cluster.size)
    got = cluster.run(on_rank, case, gather)
    losses = [loss for loss, _ in got]
    if options.get("reduction") == "none":
        torch.testing.assert_close(torch.cat(losses), exact)
    else:
        torch.testing.assert_close(torch.stack(losses).mean(), exact)
    for rank, (_, found) in enumerate(got):
        # A rank's gradient is for the mean over the ranks; without a reduction, rows add up.
        share = 1 if options.get("reduction") == "none" else cluster.size
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, share * gradients[name][rank], msg=lambda m, name=name: f"{name}: {m}")


def without_columns_on_rank(rank: int, size: int) -> str:
    own = torch.ones(2, 1, 3) if rank else None
    with pytest.raises(ValueError) as raised:
        FusedInfoNCELoss(in_batch=False, gather=True)(torch.ones(2, 3), torch.ones(2, 3), own_negatives=own)
    return str(raised.value)


def test_all_ranks_hear_of_one_without_columns(cluster: Cluster) -> None:
    for told in cluster.run(without_columns_on_rank):
        assert "rank 0: ValueError: in_batch: expected True without own negatives" in told
