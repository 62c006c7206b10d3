"""The modules against the reference, and the queue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hicl_fast.functional as HF
from hicl_fast import FusedHiCLLoss, FusedInfoNCELoss, HardNegativeMixing, NegativeQueue, SegmentPooling, reference


def segments() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(9, 12, generator=generator, dtype=torch.float64)
    again = h + 0.3 * torch.randn(9, 12, generator=generator, dtype=torch.float64)
    return h, again, torch.tensor([0, 3, 4, 9]), torch.tensor([32, 32, 5, 17, 32, 32, 32, 32, 1])


@pytest.mark.parametrize("same_sequence", ["exclude", "negative", "positive"])
@pytest.mark.parametrize("pooling", ["length", "mean"])
@pytest.mark.parametrize("weights", [(0.3, None), (1.0, 0.0), (0.5, 2.0)])
def test_hicl(same_sequence: str, pooling: str, weights: tuple[float, float | None]) -> None:
    options = {"same_sequence": same_sequence, "pooling": pooling}
    options |= {"local_weight": weights[0], "global_weight": weights[1]}
    h, again, offsets, lengths = segments()
    results = []
    for loss in (FusedHiCLLoss(**options), lambda *a: reference.hicl_loss(*a, **options)):
        leaves = [x.clone().requires_grad_() for x in (h, again)]
        value = loss(*leaves, offsets, lengths)
        value.backward()
        results.append((value.detach(), *(x.grad for x in leaves)))
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_sequences_of_one_segment_are_plain_info_nce(alpha: float) -> None:
    h, again, _, lengths = segments()
    loss = FusedHiCLLoss(local_weight=alpha)
    torch.testing.assert_close(loss(h, again, torch.arange(10), lengths), HF.info_nce(h, again))
    torch.testing.assert_close(loss(h, again), HF.info_nce(h, again))


def test_what_is_logged() -> None:
    h, again, offsets, lengths = segments()
    loss = FusedHiCLLoss()
    assert loss.last == {}
    value = loss(h.requires_grad_(), again, offsets, lengths)
    assert set(loss.last) == {"loss", "local", "global", "positive_similarity", "hardest_negative_similarity"}
    assert not any(x.requires_grad for x in loss.last.values())
    torch.testing.assert_close(loss.last["loss"], value.detach())
    loss(h, again)
    assert "local" not in loss.last


def test_learned_temperature() -> None:
    h, again, _, _ = segments()
    loss = FusedInfoNCELoss(0.07, learnable_temperature=True).double()
    loss(h, again).backward()
    log_scale = loss.temperature.log_scale
    torch.testing.assert_close((-log_scale).exp().item(), 0.07, rtol=1e-6, atol=0.0)
    copy = log_scale.detach().clone().requires_grad_()
    reference.info_nce(h, again, temperature=(-copy).exp()).backward()
    torch.testing.assert_close(log_scale.grad, copy.grad)
    with torch.no_grad():
        log_scale.fill_(9.0)
    assert loss.temperature().item() == pytest.approx(0.01), "1/τ is held at 100"


def test_queue_is_first_in_first_out() -> None:
    queue = NegativeQueue(5)
    assert queue.rows() is None and len(queue) == 0
    numbers = torch.arange(24.0).reshape(12, 2)
    for begin in range(0, 12, 2):
        queue.push(numbers[begin : begin + 2])
        expected = numbers[max(0, begin + 2 - 5) : begin + 2]
        assert sorted(queue.rows()[:, 0].tolist()) == expected[:, 0].tolist()
    queue.push(numbers[:9])  # more than it holds
    assert sorted(queue.rows()[:, 0].tolist()) == numbers[4:9, 0].tolist()


def test_queue_is_saved() -> None:
    batches = torch.randn(6, 4, 3)
    whole, first = NegativeQueue(7), NegativeQueue(7)
    for batch in batches[:3]:
        whole.push(batch)
        first.push(batch)
    resumed = NegativeQueue(7)
    resumed.load_state_dict(first.state_dict())
    for batch in batches[3:]:
        whole.push(batch)
        resumed.push(batch)
    torch.testing.assert_close(resumed.rows(), whole.rows())
    with pytest.raises(ValueError, match="storage: expected 4 rows"):
        NegativeQueue(4).load_state_dict(first.state_dict())


def test_queued_keys_are_negatives_while_training() -> None:
    h, again, _, _ = segments()
    loss = FusedInfoNCELoss(queue_size=20)
    first = loss(h, again)
    torch.testing.assert_close(first, HF.info_nce(h, again))
    torch.testing.assert_close(loss(h + 1, again + 1), HF.info_nce(h + 1, again + 1, bank=again))
    loss.eval()
    torch.testing.assert_close(loss(h, again), first)
    assert len(loss.queue) == 18


def test_a_queue_alone_is_what_positives_are_told_from() -> None:
    """MoCo: without the batch's keys the first step has nothing to tell its positives from, and fills the queue."""
    h, again, _, _ = segments()
    loss = FusedInfoNCELoss(in_batch=False, queue_size=20)
    assert loss(h, again) == 0 and len(loss.queue) == len(again)
    torch.testing.assert_close(loss(h + 1, again + 1), HF.info_nce(h + 1, again + 1, bank=again, in_batch=False))
    with pytest.raises(ValueError, match="in_batch: expected True without .* queue, in training"):
        loss.eval()(h, again)


