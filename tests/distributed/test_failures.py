"""A rank with a bad batch or other options: all ranks raise, in the same words, and can go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hicl_fast import FusedHiCLLoss, FusedInfoNCELoss
from hicl_fast.distributed import joined_rows
from tests.distributed.cluster import Cluster


def call_on_rank(rank: int, size: int, calls: list[dict[str, Any]]) -> str:
    """The words of what this rank's call raises."""
    call = {"loss": FusedInfoNCELoss, "options": {}, "arguments": {}, **calls[min(rank, len(calls) - 1)]}
    call["arguments"] = {"query": torch.ones(2, 3), "key": torch.ones(2, 3), **call["arguments"]}
    if call["loss"] is FusedHiCLLoss:
        renamed = {"query": "segments", "key": "segments_positive"}
        call["arguments"] = {renamed.get(name, name): value for name, value in call["arguments"].items()}
    with pytest.raises(ValueError) as raised:
        call["loss"](gather=True, **call["options"])(**call["arguments"])
    return str(raised.value)


GROUPS = {"query_group": torch.zeros(2, dtype=torch.int64), "key_group": torch.zeros(2, dtype=torch.int64)}
OFFSETS = {"offsets": torch.tensor([0, 1, 2]), "lengths": torch.tensor([3, 4])}


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        (
            [{}, {"arguments": {"query": torch.ones(2, 3).double()}}],
            ["rank 0: query (·, 3) torch.float32", "rank 1: query (·, 3) torch.float64"],
        ),
        (
            [{}, {"arguments": {"query": torch.ones(2, 4), "key": torch.ones(2, 4)}}],
            ["rank 0: query (·, 3)", "rank 1: query (·, 4) torch.float32 on cpu; key (·, 4)"],
        ),
        (
            [{"arguments": {"query": torch.ones(0, 3)}}, {}],
            ["rank 0: ValueError: query: expected at least one row", "(0, 3)"],
        ),
        ([{}, {"arguments": {"key": [1.0]}}], ["rank 1: TypeError: key: expected a tensor of shape (M, D), got [1.0]"]),
        ([{}, {"options": {"margin": 0.1}}], ["rank 0: options margin=0.0", "rank 1: options margin=0.1"]),
        ([{"options": {"temperature": 0.1}}, {}], ["rank 0: temperature 0.1, learnable=False"]),
        ([{"arguments": GROUPS}, {}], ["rank 0: groups True", "rank 1: groups False"]),
        ([{"arguments": {"negatives": torch.ones(1, 3)}}, {}], ["rank 1: negatives None"]),
        (
            [{}, {"arguments": {"query": torch.ones(2, 3, requires_grad=True)}}],
            ["rank 1: query (·, 3) torch.float32 on cpu, with gradient"],
        ),
        (
            [{}, {"loss": FusedHiCLLoss, "arguments": OFFSETS}],
            ["rank 1: matrices sequences, segments; ", "; loss FusedHiCLLoss; "],
        ),
        (
            [
                {"loss": FusedHiCLLoss, "arguments": OFFSETS},
                {"loss": FusedHiCLLoss, "arguments": {**OFFSETS, "offsets": torch.tensor([0, 1, 5])}},
            ],
            ["rank 1: ValueError: offsets: expected"],
        ),
        (
            [
                {"options": {"symmetric": True}, "arguments": {"key": torch.ones(3, 3)}},
                {"options": {"symmetric": True}},
            ],
            ["rank 0: ValueError: symmetric: expected as many queries as keys and no target, got 2 queries and 3 keys"],
        ),
        (
            [{"options": {"hard_negative_weight": 1.0}, "arguments": {"negatives": torch.ones(3, 3)}}],
            ["rank 0: ValueError: hard_negative_weight: expected one negative for each of the 2 queries", "rank 1: "],
        ),
    ],
)
def test_all_ranks_say_why(cluster: Cluster, calls: list[dict[str, Any]], words: list[str]) -> None:
    told = cluster.run(call_on_rank, calls)
    assert set(told) == {told[0]}
    assert told[0].startswith("gather: expected ")
    for part in words:
        assert part in told[0]


def rows_on_rank(rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor | None, str]:
    rows = torch.arange(rank + 1.0)[:, None].requires_grad_()
    joined = joined_rows(rows)
    (joined * torch.arange(1.0, len(joined) + 1)[:, None] * (rank + 1)).sum().backward()
    try:
        joined_rows(torch.ones(2, 1 + rank))
    except ValueError as failure:
        return joined.detach(), rows.grad, str(failure)
    return joined.detach(), rows.grad, ""


def test_rows_are_joined_with_gradient(cluster: Cluster) -> None:
    ranks = range(cluster.size)
    expected = torch.cat([torch.arange(rank + 1.0) for rank in ranks])[:, None]
    asked = torch.arange(1.0, len(expected) + 1) * sum(rank + 1 for rank in ranks)
    for rank, (joined, gradient, failure) in enumerate(cluster.run(rows_on_rank)):
        torch.testing.assert_close(joined, expected)
        first = rank * (rank + 1) // 2
        torch.testing.assert_close(gradient[:, 0], asked[first : first + rank + 1])
        assert "rank 1: rows (·, 2)" in failure
