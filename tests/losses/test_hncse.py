"""Hard-negative and positive mixing inside the losses, against the reference given the same choices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hicl_fast.functional as HF
from hicl_fast import FusedHiCLLoss, FusedInfoNCELoss, HardNegativeMixing, PositiveMixing, reference
from hicl_fast.losses.hncse import Groups, fewest_candidates


def views(n: int = 24, d: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two views whose similarities leave some positives behind their hardest negatives."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(n, d, generator=generator) + 1.0
    key = query + 1.5 * torch.randn(n, d, generator=generator)
    return query.requires_grad_(), key.requires_grad_()


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs, retain_graph=True))


def assert_same(loss: FusedInfoNCELoss, query: Tensor, key: Tensor, **options: Any) -> None:
    """The fused loss equals the reference in float64 with the negatives and pairs that the fused one chose."""
    fused = loss(query, key, **{k: v for k, v in options.items() if k != "hard_negative_weight"})
    q, k = (x.detach().double().requires_grad_() for x in (query, key))
    positives, negatives = loss.positive_mixing, loss.hard_negative_mixing
    mixed_key = k
    if positives is not None:
        rows = k[: len(q)]
        settings = {"threshold": positives.threshold, "weights": positives.weights}
        mixed_key = torch.cat([reference.positive_mixing(q, rows, k[positives.hardest], **settings), k[len(q) :]])
    extra = None
    if negatives is not None:
        mixed = negatives.mixed
        bank = mixed_key if mixed.bank is None else mixed.bank.double()
        extra = reference.mixed_negative_logits(
            q, bank, mixed.index, mixed.pairs, alpha=negatives.alpha, temperature=0.05
        )
    exact = reference.info_nce(q, mixed_key, temperature=0.05, extra_logits=extra, **options)
    torch.testing.assert_close(fused.double(), exact, rtol=1e-5, atol=1e-6)
    for got, expected in zip(gradients(fused, query, key), gradients(exact, q, k), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("hnm", [None, {}, {"k": 2, "num_mixed": 1}, {"k": "auto", "alpha": 0.3}], ids=str)
@pytest.mark.parametrize("pm", [None, {}, {"threshold": 0.5, "weights": (0.7, 0.4)}, {"weights": "search"}], ids=str)
@pytest.mark.parametrize("more_keys", [0, 5])
def test_against_the_reference(hnm: dict[str, Any] | None, pm: dict[str, Any] | None, more_keys: int) -> None:
    query, key = views()
    key = torch.cat([key, torch.randn(more_keys, 16)]).detach().requires_grad_()
    loss = FusedInfoNCELoss(
        hard_negative_mixing=None if hnm is None else HardNegativeMixing(**hnm, seed=3),
        positive_mixing=None if pm is None else PositiveMixing(**pm),
    )
    assert_same(loss, query, key)


def test_with_explicit_negatives_and_groups() -> None:
    query, key = views()
    group = torch.arange(24) // 2
    loss = FusedInfoNCELoss(
        hard_negative_weight=0.5,
        hard_negative_mixing=HardNegativeMixing(k=5, seed=1),
        positive_mixing=PositiveMixing(),
    )
    assert_same(
        loss,
        query,
        key,
        negatives=torch.randn(24, 16),
        hard_negative_weight=0.5,
        query_group=group,
        key_group=group,
    )
    assert not (group[loss.hard_negative_mixing.mixed.index] == group[:, None]).any()
    assert not (group[loss.positive_mixing.hardest] == group).any()


def test_mixing_acts_on_the_global_loss_of_hicl() -> None:
    segments, again = views(40)
    offsets = torch.arange(0, 41, 4)
    plain = FusedHiCLLoss()
    mixing = FusedHiCLLoss(hard_negative_mixing=HardNegativeMixing(k=4, seed=0), positive_mixing=PositiveMixing())
    parts = []
    for loss in (plain, mixing):
        loss(segments, again, offsets, torch.ones(40)).backward()
        parts.append(loss.last)
    assert parts[0]["local"] == parts[1]["local"]
    assert parts[1]["global"] > parts[0]["global"] + 0.01
    assert mixing.global_loss.hard_negative_mixing.mixed.index.shape == (10, 4)


def test_pairs_change_from_step_to_step_and_resume() -> None:
    query, key = views()
    first, resumed = (HardNegativeMixing(seed=5) for _ in range(2))
    before = first(query, key, 0.05).mixing.pairs
    resumed.load_state_dict(first.state_dict())
    pairs = [mixing(query, key, 0.05).mixing.pairs for mixing in (first, resumed)]
    assert torch.equal(*pairs)
    assert not torch.equal(pairs[0], before)


def test_evaluation_does_not_advance_the_pairs() -> None:
    query, key = views()
    mixing = HardNegativeMixing(seed=5).eval()
    before, after = (mixing(query, key, 0.05).mixing.pairs for _ in range(2))
    assert torch.equal(before, after)


def test_bank_of_previous_batches_fills_up() -> None:
    loss = FusedInfoNCELoss(hard_negative_mixing=HardNegativeMixing(k=6, bank="previous", queue_size=10, seed=0))
    mixing = loss.hard_negative_mixing
    for step, kept in enumerate((0, 4, 8, 10, 10)):
        query, key = views(4, seed=step)
        plain = FusedInfoNCELoss()(query, key)
        value = loss(query, key)
        if kept == 0:
            assert mixing.mixed is None and torch.equal(value, plain)
            continue
        assert mixing.mixed.bank.shape[0] == kept
        assert mixing.mixed.index.shape == (4, min(6, kept))
        assert value > plain
        assert not mixing.mixed.bank.requires_grad
        assert (torch.cdist(mixing.mixed.bank, key) > 0).all()  # none is this batch's
    assert_same(loss, *views(4, seed=9))


def test_a_half_full_bank_resumes() -> None:
    first, resumed = (HardNegativeMixing(k=3, bank="previous", queue_size=10, seed=0) for _ in range(2))
    for step in range(2):
        first(*views(3, seed=step), 0.05)
    resumed.load_state_dict(first.state_dict())
    for step in range(2, 6):
        a, b = (mixing(*views(3, seed=step), 0.05).extra_logits for mixing in (first, resumed))
        assert torch.equal(a, b)


@pytest.mark.parametrize("k", [{}, {"k": 10}, {"k": "auto"}], ids=str)
def test_fewer_negatives_than_k(k: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """As many are mixed as every row has; the log says so once."""
    query, key = views(6)
    loss = FusedInfoNCELoss(hard_negative_mixing=HardNegativeMixing(**k, seed=0))
    loss(*views(24))
    assert loss.hard_negative_mixing.mixed.index.shape == (24, 10) and not caplog.records
    assert_same(loss, query, key)
    assert loss.hard_negative_mixing.mixed.index.shape == (6, 5)
    group = torch.tensor([0, 0, 0, 1, 1, 2])
    assert_same(loss, query, key, query_group=group, key_group=group)
    assert loss.hard_negative_mixing.mixed.index.shape == (6, 3)
    assert [record.name for record in caplog.records] == ["hicl_fast"]
    assert "a row has 5 negatives, fewer than k = 10: 5 of each row's are mixed" in caplog.text


def test_fewer_negatives_than_k_where_k_is_required() -> None:
    loss = FusedInfoNCELoss(hard_negative_mixing=HardNegativeMixing(require_k=True))
    with pytest.raises(ValueError, match="k: expected at most 5, the negatives that every row has, got 10"):
        loss(*views(6))


@pytest.mark.parametrize(
    "mixing", [{"hard_negative_mixing": HardNegativeMixing()}, {"positive_mixing": PositiveMixing()}]
)
def test_what_is_wrong_with_a_batch_is_said_before_it_is_mixed(mixing: dict[str, Any]) -> None:
    loss, (query, key), group = FusedInfoNCELoss(**mixing), views(6), torch.arange(6)
    for arguments, options, message in (
        ((query, key[:4]), {}, "key: expected at least 6 rows"),
        ((query, key[:, :5]), {}, "key: expected rows of length 16"),
        ((query, key), {"query_group": group, "key_group": group[:5]}, r"key_group: expected shape \(6,\)"),
        ((query, key), {"query_group": group}, "key_group: expected an int64 tensor"),
        ((query[:0], key), {}, "query: expected at least one row"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            loss(*arguments, **options)


MIXINGS: dict[str, dict[str, Any]] = {
    "negatives": {"hard_negative_mixing": {}},
    "positives": {"positive_mixing": {}},
    "both": {"hard_negative_mixing": {"k": 4}, "positive_mixing": {"weights": "search"}},
    "previous": {"hard_negative_mixing": {"bank": "previous", "queue_size": 12}},
}


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("groups", [None, "pairs", "one"])
def test_any_batch_trains(mixing: str, groups: str | None) -> None:
    """Down to a row, and where all rows are of one group: nothing is mixed where there are no two negatives to mix."""
    classes = {"hard_negative_mixing": HardNegativeMixing, "positive_mixing": PositiveMixing}
    loss = FusedInfoNCELoss(0.1, **{name: classes[name](**options) for name, options in MIXINGS[mixing].items()})
    for n in (11, 10, 5, 3, 2, 1):
        query, key = views(n)
        group = {"pairs": torch.arange(n) // 2, "one": torch.zeros(n, dtype=torch.int64), None: None}[groups]
        value = loss(query, key, query_group=group, key_group=group)
        if mixing == "negatives" and (groups == "one" or n <= 2):
            torch.testing.assert_close(
                value, HF.info_nce(query, key, temperature=0.1, query_group=group, key_group=group)
            )
        assert all(torch.isfinite(x).all() for x in (value, *gradients(value, query, key)))
        assert all(torch.isfinite(x) for x in loss.last.values())


def test_a_batch_of_one() -> None:
    """There are no negatives: the loss is 0 and so are its gradients, and nothing is logged of a hardest negative."""
    query, key = views(1)
    loss = FusedInfoNCELoss(hard_negative_mixing=HardNegativeMixing(), positive_mixing=PositiveMixing())
    value = loss(query, key)
    assert value == 0 and not any(x.any() for x in gradients(value, query, key))
    assert loss.hard_negative_mixing.mixed is None and loss.positive_mixing.hardest is None
    assert set(loss.last) == {"loss", "positive_similarity"}


def test_candidates_of_groups() -> None:
    query, key = views(4)
    key = torch.cat([key, key])
    assert fewest_candidates(query, key, None) == 7
    groups = Groups(torch.tensor([0, 1, 2, 9]), torch.tensor([0, 1, 2, 3, 0, 0, 5, 5]))
    assert fewest_candidates(query, key, groups) == 5  # row 0 has two more of its group; row 3 loses its positive only


def test_duplicate_sentences() -> None:
    query, key = views(5)
    query, key = (x.detach().repeat(3, 1).requires_grad_() for x in (query, key))
    assert_same(FusedInfoNCELoss(hard_negative_mixing=HardNegativeMixing(k=4, seed=2)), query, key)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HardNegativeMixing(k=1), "k: expected"),
        (lambda: HardNegativeMixing(num_mixed=0), "num_mixed: expected"),
        (lambda: HardNegativeMixing(alpha=1.5), "alpha: expected"),
        (lambda: HardNegativeMixing(bank="all"), "bank: expected"),
        (lambda: HardNegativeMixing(bank="previous", require_k=True), 'require_k: expected False with bank="previous"'),
        (lambda: FusedInfoNCELoss(symmetric=True, positive_mixing=PositiveMixing()), "positive_mixing: expected"),
        (lambda: FusedInfoNCELoss(symmetric=True, hard_negative_mixing=HardNegativeMixing()), "hard_negative_mixing"),
    ],
)
def test_wrong_settings_are_named(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
