"""Positive mixing against the reference: every branch, the gradients, and the search over weights."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import hicl_fast.functional as HF
from hicl_fast import reference
from hicl_fast.ops.common.unit_rows import UnitRows
from hicl_fast.ops.positive_mixing import operator as op


def at_cosine(cosine: float, length: float) -> Tensor:
    """A vector in the plane at a cosine with (1, 0)."""
    return length * torch.tensor([cosine, math.sqrt(1 - cosine**2)], dtype=torch.float64)


def draw(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of every branch: positives and negatives about as similar to their queries, some of them not at all."""
    generator = torch.Generator().manual_seed(seed)
    query, *noise = torch.randn(3, n, d, generator=generator, dtype=torch.float64)
    sign = torch.where(torch.rand(n, 1, generator=generator) < 0.2, -1.0, 1.0)
    length = 0.1 + 5 * torch.rand(2, n, 1, generator=generator, dtype=torch.float64)
    return query, length[0] * (sign * query + 0.6 * noise[0]), length[1] * (query + 0.7 * noise[1])


P, N = 2.0, 3.0  # the lengths of positive and negative


@pytest.mark.parametrize(
    ("d1", "d2", "share_p", "share_n"),
    [
        (0.80, 0.75, 1.0, 0.1),  # within the threshold
        (0.80, 0.71, 1.0, 0.0),  # farther apart than the threshold
        (0.80, -0.5, 1.0, 0.0),
        (0.60, 0.80, 0.6 / 1.4, 0.8 / 1.4),  # behind the negative
        (0.70, 0.70, 0.5, 0.5),  # equal
        (1e-7, 2e-7, 1.0, 0.0),  # both so small that their ratio says nothing
        (-0.1, 0.80, 1.0, 0.0),  # negative similarities
        (-0.2, -0.1, 1.0, 0.0),
        (-0.1, -0.2, 1.0, 0.0),  # here (d1 − d2) / d1 is below the threshold, being negative
        (0.0, -0.2, 1.0, 0.0),
    ],
)
def test_every_branch(d1: float, d2: float, share_p: float, share_n: float) -> None:
    query, p, n = at_cosine(1.0, 5.0)[None], at_cosine(d1, P)[None], at_cosine(d2, N)[None]
    if d1 == d2:
        n = p * 2  # to the last bit
    torch.testing.assert_close(HF.positive_mixing(query, p, n), share_p * p + share_n * n)
    torch.testing.assert_close(reference.positive_mixing(query, p, n), share_p * p + share_n * n)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", [(1.0, 0.1), (0.3, 1.7)])
