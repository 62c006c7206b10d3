"""Queues that keep groups, and what copies, averages, devices and other processes see of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import hicl_fast.functional as HF
from hicl_fast import FusedHiCLLoss, FusedInfoNCELoss, HardNegativeMixing, NegativeQueue, PositiveMixing, reference

MODULES = {
    "queue": lambda: FusedInfoNCELoss(queue_size=6),
    "mixing": lambda: FusedInfoNCELoss(hard_negative_mixing=HardNegativeMixing(seed=0)),
    "previous": lambda: FusedInfoNCELoss(
        hard_negative_mixing=HardNegativeMixing(k=3, bank="previous", queue_size=6, seed=0)
    ),
    "HiCL": lambda: FusedHiCLLoss(queue_size=6, hard_negative_mixing=HardNegativeMixing(seed=0)),
}


def views(seed: int = 0, n: int = 6, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(n, 12, generator=generator, dtype=torch.float64)
    return query, query + noise * torch.randn(n, 12, generator=generator, dtype=torch.float64)


def test_several_relations() -> None:
    queue, ids = NegativeQueue(3), torch.tensor([[1, 10], [2, 20]])
    queue.push(torch.randn(1, 4))
    queue.push(torch.randn(2, 4), ids)
    assert queue.groups()[1:].tolist() == ids.tolist() and queue.groups().shape == (3, 2)
    with pytest.raises(ValueError, match=r"group: expected shape \(2, 2\), as pushed before"):
        queue.push(torch.randn(2, 4), ids[:, 0])
    other = NegativeQueue(3)
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.groups(), queue.groups())
    # A row that shares either id with the query is left out.
    query, key = torch.randn(2, 4), torch.randn(2, 4)
    loss = HF.info_nce(query, key, bank=queue.rows(), bank_group=queue.groups(), query_group=ids, key_group=ids + 100)
    both = F.normalize(query) @ F.normalize(queue.rows()).T
    first = torch.tensor([[True, False, True], [True, True, False]])
    logits = torch.cat([F.normalize(query) @ F.normalize(key).T, both.masked_fill(~first, -torch.inf)], dim=1) / 0.05
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.arange(2)))


def test_each_row_keeps_its_group() -> None:
    queue = NegativeQueue(5)
    numbers = torch.arange(24.0).reshape(12, 2)
    assert queue.groups() is None
    queue.push(numbers[:2])
    assert queue.groups() is None, "none of the rows has one"
    for begin in range(2, 12, 2):
        batch = numbers[begin : begin + 2]
        queue.push(batch, batch[:, 0].long())
        rows, groups = queue.rows(), queue.groups()
        assert rows is not None and groups is not None
        grouped = rows[:, 0] >= 4
        assert torch.equal(groups[grouped], rows[grouped, 0].long()) and (groups[~grouped] == -(2**63)).all()
    queue.push(numbers[:9], torch.arange(9))  # more than it holds
    assert sorted(queue.groups().tolist()) == [4, 5, 6, 7, 8]
    with pytest.raises(ValueError, match=r"group: expected shape \(2,\) or \(2, G\), a group for each row"):
        queue.push(numbers[:2], torch.arange(3))
    with pytest.raises(TypeError, match="group: expected an int64 tensor"):
        queue.push(numbers[:2], torch.arange(2.0))


def test_an_items_own_old_key_is_not_its_negative() -> None:
    """The second epoch's loss is that of a bank without the row's own old key."""
    query, key = views(noise=0.05)
    ids = torch.arange(6) + 100
    loss_fn = FusedInfoNCELoss(queue_size=6)
    loss_fn(query, key, query_group=ids, key_group=ids)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    second = loss_fn(query[order], key[order], query_group=ids[order], key_group=ids[order])
    alone = [
        HF.info_nce(
            query[[i]],
            key[order[torch.cat([(order == i).nonzero(), (order != i).nonzero()])[:, 0]]],
            bank=key[torch.arange(6) != i],
        )
        for i in range(6)
    ]
    torch.testing.assert_close(second, torch.stack(alone).mean())
    without_groups = HF.info_nce(query[order], key[order], bank=key)
    assert second < 0.02 < 0.6 < without_groups


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"margin": 0.1}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("same_group", ["exclude", "negative", "positive"])
def test_groups_in_the_queue_mean_what_they_mean_among_keys(same_group: str, options: dict[str, Any]) -> None:
    loss_fn = FusedInfoNCELoss(0.2, queue_size=8, same_group=same_group, **options)  # type: ignore[arg-type]
    before, old_group = views(1, n=8)[1], torch.arange(8) // 2
    loss_fn(before, before, query_group=old_group, key_group=old_group)
    group = torch.tensor([0, 1, 2, 2, 7, 8])
    query, key = (x.requires_grad_() for x in views(2))
    got = loss_fn(query, key, query_group=group, key_group=group)
    grouping: dict[str, Any] = {"query_group": group, "key_group": group, "bank_group": old_group}
    exact = reference.info_nce(
        query,
        key,
        temperature=0.2,
        bank=before,
        same_group=same_group,
        **grouping,
        **options,  # type: ignore[arg-type]
    )
    torch.testing.assert_close(got, exact)
    for a, b in zip(*(torch.autograd.grad(x.sum(), (query, key)) for x in (got, exact)), strict=True):
        torch.testing.assert_close(a, b)


def test_rows_without_a_group_are_everybodys_negatives() -> None:
    query, key = views()
    group = torch.arange(6)
    for pushed, asked in ((None, group), (group, None), (None, None)):
        loss_fn = FusedInfoNCELoss(queue_size=6)
        loss_fn(query, key, query_group=pushed, key_group=pushed)
        second = loss_fn(query, key, query_group=asked, key_group=asked)
        torch.testing.assert_close(second, HF.info_nce(query, key, bank=key))


def test_mixing_beside_a_queue_with_groups() -> None:
    """Mixtures are of the batch's keys, whatever the queue holds; the queue's rows stay out of them."""
    query, key = views()
    group = torch.arange(6)
    loss_fn = FusedInfoNCELoss(
        0.2,
        queue_size=6,
        hard_negative_weight=0.5,
        hard_negative_mixing=HardNegativeMixing(k=3, num_mixed=5, seed=0),
        positive_mixing=PositiveMixing(),
    )
    negatives = views(3)[0]
    old_key = views(1)[1]
    loss_fn(query, old_key, query_group=group, key_group=group)
    queued = loss_fn.queue.rows()  # mixed positives
    got = loss_fn(query, key, negatives, query_group=group, key_group=group)
    mixed, hardest = loss_fn.hard_negative_mixing.mixed, loss_fn.positive_mixing.hardest
    assert int(mixed.index.max()) < 6
    key = reference.positive_mixing(query, key, key[hardest])
    extra = reference.mixed_negative_logits(query, key, mixed.index, mixed.pairs, temperature=0.2)
    exact = reference.info_nce(
        query,
        key,
        temperature=0.2,
        negatives=negatives,
        hard_negative_weight=0.5,
        bank=queued,
        extra_logits=extra,
        query_group=group,
        key_group=group,
        bank_group=group,
    )
    torch.testing.assert_close(got, exact)


def test_previous_keys_of_a_rows_group_are_not_mixed_for_it() -> None:
    query, key = views()
    group = torch.tensor([0, 0, 1, 2, 3, 4])
    mixing = HardNegativeMixing(k=10, bank="previous", queue_size=6, seed=0)
    loss_fn = FusedInfoNCELoss(hard_negative_mixing=mixing)
    for _ in range(2):
        loss_fn(query, key, query_group=group, key_group=group)
    assert mixing.mixed.index.shape == (6, 4), "as many as each row has outside its group"
    assert not (mixing.queue.groups()[mixing.mixed.index] == group[:, None]).any()
    all_one = torch.zeros(6, dtype=torch.int64)
    other = FusedInfoNCELoss(hard_negative_mixing=HardNegativeMixing(bank="previous", queue_size=6))
    for _ in range(2):
        assert other(query, key, query_group=all_one, key_group=all_one) == 0


def test_hicl_keeps_the_groups_of_sequences() -> None:
    segments, again = views(n=12)
    offsets, lengths, ids = torch.arange(0, 13, 2), torch.ones(12), torch.arange(6) + 7
    loss_fn = FusedHiCLLoss(queue_size=6)
    first = loss_fn(segments, again, offsets, lengths, sequence_group=ids)
    kept = loss_fn.global_loss.queue.rows()
    torch.testing.assert_close(first, FusedHiCLLoss()(segments, again, offsets, lengths))
    loss_fn(segments, again, offsets, lengths, sequence_group=ids)
    pooled = loss_fn.pool(segments, offsets, lengths)
    exact = reference.info_nce(
        pooled, kept, temperature=0.05, bank=kept, query_group=ids, key_group=ids, bank_group=ids
    )
    torch.testing.assert_close(loss_fn.last["global"], exact)
    plain = FusedHiCLLoss(queue_size=6)
    for _ in range(2):
        value = plain(pooled, kept, sequence_group=ids)
    torch.testing.assert_close(value, exact)


def test_sequences_of_one_group_are_not_contrasted_in_hicl() -> None:
    """The same document twice in a batch: neither its segments nor itself are negatives of the other's."""
    segments, again = views(n=8)
    offsets, ids = torch.arange(0, 9, 2), torch.tensor([5, 5, 6, 7])
    loss_fn = FusedHiCLLoss(pooling="mean")
    loss_fn(segments, again, offsets, sequence_group=ids)
    of_segments = ids.repeat_interleave(2)
    local = reference.info_nce(segments, again, temperature=0.05, query_group=of_segments, key_group=of_segments)
    torch.testing.assert_close(loss_fn.last["local"], local)
    with pytest.raises(ValueError, match=r"sequence_group: expected shape \(4,\)"):
        loss_fn(segments, again, offsets, sequence_group=of_segments)
    with pytest.raises(ValueError, match=r"sequence_group: expected shape \(8,\)"):
        loss_fn(segments, again, sequence_group=ids)


