"""The drop-ins against the installed pytorch-metric-learning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pml = pytest.importorskip("pytorch_metric_learning")

from pytorch_metric_learning import distances, losses, miners, reducers, regularizers  # noqa: E402
from pytorch_metric_learning.utils import distributed  # noqa: E402
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu  # noqa: E402

from hicl_fast.integrations import pytorch_metric_learning as fused  # noqa: E402
from tests.distributed.cluster import Cluster, RankError  # noqa: E402
from tests.integrations.conftest import Largest  # noqa: E402

NAMES = ["NTXentLoss", "SupConLoss"]
DISTANCES: dict[str, Any] = {
    "cosine": distances.CosineSimilarity,
    "dot, normalised": distances.DotProductSimilarity,
    "dot": lambda: distances.DotProductSimilarity(normalize_embeddings=False),
}
LABELS = torch.tensor([0, 3, 0, 1, 3, 0, 2, 7, 3])  # 2 and 7 have no positive among themselves


def embeddings(n: int = len(LABELS), d: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def evaluate(loss: Any, inputs: list[Tensor], *args: Any, **kw: Any) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    if len(leaves) == 2:
        kw["ref_emb"] = leaves[1]
    value = loss(leaves[0], *args, **kw)
    (value * 1.3).sum().backward()
    return [value.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]


def assert_same(mine: list[Tensor], theirs: list[Tensor]) -> None:
    for got, expected in zip(mine, theirs, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected)


def pair(name: str, **options: Any) -> list[Any]:
    return [getattr(module, name)(**options) for module in (fused, losses)]


@pytest.fixture
def never_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused losses may not fall back; the originals, made of the same parents, may."""

    def refuse(*_: Any) -> None:
        raise AssertionError("fell back to the original")

    monkeypatch.setattr(fused, "_as_tuple", refuse)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_labels(name: str, temperature: float, distance: str, never_the_original: None) -> None:
    mine, theirs = pair(name, temperature=temperature, distance=DISTANCES[distance]())
    assert_same(evaluate(mine, [embeddings()], LABELS), evaluate(theirs, [embeddings()], LABELS))
    inputs, ref_labels = [embeddings(), embeddings(5, seed=1)], torch.tensor([3, 0, 0, 9, 2])
    options = {"ref_labels": ref_labels}
    assert_same(evaluate(mine, inputs, LABELS, **options), evaluate(theirs, inputs, LABELS, **options))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "labels",
    [[0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 1, 2], [0, 0, 1, 1], [5, -2, 5, -2]],
    ids=["no positive", "no negative", "one pair", "pairs", "any integers"],
)
def test_few_pairs(name: str, labels: list[int], never_the_original: None) -> None:
    mine, theirs = pair(name)
    x = embeddings(4).requires_grad_()
    torch.testing.assert_close(mine(x, torch.tensor(labels)), theirs(x, torch.tensor(labels)))


@pytest.mark.parametrize("name", NAMES)
def test_positives_far_apart(name: str, never_the_original: None) -> None:
    """One positive is like the row, the other opposite, the negative at a right angle: 100 temperatures from each.

    Seen from the first positive the negative is too small for float32; seen from the second it is all of the loss.
    """
    x = torch.eye(4, dtype=torch.float64)
    x[1], x[2] = x[0], -x[0]
    mine, theirs = pair(name, temperature=0.01)
    labels = torch.tensor([0, 0, 0, 1])
    exact = evaluate(theirs, [x], labels)
    assert_same(evaluate(mine, [x], labels), exact)
    # The original in float32 stops at a loss of 87.
    assert_same(evaluate(mine, [x.float()], labels), [y.float() for y in exact])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "reducer", ["MeanReducer", "AvgNonZeroReducer", "SumReducer", "PerAnchorReducer", "ThresholdReducer"]
)
def test_reducers(name: str, reducer: str) -> None:
    if reducer == "PerAnchorReducer" and name == "SupConLoss":
        pytest.skip("for losses of pairs")
    made = getattr(reducers, reducer)(**({"low": 0.1} if reducer == "ThresholdReducer" else {}))
    mine, theirs = pair(name, reducer=made, embedding_regularizer=regularizers.LpRegularizer())
    assert_same(evaluate(mine, [embeddings()], LABELS), evaluate(theirs, [embeddings()], LABELS))
    dictionaries = [
        loss.compute_loss(embeddings(), LABELS, None, embeddings(), LABELS)["loss"] for loss in (mine, theirs)
    ]
    for key in ("losses", "indices", "reduction_type"):
        assert type(dictionaries[0][key]) is type(dictionaries[1][key])
    for got, expected in zip(dictionaries[0]["indices"], dictionaries[1]["indices"], strict=True):
        assert torch.equal(got, expected), "pairs in the original's order"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options", [{"distance": distances.LpDistance()}, {"distance": distances.CosineSimilarity(power=2)}]
)
def test_what_falls_back(name: str, options: dict[str, Any]) -> None:
    mine, theirs = pair(name, **options)
    assert fused._problem(mine, embeddings(), LABELS, None, embeddings(), LABELS) is None
    assert_same(evaluate(mine, [embeddings()], LABELS), evaluate(theirs, [embeddings()], LABELS))
    mined = miners.MultiSimilarityMiner()(embeddings(), LABELS)
    assert fused._problem(mine, embeddings(), LABELS, mined, embeddings(), LABELS) is None
    assert_same(evaluate(mine, [embeddings()], LABELS, mined), evaluate(theirs, [embeddings()], LABELS, mined))