@pytest.mark.parametrize(("n", "d"), [(1, 3), (40, 7), (64, 33)])
def test_values_and_gradients(n: int, d: int, weights: tuple[float, float], dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in draw(n, d)]
    upstream = torch.linspace(-1, 2, n * d, dtype=torch.float64).reshape(n, d)
    results = []
    for function, cast in ((HF.positive_mixing, dtype), (reference.positive_mixing, torch.float64)):
        q, p, h = (x.to(cast, copy=True).requires_grad_() for x in inputs)
        mixed = function(q, p, h, weights=weights)
        mixed.backward(upstream.to(mixed.dtype))
        assert q.grad is None  # the coefficients are constants
        results.append((mixed.detach(), p.grad, h.grad))
    for got, exact in zip(*results, strict=True):
        assert got.dtype == dtype
        assert (got.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * (1 + exact.abs().max().item())


def test_the_draw_has_every_branch() -> None:
    query, p, n = draw(40, 7)
    plain = (HF.positive_mixing(query, p, n) == p).all(dim=1)
    within = ~plain & (HF.positive_mixing(query, p, n, threshold=0.0) == p).all(dim=1)
    assert plain.sum() >= 5 and within.sum() >= 3 and (~plain & ~within).sum() >= 5


@pytest.mark.parametrize("threshold", [0.0, 0.5, 3.0])
def test_threshold(threshold: float) -> None:
    query, p, n = draw(60, 5)
    torch.testing.assert_close(
        HF.positive_mixing(query, p, n, threshold=threshold),
        reference.positive_mixing(query, p, n, threshold=threshold),
    )


def test_mixed_types_and_strides() -> None:
    query, p, n = draw(20, 8)
    query, p, n = query.float()[:, ::2], p.half()[:, ::2], n.T.contiguous().T[:, ::2]
    mixed = HF.positive_mixing(query, p, n)
    assert mixed.dtype == torch.float16
    exact = reference.positive_mixing(query.double(), p.double(), n)
    torch.testing.assert_close(mixed.double(), exact, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("weights", [(1.0, 0.1), "search"])
def test_zero_rows(weights: Any) -> None:
    query, p, n = draw(6, 4)
    query[0], p[1], n[2] = 0, 0, 0
    torch.testing.assert_close(
        HF.positive_mixing(query, p, n, weights=weights), reference.positive_mixing(query, p, n, weights=weights)
    )


# --- the search ------------------------------------------------------------------------------------------------------


def rank_and_margin(query: Tensor, p: Tensor, n: Tensor, others: Tensor, w: tuple[float, float]) -> tuple[float, float]:
    """Mean rank of p' among p' and the negatives n and ``others`` (N, C, D), and mean margin over n."""
    unit = reference.normalise(query)
    similarity = (unit * reference.normalise(w[0] * p + w[1] * n)).sum(dim=1)
    hardest = (unit * reference.normalise(n)).sum(dim=1)
    negatives = torch.cat((hardest[:, None], torch.einsum("nd,ncd->nc", unit, reference.normalise(others))), dim=1)
    rank = 1 + (negatives >= similarity[:, None]).sum(dim=1)
    return rank.double().mean().item(), (similarity - hardest).mean().item()


@pytest.mark.parametrize("seed", range(4))
def test_search_finds_the_lowest_mean_rank_over_all_negatives(seed: int) -> None:
    """Every point of the grid, ranked among a hundred negatives: the hardest alone would do, and does."""
    generator = torch.Generator().manual_seed(seed)
    query, p, n = (x[:200] for x in draw(200, 12, seed))
    d1, d2 = ((reference.normalise(query) * reference.normalise(x)).sum(dim=1) for x in (p, n))
    within = (d1 > 0) & (d1 > d2) & ((d1 - d2) / d1 <= 0.1)
    assert within.sum() >= 5
    query, p, n = query[within], p[within], n[within]
    others = torch.randn(len(query), 100, 12, generator=generator, dtype=torch.float64)
    others = torch.where(
        (torch.einsum("nd,ncd->nc", reference.normalise(query), reference.normalise(others)) < d2[within, None])[..., None],
        others, torch.zeros(()),
    )  # fmt: skip

    units = (UnitRows.of(x, x.dtype) for x in (p, n))
    chosen = op._search(d1[within], d2[within], *units, torch.ones_like(d1[within]).bool())
    w1, w2 = (float(w) for w in chosen)
    assert any(math.isclose(w1 * 10, a) for a in range(21)) and any(math.isclose(w2 * 10, b) for b in range(21))
    rank, margin = rank_and_margin(query, p, n, others, (w1, w2))
    scores = [rank_and_margin(query, p, n, others, (a / 10, b / 10)) for a in range(21) for b in range(21) if a or b]
    lowest = min(score[0] for score in scores)
    assert lowest == rank == 1.0
    assert margin == pytest.approx(max(score[1] for score in scores if score[0] == lowest), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("n", [1, 30, 200])
def test_search_agrees_with_the_reference(n: int, dtype: torch.dtype) -> None:
    query, p, hard = draw(n, 12, seed=n)
    mixed = HF.positive_mixing(query.to(dtype), p.to(dtype), hard.to(dtype), weights="search")
    exact = reference.positive_mixing(query, p, hard, weights="search")
    torch.testing.assert_close(mixed.double(), exact, rtol=1e-5, atol=1e-5)


def test_search_with_no_row_to_mix_leaves_the_rest_alone() -> None:
    query = torch.randn(5, 4)
    torch.testing.assert_close(HF.positive_mixing(query, query, -query, weights="search"), query)


def test_candidates_are_the_directions_of_the_grid() -> None:
    candidates = op.CANDIDATES
    angles = {round(math.atan2(b, a), 9) for a, b in candidates}
    assert len(angles) == len(candidates)
    assert angles == {round(math.atan2(b, a), 9) for a in range(21) for b in range(21) if a or b}
    assert {(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, 0.1)} <= set(candidates)


@settings(max_examples=30)
@given(n=st.integers(1, 20), d=st.integers(2, 20), seed=st.integers(0, 1 << 20), scale=st.floats(0.1, 10))
def test_search_never_puts_a_positive_behind_its_hardest_negative(n: int, d: int, seed: int, scale: float) -> None:
    """Nor does the length of the queries, or one factor on all vectors, change what is chosen."""
    query, p, hard = draw(n, d, seed)
    mixed = HF.positive_mixing(query, p, hard, weights="search")
    unit = reference.normalise(query)
    d1, d2, after = ((unit * reference.normalise(x)).sum(dim=1) for x in (p, hard, mixed))
    was_ahead = d1 > d2 + 1e-9
    assert (after[was_ahead] > d2[was_ahead]).all()
    again = HF.positive_mixing(query * scale, p * scale, hard * scale, weights="search")
    torch.testing.assert_close(again, mixed * scale)


@pytest.mark.parametrize("weights", [(1.0, 0.1), "search"])
def test_compiled(weights: Any) -> None:
    query, p, n = draw(20, 8)
    p.requires_grad_()
    compiled = torch.compile(lambda *a: HF.positive_mixing(*a, weights=weights), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, p, n), HF.positive_mixing(query, p, n, weights=weights))
    compiled(query, p, n).sum().backward()
    assert p.grad is not None and p.grad.any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query: .*list"),
        ({"positive": torch.randn(4, 2)}, ValueError, r"positive: expected shape \(4, 3\), as query has"),
        ({"negative": torch.randn(5, 3)}, ValueError, r"negative: expected shape \(4, 3\)"),
        ({"negative": torch.zeros(4, 3).long()}, TypeError, "negative: expected float64"),
        ({"negative": torch.randn(4, 3, device="meta")}, ValueError, "negative: expected a tensor on cpu"),
        ({"threshold": -0.1}, ValueError, "threshold: expected a number of at least 0, got -0.1"),
        ({"threshold": "low"}, TypeError, "threshold: expected a number"),
        ({"weights": "best"}, ValueError, "weights: expected a pair of finite numbers or 'search', got 'best'"),
        ({"weights": (1.0,)}, ValueError, "weights: expected a pair"),
        ({"weights": (1.0, math.nan)}, ValueError, "weights: expected a pair"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"query": torch.randn(4, 3), "positive": torch.randn(4, 3), "negative": torch.randn(4, 3)}
    with pytest.raises(error, match=message):
        HF.positive_mixing(**{**arguments, **change})  # type: ignore[arg-type]
