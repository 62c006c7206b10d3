"""sentence-transformers' losses between three real processes: the original's numbers, and those of unequal processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("sentence_transformers")

from hicl_fast.integrations import sentence_transformers as fused  # noqa: E402
from hicl_fast.integrations.sentence_transformers import drop_ins  # noqa: E402
from tests.distributed.cluster import Cluster, RankError  # noqa: E402

pytestmark = pytest.mark.slow  # each process imports sentence-transformers

SIZE = 3
EQUAL, UNEQUAL = (3, 3, 3), (4, 1, 2)
FOUR = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
GIST = {"margin_strategy": "absolute", "margin": 0.05, "temperature": 0.1, "contrast_positives": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ranking": ("MultipleNegativesRankingLoss", {}),
    "all directions": ("MultipleNegativesRankingLoss", {"directions": FOUR}),
    "both ways": (
        "MultipleNegativesRankingLoss",
        {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    ),
    "hardness": ("MultipleNegativesRankingLoss", {"hardness_mode": "all_negatives", "hardness_strength": 3.0}),
    "cached": ("CachedMultipleNegativesRankingLoss", {}),
    "GIST": ("GISTEmbedLoss", {**GIST, "contrast_anchors": False}),
    "cached GIST": ("CachedGISTEmbedLoss", {**GIST, "contrast_anchors": False}),
    "cached GIST, anchors": ("CachedGISTEmbedLoss", {**GIST, "contrast_anchors": True}),
}


def columns(counts: tuple[int, ...], rank: int | None = None) -> list[Tensor]:
    """Anchors, positives and negatives of a process, or of all of them."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(sum(counts), 8, generator=generator, dtype=torch.float64)
    noise = torch.randn(3, sum(counts), 8, generator=generator, dtype=torch.float64)
    found = [base + x for x in noise]
    return found if rank is None else [x.split(counts)[rank] for x in found]


def gradients(name: str, options: dict[str, Any], embeddings: list[Tensor], gather: bool, fuse: bool) -> list[Tensor]:
    """The loss of given embeddings, and their gradients. The guide is the student's own beginning."""
    cls = getattr(fused, f"Fused{name}") if fuse else getattr(drop_ins.original, name)
    guides = [x[:, :5].float() for x in embeddings]
    leaves = [x.clone().requires_grad_() for x in embeddings]
    if "GIST" not in name:
        loss = cls([None], gather_across_devices=gather, **options)  # a model that nobody calls
    else:
        loss = cls.__new__(cls)
        torch.nn.Module.__init__(loss)
        given = {"gather_across_devices": gather, "mini_batch_size": 2, "show_progress_bar": False} | options
        for option, value in {**given, "must_retokenize": False}.items():
            setattr(loss, option, value)
        loss.similarity_fct = torch.nn.CosineSimilarity(dim=-1)
        loss.cross_entropy_loss = torch.nn.CrossEntropyLoss()
        loss.model = lambda feature: {"sentence_embedding": leaves[feature["column"]]}
        loss.guide = lambda feature: {"sentence_embedding": guides[feature["column"]]}
    if name == "GISTEmbedLoss":
        value = loss([{"column": i} for i in range(len(leaves))], None)
    elif name == "CachedGISTEmbedLoss":
        value = loss.calculate_loss([[x] for x in leaves], [[x] for x in guides])
    elif name == "CachedMultipleNegativesRankingLoss":
        value = loss.calculate_loss([[x] for x in leaves])
    else:
        value = loss.compute_loss_from_embeddings(leaves, None)
    value.backward()
    return [value.detach(), *(x.grad for x in leaves)]


def on_rank(rank: int, size: int, case: str, counts: tuple[int, ...], fuse: bool) -> list[Tensor]:
    name, options = CASES[case]
    return gradients(name, options, columns(counts, rank), gather=True, fuse=fuse)


@pytest.mark.parametrize("case", CASES)
def test_equal_processes_have_the_originals_numbers(clusters: Callable[[int], Cluster], case: str) -> None:
    mine, theirs = (clusters(SIZE).run(on_rank, case, EQUAL, fuse) for fuse in (True, False))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("case", [case for case in CASES if case != "cached GIST, anchors"])
def test_unequal_processes_have_the_joined_batch(clusters: Callable[[int], Cluster], case: str) -> None:
    """The mean over the processes, which data parallelism takes, is the joined batch's."""
    name, options = CASES[case]
    loss, *whole = gradients(name, options, columns(UNEQUAL), gather=False, fuse=False)
    ranks = clusters(SIZE).run(on_rank, case, UNEQUAL, True)
    torch.testing.assert_close(torch.stack([found[0] for found in ranks]).mean(), loss)
    for column, expected in enumerate(whole):
        got = torch.cat([found[1 + column] for found in ranks]) / SIZE
        torch.testing.assert_close(got, expected)


def with_another_similarity(rank: int, size: int, counts: tuple[int, ...]) -> list[Tensor]:
    options = {"similarity_fct": drop_ins.util.euclidean_sim}
    return gradients("MultipleNegativesRankingLoss", options, columns(counts, rank), gather=True, fuse=True)


def with_a_column_less(rank: int, size: int) -> list[Tensor]:
    own = columns(EQUAL, rank)[: 3 if rank else 2]
    return gradients("MultipleNegativesRankingLoss", {}, own, gather=True, fuse=True)


def test_what_cannot_be_joined_is_refused_by_all(clusters: Callable[[int], Cluster]) -> None:
    cluster = clusters(SIZE)
    assert len(cluster.run(with_another_similarity, EQUAL)) == SIZE
    with pytest.raises(RankError, match="gather_across_devices: expected as many rows on every process") as refused:
        cluster.run(with_another_similarity, UNEQUAL)
    assert str(refused.value).count("got 4, 1, 2") == SIZE
    with pytest.raises(RankError, match="gather: expected the same on every rank") as refused:
        cluster.run(with_a_column_less)
    assert "tensor(" not in str(refused.value)
