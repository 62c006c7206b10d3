"""The drop-ins against the installed sentence-transformers: losses, gradients, configuration, wrappers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

st = pytest.importorskip("sentence_transformers")

import hicl_fast  # noqa: E402
from hicl_fast.integrations import sentence_transformers as fused  # noqa: E402
from hicl_fast.integrations.sentence_transformers import drop_ins, gist, ranking  # noqa: E402
from tests.integrations.conftest import TEXTS  # noqa: E402

losses = drop_ins.original
util = st.util

ALL_DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 50.0},
    "symmetric": {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    "joint": {"directions": ("query_to_doc", "doc_to_query")},
    "queries": {"directions": ("query_to_doc", "query_to_query")},
    "documents": {"directions": ("query_to_doc", "doc_to_doc")},
    "all": {"directions": ALL_DIRECTIONS},
}
HARDNESS = [None, "in_batch_negatives", "hard_negatives", "all_negatives"]


def columns(num_columns: int, n: int = 7, d: int = 12, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, positives and hard negatives that are somewhat alike."""
    generator = torch.Generator().manual_seed(n)
    base = torch.randn(n, d, generator=generator, dtype=torch.float64)
    noise = [torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(num_columns)]
    return [(base + x * (0.6 + 0.2 * i)).to(dtype) for i, x in enumerate(noise)]


def evaluate(loss: Callable[[list[Tensor]], Tensor], embeddings: list[Tensor]) -> list[Tensor]:
    """The loss, and the gradient of each column for an upstream gradient that isn't one."""
    leaves = [x.detach().clone().requires_grad_() for x in embeddings]
    value = loss(leaves)
    (value * 1.7).backward()
    return [value.detach(), *(x.grad for x in leaves)]  # type: ignore[misc]


def assert_same(options: dict[str, Any], embeddings: list[Tensor], **tolerance: float) -> None:
    original = losses.MultipleNegativesRankingLoss(None, **options)
    expected = evaluate(lambda e: original.compute_loss_from_embeddings(e, None), embeddings)
    drop_in = fused.FusedMultipleNegativesRankingLoss(None, **options)
    assert drop_ins._rules(drop_in) is not None and not drop_ins._rules(drop_in).refusal(), (
        "the original would compute it"
    )
    got = evaluate(lambda e: drop_in.compute_loss_from_embeddings(e, None), embeddings)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, **tolerance)


@pytest.mark.parametrize("hardness", HARDNESS)
@pytest.mark.parametrize("num_columns", [2, 3, 4])
@pytest.mark.parametrize("case", OPTIONS)
def test_ranking(case: str, num_columns: int, hardness: str | None) -> None:
    options = {**OPTIONS[case], "hardness_mode": hardness, "hardness_strength": 4.0 if hardness else 0.0}
    assert_same(options, columns(num_columns))


@pytest.mark.parametrize("hardness", HARDNESS)
@pytest.mark.parametrize("case", ["plain", "symmetric", "joint"])
def test_dot_product(case: str, hardness: str | None) -> None:
    options = {**OPTIONS[case], "hardness_mode": hardness, "hardness_strength": 0.3 if hardness else 0.0}
    assert_same({**options, "similarity_fct": util.dot_score, "scale": 1.0}, columns(3))


def test_dot_product_of_every_direction() -> None:
    assert_same({**OPTIONS["all"], "similarity_fct": util.dot_score, "scale": 1.0}, columns(3))


@pytest.mark.parametrize("case", OPTIONS)
def test_a_batch_of_one(case: str) -> None:
    assert_same(OPTIONS[case], columns(3, n=1))
    assert_same({**OPTIONS[case], "hardness_mode": "all_negatives", "hardness_strength": 4.0}, columns(2, n=1))


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
        (torch.float16, False),
    ],
)
@pytest.mark.parametrize("case", ["plain", "symmetric", "all"])
def test_types(case: str, dtype: torch.dtype, autocast: bool) -> None:
    """The original's types, and errors against float64 that are no larger than its own but for a rounding."""
    embeddings = columns(3, dtype=dtype)
    original = losses.MultipleNegativesRankingLoss(None, **OPTIONS[case])
    drop_in = fused.FusedMultipleNegativesRankingLoss(None, **OPTIONS[case])
    exact = evaluate(lambda e: original.compute_loss_from_embeddings(e, None), [x.double() for x in embeddings])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = evaluate(lambda e: original.compute_loss_from_embeddings(e, None), embeddings)
        mine = evaluate(lambda e: drop_in.compute_loss_from_embeddings(e, None), embeddings)
    for got, plain, expected in zip(mine, theirs, exact, strict=True):
        assert got.dtype == plain.dtype
        allowed = 2 * relative_error(plain, expected) + 4 * torch.finfo(got.dtype).eps
        assert relative_error(got, expected) <= allowed


