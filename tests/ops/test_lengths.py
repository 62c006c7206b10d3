"""Rows of every length that a type can hold: what counts is their direction, down to the floor of 1e-12."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hicl_fast
from hicl_fast import functional as HF
from hicl_fast import reference
from hicl_fast.integrations.similarity import lift, pairwise

CPU_BACKENDS = [s.name for s in hicl_fast.backends() if s.available and s.name in ("cpp", "torch")]
N, D = 10, 24
FLOAT32_LENGTHS = (
    1.0,
    3e17,
    2e19,
    1e25,
    1e38,
    1.5e39,
    1e-10,
    3e-13,
    1e-21,
    1e-30,
    1e-40,
    0.0,
)  # 1.5e39: 3e38 an element
NAMES = {"query": N, "key": N, "negatives": N, "bank": 7}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "symmetric": {"symmetric": True},
    "all columns": {"with_": ("negatives", "bank"), "hard_negative_weight": 0.5},
    "all columns, symmetric": {"with_": ("negatives", "bank"), "symmetric": True},
    "margin": {"margin": 0.2},
    "rows": {"with_": ("negatives",), "reduction": "none"},
}
PARADIGM: dict[str, dict[str, Any]] = {
    **{name: {"objective": name} for name in ("info_nce", "arccon", "mpt", "met", "mat", "custom", "mhe", "mhs")},
    **{f"{name}-w": {"objective": name, "modified": ("w", "r")} for name in ("vicreg", "barlow_twins")},
    **{name: {"objective": name} for name in ("vicreg", "barlow_twins")},
}


def rows(count: int, seed: int, lengths: tuple[float, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """(count, D) random directions, of the lengths in turn from one that the seed chooses."""
    x = torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = (x / x.abs().amax(dim=1, keepdim=True)) * (math.sqrt(D) / 2) ** -1
    of_row = torch.tensor([lengths[(i * 5 + seed) % len(lengths)] for i in range(count)], dtype=torch.float64)
    return (x * of_row[:, None].clamp_max(torch.finfo(dtype).max / x.abs().max())).to(dtype)


def evaluate(
    loss: Callable[..., Tensor], inputs: dict[str, Tensor], **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: x.detach().clone().requires_grad_(name != "bank") for name, x in inputs.items()}
    value = loss(**leaves, **options)
    value.sum().backward()
    return value.detach(), {name: x.grad for name, x in leaves.items() if x.grad is not None}


def assert_right(
    got: tuple[Tensor, dict[str, Tensor]],
    expected: tuple[Tensor, dict[str, Tensor]],
    inputs: dict[str, Tensor],
    rtol: float,
) -> None:
    torch.testing.assert_close(got[0].double(), expected[0].double(), rtol=rtol, atol=rtol)
    assert got[1].keys() == expected[1].keys() and got[1]
    for name, gradient in expected[1].items():
        mine, x = got[1][name], inputs[name]
        # Where a gradient is smaller than normal numbers, it has their spacing; where its terms cancel, theirs.
        spacing = torch.finfo(mine.dtype).smallest_normal * torch.finfo(mine.dtype).eps
        of_terms = 0.1 / x.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
        allowed = rtol * (gradient.double().abs().amax(dim=1, keepdim=True) + of_terms) + 8 * spacing
        excess = ((mine.double() - gradient.double()).abs() / allowed).amax(dim=1)
        assert (excess <= 1).all(), (name, excess, x.double().norm(dim=1))


def problem(options: dict[str, Any], lengths: tuple[float, ...], seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    options = dict(options)
    names = ("query", "key", *options.pop("with_", ()))
    return {name: rows(NAMES[name], seed + i, lengths) for i, name in enumerate(names)}, options


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("case", OPTIONS)
def test_info_nce(case: str, backend: str) -> None:
    for seed in range(3):
        inputs, options = problem(OPTIONS[case], FLOAT32_LENGTHS, seed)
        expected = evaluate(reference.info_nce, {k: x.double() for k, x in inputs.items()}, **options)
        assert_right(evaluate(HF.info_nce, inputs, backend=backend, **options), expected, inputs, 2e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_mixing(seed: int, alpha: float, backend: str) -> None:
    """In one sweep, and as operators of their own."""
    pairs, tau = HF.random_pairs(N, 6, 4, seed=1), {"temperature": 0.1}
    inputs = {"query": rows(N, seed, FLOAT32_LENGTHS), "key": rows(N, seed + 5, (1.0, 1e20, 1e38, 1.5e39, 1e-13, 30.0))}
    _, index = HF.hard_negatives(**inputs, k=4, backend=backend)

    def exact(query: Tensor, key: Tensor) -> Tensor:
        logits = reference.mixed_negative_logits(query, key, index, pairs, alpha=alpha, **tau)
        return reference.info_nce(query, key, extra_logits=logits, **tau)

    def apart(query: Tensor, key: Tensor) -> Tensor:
        logits = HF.mixed_negative_logits(query, key, index, pairs, alpha=alpha, backend=backend, **tau)
        return HF.info_nce(query, key, extra_logits=logits, backend=backend, **tau)

    expected = evaluate(exact, {k: x.double() for k, x in inputs.items()})
    fused = evaluate(HF.info_nce, inputs, mixing=HF.Mixing(4, pairs, alpha), backend=backend, **tau)
    assert_right(fused, expected, inputs, 2e-5)
    assert_right(evaluate(apart, inputs), expected, inputs, 2e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("case", PARADIGM)
def test_paradigm(case: str, backend: str) -> None:
    for seed in range(2):
        # Rows of no direction are hard to rank: every similarity to them is 0 in float32.
        inputs = {"u": rows(N, seed, FLOAT32_LENGTHS[:7]), "v": rows(N, seed + 1, FLOAT32_LENGTHS[:7])}
        expected = evaluate(reference.paradigm, {k: x.double() for k, x in inputs.items()}, **PARADIGM[case])
        assert_right(evaluate(HF.paradigm, inputs, backend=backend, **PARADIGM[case]), expected, inputs, 5e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_hard_negatives(backend: str) -> None:
    query, key = rows(N, 0, FLOAT32_LENGTHS[:7]), rows(40, 3, FLOAT32_LENGTHS[:7])
    similarity, index = HF.hard_negatives(query, key, 5, backend=backend)
    expected, at = reference.hard_negatives(query.double(), key.double(), 5)
    torch.testing.assert_close(similarity.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(index, at)


@pytest.mark.parametrize("weights", [(1.0, 0.1), "search"])
def test_positive_mixing(weights: Any) -> None:
    for length in (1.0, 1e20, 1e37, 1e-9):
        q, n = rows(N, 1, (length,)), rows(N, 2, (1.0, 1e20, 1e-20))
        p = 0.1 * q + rows(N, 3, (length,))
        got = HF.positive_mixing(q, p, n, threshold=2.0, weights=weights)
        expected = reference.positive_mixing(q.double(), p.double(), n.double(), threshold=2.0, weights=weights)
        scale = expected.abs().amax(dim=1, keepdim=True)
        torch.testing.assert_close(got.double() / scale, expected / scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_segment_pool(backend: str) -> None:
    segments, weights = rows(N, 0, (3e38, 1e30, 1.0)), torch.arange(3.0, 3.0 + N)
    offsets = torch.tensor([0, 3, 4, 9, N])
    pooled = HF.segment_pool(segments, offsets, weights, backend=backend)
    expected = reference.segment_pool(segments.double(), offsets, weights.double())
    torch.testing.assert_close(pooled.double(), expected, rtol=1e-5, atol=0.0)


def test_dot_products_and_pairs() -> None:
    """Where the products themselves can be held."""
    query, key = rows(N, 0, (1e17, 1.0)), rows(N, 1, (1e20, 3.0))
    lifted = lift(query, key)
    cosine = F.cosine_similarity(lifted.query.double()[:, None], lifted.key.double()[None], dim=2)
    exact = query.double() @ key.double().T
    largest = float(query.double().norm(dim=1).max() * key.double().norm(dim=1).max())
    torch.testing.assert_close(cosine * lifted.factor.double() / largest, exact / largest, rtol=0.0, atol=1e-6)
    long, tiny = rows(N, 2, (1e30, 1e38)), rows(N, 3, (1e-3, 1e20))
    exact_pairs = F.cosine_similarity(long.double(), tiny.double(), dim=1)
    torch.testing.assert_close(pairwise(long, tiny, "cosine").double(), exact_pairs, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("power", [600, 900, -700])
@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "reference"])
def test_float64(backend: str, power: int) -> None:
    """A power of two changes no direction: the loss stays as it is, and gradients are divided by it."""
    inputs, options = problem(OPTIONS["all columns"], (1.0, 5.0), 0)
    inputs = {k: x.double() for k, x in inputs.items()}
    every_other = torch.tensor([1.0, 0.0] * (N // 2), dtype=torch.float64)[:, None]
    if power > 0:
        factors = {k: 2.0 ** (power * every_other[: len(x)]) for k, x in inputs.items()}
        loss, gradients = evaluate(reference.info_nce, inputs, **options)
        expected = loss, {k: g / factors[k] for k, g in gradients.items()}
    else:  # below the floor rows are divided by it: as if they were that much longer, and still below it
        factors = {k: 2.0 ** ((power + 60) * every_other[: len(x)]) * 2.0**-60 for k, x in inputs.items()}
        _, gradients = evaluate(reference.info_nce, {k: x * 2.0**-60 for k, x in inputs.items()}, **options)
        loss, _ = evaluate(reference.info_nce, {k: x * factors[k] for k, x in inputs.items()}, **options)
        expected = loss, {}
    rescaled = {k: x * factors[k] for k, x in inputs.items()}
    got = (
        evaluate(reference.info_nce, rescaled, **options)
        if backend == "reference"
        else evaluate(HF.info_nce, rescaled, backend=backend, **options)
    )
    torch.testing.assert_close(got[0], expected[0], rtol=1e-13, atol=0.0)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name] * factors[name], gradient * factors[name], rtol=1e-11, atol=1e-13)