NOBODY = torch.empty(0, dtype=torch.int64)
TRIPLETS = tuple(torch.tensor(x) for x in ([0, 0, 0, 2, 4], [2, 2, 5, 5, 8], [1, 1, 3, 6, 7]))  # one of them twice
PAIRS = tuple(
    torch.tensor(x) for x in ([0, 1, 4, 8], [2, 4, 8, 1], [0, 0, 8, 6, 3], [1, 7, 2, 0, 5])
)  # 1, 4: positives alone


@pytest.mark.parametrize("distance", [*DISTANCES.values(), distances.LpDistance])
@pytest.mark.parametrize("indices", [TRIPLETS, PAIRS, (*PAIRS[:2], NOBODY, NOBODY), (NOBODY, NOBODY, *PAIRS[2:])])
def test_given_pairs(indices: tuple[Tensor, ...], distance: Any) -> None:
    mine, theirs = pair("NTXentLoss", distance=distance(), temperature=0.3)
    for ref in ([], [embeddings(seed=1)]):
        inputs = [embeddings(), *ref]
        kw = {"ref_labels": LABELS} if ref else {}
        assert_same(*(evaluate(loss, inputs, LABELS, indices, **kw) for loss in (mine, theirs)))


@pytest.mark.parametrize("name", NAMES)
def test_given_pairs_in_half_precision(name: str) -> None:
    """All pairs written down have the losses of labels alone, to the last place of float16."""
    mine, x = getattr(fused, name)(temperature=0.07), embeddings(dtype=torch.float16)
    written = lmu.get_all_pairs_indices(LABELS)
    by_labels, by_pairs = (
        mine.compute_loss(x, LABELS, pairs, x, LABELS)["loss"]["losses"] for pairs in (None, written)
    )
    assert by_pairs.dtype == torch.float16
    torch.testing.assert_close(by_pairs, by_labels, rtol=torch.finfo(torch.float16).eps, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_given_pairs_under_autocast(name: str) -> None:
    """They keep the digits that labels alone keep, whose losses are rounded to bfloat16."""
    mine, x = getattr(fused, name)(temperature=0.07), embeddings(dtype=torch.float32)
    written = lmu.get_all_pairs_indices(LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        by_labels, by_pairs = (
            mine.compute_loss(x, LABELS, pairs, x, LABELS)["loss"]["losses"] for pairs in (None, written)
        )
    torch.testing.assert_close(by_pairs.float(), by_labels.float(), rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)


def test_given_pairs_are_not_multiplied() -> None:
    """A miner that gives all 288 triplets of 12 rows."""
    labels = torch.arange(12) // 4
    x = embeddings(12)
    triplets = miners.TripletMarginMiner(margin=10.0)(x, labels)
    assert len(triplets[0]) == 288
    sizes = []
    for loss in pair("NTXentLoss"):
        with Largest() as mode:
            evaluate(loss, [x], labels, triplets)
        sizes.append(mode.elements)
    assert sizes[1] >= 288**2, "the count misses what it should find"
    assert sizes[0] <= 288


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_self_supervised(name: str, symmetric: bool) -> None:
    mine, theirs = (losses.SelfSupervisedLoss(loss, symmetric=symmetric) for loss in pair(name))
    inputs = [embeddings(), embeddings(seed=1)]
    assert_same(evaluate(mine, inputs), evaluate(theirs, inputs))


@pytest.mark.parametrize("own_memory", [True, False])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_memory(name: str, mask: bool, own_memory: bool) -> None:
    """Batches that fill the memory and go round it, in the fused memory and in the original one."""
    mine = (fused if own_memory else losses).CrossBatchMemory(getattr(fused, name)(), 6, memory_size=20)
    theirs = losses.CrossBatchMemory(getattr(losses, name)(), 6, memory_size=20)
    for step in range(5):
        enqueue = torch.arange(9) % 3 == 0 if mask else None
        x = embeddings(seed=step)
        assert_same(
            evaluate(mine, [x], LABELS, enqueue_mask=enqueue), evaluate(theirs, [x], LABELS, enqueue_mask=enqueue)
        )
    assert torch.equal(mine.embedding_memory, theirs.embedding_memory)


def test_memory_with_a_miner_or_another_distance() -> None:
    for options in ({"miner": miners.MultiSimilarityMiner()}, {"distance": distances.LpDistance()}):
        distance = {"distance": options.pop("distance")} if "distance" in options else {}
        mine = fused.CrossBatchMemory(fused.NTXentLoss(**distance), 6, memory_size=20, **options)
        theirs = losses.CrossBatchMemory(losses.NTXentLoss(**distance), 6, memory_size=20, **options)
        for step in range(3):
            x = embeddings(seed=step)
            assert_same(evaluate(mine, [x], LABELS), evaluate(theirs, [x], LABELS))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_types(name: str, dtype: torch.dtype) -> None:
    mine, theirs = (evaluate(loss, [embeddings(dtype=dtype)], LABELS) for loss in pair(name, temperature=0.2))
    exact = evaluate(getattr(losses, name)(temperature=0.2), [embeddings(dtype=dtype).double()], LABELS)
    for got, plain, expected in zip(mine, theirs, exact, strict=True):
        assert got.dtype == plain.dtype
        error, allowed = ((x.double() - expected).norm() for x in (got, plain))
        assert error <= 2 * allowed + 8 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("name", NAMES)
def test_no_matrix(name: str) -> None:
    n = 200
    labels = torch.arange(n) // 2
    sizes = []
    for loss in pair(name):
        with Largest() as mode:
            evaluate(loss, [embeddings(n, 4, dtype=torch.float32)], labels)
        sizes.append(mode.elements)
    assert sizes[1] >= n * n, "the count misses what it should find"
    assert sizes[0] < n * n / 2


def test_configuration() -> None:
    for name in NAMES:
        mine, theirs = pair(name, temperature=0.3)
        assert isinstance(mine, getattr(losses, name)) and mine.temperature == theirs.temperature
        assert type(mine.reducer) is type(theirs.reducer) and type(mine.distance) is type(theirs.distance)


@pytest.mark.parametrize("given", [False, True], ids=["labels", "pairs"])
@pytest.mark.parametrize(("dtype", "shape"), [(torch.float64, ()), (torch.float32, (1,))], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", NAMES)
def test_a_learned_temperature(
    name: str, distance: str, dtype: torch.dtype, shape: tuple[int, ...], given: bool
) -> None:
    pairs = lmu.get_all_pairs_indices(LABELS) if given else None
    results = []
    for module in (fused, losses):
        temperature = torch.nn.Parameter(torch.full(shape, 0.3, dtype=dtype))
        loss = getattr(module, name)(temperature=temperature, distance=DISTANCES[distance]())
        found = evaluate(loss, [embeddings()], LABELS, pairs)
        assert list(loss.state_dict()) == ["temperature"]
        results.append([*found, temperature.grad])
    assert_same(*results)


def test_a_temperature_that_cannot_be() -> None:
    for name in NAMES:
        for bad in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match="temperature: expected a (number above 0|finite number)"):
                getattr(fused, name)(temperature=bad)
        with pytest.raises(TypeError, match="temperature: expected a number"):
            getattr(fused, name)(temperature="0.1")
        with pytest.raises(
            ValueError, match="temperature: expected a number or a tensor of one, got a tensor of shape"
        ):
            getattr(fused, name)(temperature=torch.ones(3))


# --- many processes --------------------------------------------------------------------------------------------------

WRAPPED: dict[str, Any] = {
    "NTXentLoss": lambda module: module.NTXentLoss(0.3),
    "SupConLoss": lambda module: module.SupConLoss(0.3),
    "CrossBatchMemory": lambda module: module.CrossBatchMemory(module.NTXentLoss(0.3), 6, memory_size=20),
}


def wrapped_on_rank(
    rank: int, size: int, name: str, counts: tuple[int, ...], fuse: bool, efficient: bool
) -> list[Tensor]:
    """Two steps of a wrapper, so that a memory has something in it."""
    wrapper = fused.DistributedLossWrapper if fuse else distributed.DistributedLossWrapper
    loss = wrapper(WRAPPED[name](fused if fuse else losses), efficient=efficient)
    found = []
    for seed in (0, 1):
        found += evaluate(loss, [embeddings(seed=seed).split(counts)[rank]], LABELS.split(counts)[rank])
    return found


@pytest.mark.parametrize("name", WRAPPED)
def test_equal_processes(clusters: Callable[[int], Cluster], name: str) -> None:
    """Their memories are filled in another order on each, as the original's."""
    for efficient in (False, True)[: 1 if name == "CrossBatchMemory" else 2]:
        mine, theirs = (clusters(3).run(wrapped_on_rank, name, (3, 3, 3), fuse, efficient) for fuse in (True, False))
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", WRAPPED)
def test_unequal_processes(clusters: Callable[[int], Cluster], name: str) -> None:
    counts = (5, 1, 3)
    loss = WRAPPED[name](losses)
    ranks = clusters(3).run(wrapped_on_rank, name, counts, True, False)
    for step in (0, 1):
        value, gradient = evaluate(loss, [embeddings(seed=step)], LABELS)
        torch.testing.assert_close(torch.cat([found[2 * step + 1] for found in ranks]) / 3, gradient)
        for found in ranks:
            torch.testing.assert_close(found[2 * step] / 3, value)
    with pytest.raises(RankError, match="efficient: expected as many embeddings on every process.*got 5, 1, 3"):
        clusters(3).run(wrapped_on_rank, "NTXentLoss", counts, True, True)