def test_a_resumed_queue_goes_on_with_the_same_groups() -> None:
    query, key = views()
    group = torch.arange(6)
    loss_fn, resumed = (FusedInfoNCELoss(queue_size=9) for _ in range(2))
    loss_fn(query, key, query_group=group, key_group=group)
    resumed.load_state_dict(loss_fn.state_dict())
    for seed in range(1, 4):
        query, key = views(seed)
        values = [f(query, key, query_group=group, key_group=group) for f in (loss_fn, resumed)]
        assert torch.equal(*values)
    assert torch.equal(resumed.queue.groups(), loss_fn.queue.groups())


def test_what_was_saved_before_queues_had_groups() -> None:
    """0-d tensors for the counts, and no groups."""
    rows = torch.randn(4, 3)
    queue = NegativeQueue(4)
    queue.push(torch.randn(4, 3), torch.arange(4))
    queue.load_state_dict({"storage": rows, "pushed": torch.tensor(6)})
    assert torch.equal(queue.rows(), rows) and queue.pushed == 6 and queue.groups() is None
    mixing = HardNegativeMixing(seed=0)
    mixing.load_state_dict({"step": torch.tensor(5)})
    assert mixing.step == 5
    with pytest.raises(RuntimeError, match="Missing key.*pushed"):
        queue.load_state_dict({"storage": rows})
    with pytest.raises(RuntimeError, match="Unexpected key.*elsewhere"):
        queue.load_state_dict({"storage": rows, "pushed": torch.tensor(6), "elsewhere": rows})