def test_what_does_not_fit_the_queue_is_said_of_ones_own_arguments() -> None:
    h, again, _, _ = segments()
    loss, ids = FusedInfoNCELoss(queue_size=20), torch.arange(len(h))
    loss(h, again, query_group=ids, key_group=ids)
    loss(h, again, query_group=ids[:, None], key_group=ids[:, None])
    two = torch.stack([ids, ids], dim=1)
    with pytest.raises(ValueError, match=r"query_group: expected shape \(\d+,\), as the queue has"):
        loss(h, again, query_group=two, key_group=two)
    with pytest.raises(ValueError, match="query: expected rows of length .*, as the queue has"):
        loss(h[:, 1:], again[:, 1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": None}, "key: expected a tensor"),
        ({"key": HF.Columns(None), "key_group": None}, "key.rows: expected a tensor, got None"),  # type: ignore[arg-type]
        ({"negatives": HF.Columns(None)}, "negatives.rows: expected a tensor, got None"),  # type: ignore[arg-type]
        (
            {"negatives": HF.Columns(torch.ones(3, 4), group=torch.ones(3))},
            r"negatives\.group: expected an int64 tensor",
        ),
        ({"key_group": torch.ones(2)}, "key_group: expected an int64 tensor"),
        (
            {"own_negatives": HF.OwnNegatives(None, torch.arange(6), group=torch.arange(6))},  # type: ignore[arg-type]
            "own_negatives.rows: expected a tensor",
        ),
        ({"own_negatives": [torch.ones(1, 4)] * 5}, "own_negatives: expected a tensor of shape .* or OwnNegatives"),
        ({"own_negatives": torch.ones(5, 3)}, "own_negatives: expected shape .* or OwnNegatives"),
    ],
)
def test_columns_that_are_none(change: dict[str, Any], message: str) -> None:
    ids = {"query_group": torch.arange(5), "key_group": torch.arange(5)}
    given = {"query": torch.randn(5, 4), "key": torch.randn(5, 4), **ids} | change
    with pytest.raises((TypeError, ValueError), match=message):
        FusedInfoNCELoss()(**given)
    with pytest.raises((TypeError, ValueError), match=message):
        HF.info_nce(**given)


def test_a_weight_for_negatives_that_are_not_there() -> None:
    h, again, _, _ = segments()
    loss = FusedInfoNCELoss(hard_negative_weight=1.0)
    torch.testing.assert_close(loss(h, again), FusedInfoNCELoss()(h, again))
    with pytest.raises(ValueError, match="hard_negative_weight: expected 0 with own_negatives and no negatives"):
        loss(h, again, own_negatives=h[:, None])


def test_pooling_module() -> None:
    h, _, offsets, lengths = segments()
    torch.testing.assert_close(SegmentPooling()(h, offsets, lengths), reference.segment_pool(h, offsets, lengths))
    torch.testing.assert_close(SegmentPooling("mean")(h, offsets), reference.segment_pool(h, offsets))
    with pytest.raises(ValueError, match="lengths: "):
        SegmentPooling()(h, offsets)


@pytest.mark.parametrize(
    "options", [{"false_negative_margin": 0.1}, {"false_negative_ratio": 0.9}, {"in_batch": False}]
)
def test_rules_that_leave_nothing_to_mix(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="hard_negative_mixing: expected None with a limit or in_batch=False"):
        FusedInfoNCELoss(hard_negative_mixing=HardNegativeMixing(), **options)