@pytest.mark.parametrize("hardness", HARDNESS)
@pytest.mark.parametrize("case", OPTIONS)
def test_small_losses_keep_their_digits(case: str, hardness: str | None) -> None:
    """Of a positive far above everything else: losses of 1e-4 to 1e-9, but where the positive is a column twice."""
    base = torch.eye(6, 16, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    embeddings = [base + 0.02 * torch.randn(6, 16, generator=generator, dtype=torch.float64) for _ in range(3)]
    embeddings[2] = embeddings[2].roll(6, dims=1)
    options = {**OPTIONS[case], "hardness_mode": hardness, "hardness_strength": 0.5 if hardness else 0.0}
    drop_in = fused.FusedMultipleNegativesRankingLoss(None, **options)

    def loss(e: list[Tensor]) -> Tensor:
        return drop_in.compute_loss_from_embeddings(e, None)

    exact = evaluate(loss, [x.float().double() for x in embeddings])
    for got, expected in zip(evaluate(loss, [x.float() for x in embeddings]), exact, strict=True):
        assert relative_error(got, expected) <= 1e-5


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            self.elements = max(self.elements, x.numel() if isinstance(x, Tensor) else 0)
        return out


@pytest.mark.parametrize("hardness", [None, "all_negatives"])
@pytest.mark.parametrize("case", OPTIONS)
def test_no_matrix_of_similarities(case: str, hardness: str | None) -> None:
    if not any(status.name == "cpp" and status.available for status in hicl_fast.backends()):
        pytest.skip("the largest block of the backend torch holds a small batch's whole matrix")
    options = {**OPTIONS[case], "hardness_mode": hardness, "hardness_strength": 4.0 if hardness else 0.0}
    n, embeddings = 200, columns(2, n=200, d=4, dtype=torch.float32)
    largest = {}
    for name, cls in (
        ("original", losses.MultipleNegativesRankingLoss),
        ("fused", fused.FusedMultipleNegativesRankingLoss),
    ):
        with Largest() as mode:
            evaluate(lambda e, cls=cls: cls(None, **options).compute_loss_from_embeddings(e, None), embeddings)
        largest[name] = mode.elements
    assert largest["original"] >= n * n, "the count misses what it should find"
    assert largest["fused"] < n * n / 2


def test_what_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the fused loss was called")

    monkeypatch.setattr(drop_ins, "ranking_loss", refuse)
    embeddings = columns(2)
    for options in (
        {"similarity_fct": util.euclidean_sim},
        {**OPTIONS["documents"], "similarity_fct": util.dot_score},
        {**OPTIONS["documents"], "scale": 100.0},
        {**OPTIONS["queries"], "scale": 100.0, "hardness_mode": "all_negatives", "hardness_strength": 1.0},
    ):
        expected = losses.MultipleNegativesRankingLoss(None, **options).compute_loss_from_embeddings(embeddings, None)
        got = fused.FusedMultipleNegativesRankingLoss(None, **options).compute_loss_from_embeddings(embeddings, None)
        assert torch.equal(got, expected)
    with pytest.raises(AssertionError, match="fused loss was called"):
        fused.FusedMultipleNegativesRankingLoss(None).compute_loss_from_embeddings(embeddings, None)
    with pytest.raises(ValueError, match="at least 2 embeddings"):
        fused.FusedMultipleNegativesRankingLoss(None).compute_loss_from_embeddings(embeddings[:1], None)


@pytest.mark.parametrize("hardness", [None, "hard_negatives", "all_negatives"])
@pytest.mark.parametrize("case", ["plain", "symmetric", "all"])
def test_gathered(case: str, hardness: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of 3 in one process: the other ranks' rows are constants around its own."""
    before, own, after = columns(3, n=5), columns(3, n=4), columns(3, n=6)
    before = [x[:4] for x in before]  # every rank has as many rows as this one, as far as its offset goes
    options = {**OPTIONS[case], "gather_across_devices": True}
    options |= {"hardness_mode": hardness, "hardness_strength": 4.0 if hardness else 0.0}

    def gather(x: Tensor) -> Tensor:
        column = next(i for i, mine in enumerate(own) if torch.equal(mine, x.detach()))
        return torch.cat([before[column], x, after[column]])

    module = sys.modules[losses.MultipleNegativesRankingLoss.__module__]
    monkeypatch.setattr(module, "all_gather_with_grad", gather)
    monkeypatch.setattr(module, "get_rank", lambda: 1)
    results = []
    for cls in (losses.MultipleNegativesRankingLoss, fused.FusedMultipleNegativesRankingLoss):
        loss = cls(None, **options)
        results.append(evaluate(lambda e, loss=loss: loss.compute_loss_from_embeddings(e, None), own))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


# --- through a model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    return st.SentenceTransformer(str(model_folder), device="cpu")  # adds mean pooling


def features(model: Any, num_columns: int = 2) -> list[dict[str, Tensor]]:
    tokenise = getattr(model, "preprocess", None) or model.tokenize
    return [dict(tokenise(TEXTS[i : i + 5])) for i in range(num_columns)]


def model_gradients(model: Any, loss: torch.nn.Module, num_columns: int = 2) -> list[Tensor]:
    """The loss and all parameters' gradients, with the same dropout each time."""
    model.zero_grad()
    model.train()
    torch.manual_seed(3)
    value = loss(features(model, num_columns), torch.zeros(5))
    value.backward()
    found = [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    assert len(found) > 10 and sum(float(g.abs().sum()) for g in found[1:]) > 0, "nothing was trained"
    return found


def assert_same_training(
    model: Any, mine: torch.nn.Module, theirs: torch.nn.Module, num_columns: int = 2, atol: float = 2e-6
) -> None:
    expected = model_gradients(model, theirs, num_columns)
    for got, wanted in zip(model_gradients(model, mine, num_columns), expected, strict=True):
        # Each entry is a float32 sum over the network: it errs by a share of the largest, not of itself.
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=max(atol, 1e-4 * float(wanted.abs().max())))


deprecated = pytest.mark.filterwarnings("ignore::DeprecationWarning")
CLASSES = [
    ("MultipleNegativesRankingLoss", {"scale": 30.0}),
    ("CachedMultipleNegativesRankingLoss", {"mini_batch_size": 2}),
    (
        "CachedMultipleNegativesRankingLoss",
        {**OPTIONS["all"], "hardness_mode": "all_negatives", "hardness_strength": 3.0},
    ),
    pytest.param("MultipleNegativesSymmetricRankingLoss", {}, marks=deprecated),
    pytest.param(
        "CachedMultipleNegativesSymmetricRankingLoss",
        {},
        marks=deprecated,
    ),
]


@pytest.mark.parametrize(("name", "options"), CLASSES)
def test_training_and_configuration(model: Any, name: str, options: dict[str, Any]) -> None:
    theirs = getattr(losses, name)(model, **options)
    mine = getattr(fused, f"Fused{name}")(model, **options)
    assert isinstance(mine, getattr(losses, name))
    assert mine.get_config_dict() == theirs.get_config_dict()
    assert mine.citation == theirs.citation
    assert_same_training(model, mine, theirs, num_columns=2 if "Symmetric" in name else 3)
    mine.scale = theirs.scale = 5.0  # attributes may be assigned
    assert_same_training(model, mine, theirs)


@pytest.mark.parametrize("cached", [False, True])
def test_matryoshka(model: Any, cached: bool) -> None:
    name = "CachedMultipleNegativesRankingLoss" if cached else "MultipleNegativesRankingLoss"
    pair = [getattr(losses, name)(model), getattr(fused, f"Fused{name}")(model)]
    theirs, mine = (losses.MatryoshkaLoss(model, loss, matryoshka_dims=[256, 64, 16]) for loss in pair)
    assert_same_training(model, mine, theirs)


def test_adaptive_layer(model: Any) -> None:
    pair = [losses.MultipleNegativesRankingLoss(model), fused.FusedMultipleNegativesRankingLoss(model)]
    theirs, mine = (losses.AdaptiveLayerLoss(model, loss, n_layers_per_step=-1) for loss in pair)
    assert_same_training(model, mine, theirs, num_columns=3)


def test_without_gradient(model: Any) -> None:
    with torch.no_grad():
        for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
            model.eval()
            theirs = getattr(losses, name)(model)(features(model), None)
            mine = getattr(fused, f"Fused{name}")(model)(features(model), None)
            torch.testing.assert_close(mine, theirs)
            assert not mine.requires_grad


@pytest.fixture
def patched() -> Iterator[None]:
    fused.patch()
    fused.patch()  # twice is once
    yield
    fused.unpatch()


def test_patch(model: Any, patched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(drop_ins, "ranking_loss", lambda *a: calls.append(a) or ranking.ranking_loss(*a))
    before = losses.MultipleNegativesRankingLoss(model), losses.CachedMultipleNegativesRankingLoss(model)
    results = [model_gradients(model, loss) for loss in before]
    assert len(calls) == 2, "patched losses are fused"
    fused.unpatch()
    for loss, got in zip(before, results, strict=True):
        for mine, theirs in zip(got, model_gradients(model, loss), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-6)
    assert len(calls) == 2, "unpatched losses are not"


# --- GIST ------------------------------------------------------------------------------------------------------------


def gist_losses(embeddings: dict[str, Tensor], **options: Any) -> list[torch.nn.Module]:
    """Original and drop-in on given embeddings: a column's features name its rows."""
    made = []
    for cls in (losses.GISTEmbedLoss, fused.FusedGISTEmbedLoss):
        loss = cls.__new__(cls)
        torch.nn.Module.__init__(loss)
        defaults = {"margin_strategy": "absolute", "margin": 0.0, "contrast_anchors": True, "contrast_positives": True}
        defaults |= {"temperature": 0.05, "gather_across_devices": False, "must_retokenize": False}
        for name, value in {**defaults, **options}.items():
            setattr(loss, name, value)
        loss.similarity_fct = torch.nn.CosineSimilarity(dim=-1)
        loss.cross_entropy_loss = torch.nn.CrossEntropyLoss()
        loss.model = lambda feature: {"sentence_embedding": embeddings[feature["name"]]}
        loss.guide = lambda feature: {"sentence_embedding": embeddings["guide " + feature["name"]].detach()}
        made.append(loss)
    return made


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("contrast", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("margin", [("absolute", 0.0), ("absolute", 0.1), ("relative", 0.05)])
@pytest.mark.parametrize("num_columns", [2, 3])
def test_gist(
    num_columns: int, margin: tuple[str, float], contrast: tuple[bool, bool], dtype: torch.dtype, monkeypatch: Any
) -> None:
    monkeypatch.setattr(gist, "CHUNK_BYTES", 400)  # several chunks
    names = ["a", "p", "n"][:num_columns]
    guides = columns(num_columns, n=9, dtype=torch.float32)
    guides[1][4] = guides[1][2]  # the same text twice: a tie, which is no false negative
    guides[0][5] = guides[1][5]  # a pair of identical texts: its own similarity to itself is a tie too
    students = columns(num_columns, n=9, d=10, dtype=dtype)
    options = {"margin_strategy": margin[0], "margin": margin[1]}
    options |= {"contrast_anchors": contrast[0], "contrast_positives": contrast[1]}
    results = []
    for which in (0, 1):

        def loss(leaves: list[Tensor], which: int = which) -> Tensor:
            embeddings = dict(zip(names, leaves, strict=True))
            embeddings |= {"guide " + name: x for name, x in zip(names, guides, strict=True)}
            return gist_losses(embeddings, **options)[which]([{"name": name} for name in names], None)

        results.append(evaluate(loss, students))
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 0.15}[dtype]
    for mine, theirs in zip(*reversed(results), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def cached_gradients(cls: Any, students: list[Tensor], guides: list[Tensor], **options: Any) -> list[Tensor]:
    """The loss of given embeddings in mini-batches of 4, and their gradients."""
    loss = cls.__new__(cls)
    torch.nn.Module.__init__(loss)
    defaults = {"mini_batch_size": 4, "show_progress_bar": False, "gather_across_devices": False, "temperature": 0.05}
    for name, value in {**defaults, **options}.items():
        setattr(loss, name, value)
    loss.similarity_fct = torch.nn.CosineSimilarity(dim=-1)
    loss.cross_entropy_loss = torch.nn.CrossEntropyLoss()
    reps = [[x.clone().requires_grad_() for x in column.split(4)] for column in students]
    value = loss.calculate_loss(reps, [list(column.split(4)) for column in guides], with_backward=True)
    assert not value.requires_grad
    return [value, *(torch.cat([x.grad for x in column]) for column in reps)]


@pytest.mark.parametrize("margin", [("absolute", 0.1), ("relative", 0.05)])
@pytest.mark.parametrize(("num_columns", "contrast"), [(2, False), (3, True), (4, True)])
def test_cached_gist(num_columns: int, contrast: bool, margin: tuple[str, float], monkeypatch: Any) -> None:
    monkeypatch.setattr(gist, "CHUNK_BYTES", 400)
    guides = columns(num_columns, n=9, dtype=torch.float32)
    guides[1][4] = guides[1][2]
    students = columns(num_columns, n=9, d=10, dtype=torch.float64)
    options = {"margin_strategy": margin[0], "margin": margin[1]}
    options |= {"contrast_anchors": contrast, "contrast_positives": contrast}
    mine, theirs = (
        cached_gradients(cls, students, guides, **options)
        for cls in (fused.FusedCachedGISTEmbedLoss, losses.CachedGISTEmbedLoss)
    )
    for got, expected in zip(mine, theirs, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected)


def test_gist_ties() -> None:
    """Copies of a text are equally similar to an anchor, which a matrix product may round apart."""
    generator = torch.Generator().manual_seed(0)
    anchor = torch.randn(61, 301, generator=generator)
    positive = torch.randn(61, 301, generator=generator)[torch.arange(61) % 7]
    guide = gist.Embeddings(anchor, positive, (), 0)
    threshold = gist._threshold(guide, gist.GistOptions(0.01, 0.0, False, False, False, torch.nn.CrossEntropyLoss()))
    exact, unit = (gist._Pairing(a, 0, b) for a, b in ((anchor, positive), (gist.unit(anchor), gist.unit(positive))))
    wanted = torch.nn.CosineSimilarity(dim=-1)(anchor[:, None], positive[None]) > threshold
    assert torch.equal(gist._above(threshold, exact, unit, slice(0, 61)), wanted)
    assert not torch.equal(unit.row @ unit.column.T > threshold, wanted), "the product alone would decide otherwise"


def test_cached_gist_through_models(model: Any) -> None:
    theirs, mine = (
        cls(model, model, mini_batch_size=3) for cls in (losses.CachedGISTEmbedLoss, fused.FusedCachedGISTEmbedLoss)
    )
    assert mine.get_config_dict() == theirs.get_config_dict()
    assert_same_training(model, mine, theirs, num_columns=3, atol=2e-5)
    theirs, mine = (losses.MatryoshkaLoss(model, loss, matryoshka_dims=[256, 64]) for loss in (theirs, mine))
    assert_same_training(model, mine, theirs, atol=2e-5)


def test_gist_through_models(model: Any) -> None:
    theirs, mine = losses.GISTEmbedLoss(model, model), fused.FusedGISTEmbedLoss(model, model)
    assert mine.citation == theirs.citation
    assert list(mine.get_config_dict()) == list(theirs.get_config_dict())
    assert_same_training(model, mine, theirs, num_columns=3, atol=2e-5)
    theirs, mine = (losses.MatryoshkaLoss(model, loss, matryoshka_dims=[256, 64]) for loss in (theirs, mine))
    assert_same_training(model, mine, theirs, atol=2e-5)