@pytest.mark.parametrize("name", MODULES)
def test_copies_made_before_the_first_push_follow(name: str) -> None:
    """An average of a model that has a loss in it, made at the beginning as it is everywhere."""
    model = nn.ModuleDict({"encoder": nn.Linear(12, 12).double(), "loss": MODULES[name]()})
    averages = [
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=buffers) for buffers in (False, True)
    ]
    early = copy.deepcopy(model)
    for step in range(3):
        query, key = views(step)
        model["loss"](model["encoder"](query), model["encoder"](key)).backward()
        for average in averages:
            average.update_parameters(model)
    early.load_state_dict(model.state_dict())
    late = copy.deepcopy(model)
    query, key = views(9)
    values = [one["loss"](query, key) for one in (model, early, late)]
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    assert torch.isfinite(averages[0].module["loss"](query, key))


@pytest.mark.parametrize("name", MODULES)
def test_no_buffers(name: str) -> None:
    """NCCL can't broadcast those in host memory, and DDP would make all processes' queues the first one's."""
    loss_fn = MODULES[name]()
    for _ in range(2):
        loss_fn(*views())
    assert list(loss_fn.buffers()) == []


def test_state_follows_the_module() -> None:
    queue = NegativeQueue(4)
    queue.push(torch.randn(3, 2), torch.arange(3))
    queue.double()
    assert queue.storage.dtype == torch.float64 and queue.group.dtype == torch.int64
    queue.type(torch.float32)
    assert queue.storage.dtype == torch.float32 and queue.group.dtype == torch.int64
    queue.to("meta")
    assert queue.storage.is_meta and queue.group.is_meta and queue.pushed == 3
