"""InfoNCE with mixtures of hard negatives, in one pass or several, against the float64 reference given its choices."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hicl_fast
import hicl_fast.functional as HF
from hicl_fast import reference
from hicl_fast.ops.info_nce import cpp as cpp_info_nce

BACKENDS = [s.name for s in hicl_fast.backends() if s.available and s.name != "triton"]
Inputs = dict[str, Tensor]
Options = dict[str, Any]

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def draw(n: int, m: int, d: int, seed: int = 0) -> Inputs:
    """Float64 inputs whose gradients are all asked for."""
    generator = torch.Generator().manual_seed(seed + 31 * n + m)
    query = torch.randn(n, d, generator=generator, dtype=torch.float64)
    key = torch.randn(m, d, generator=generator, dtype=torch.float64) * 3
    key[:n] += query
    return {"query": query, "key": key, "temperature": torch.tensor(0.2, dtype=torch.float64)}


def evaluate(loss: Callable[..., Tensor], inputs: Inputs, options: Options, upstream: float = 1.0) -> list[Tensor]:
    """The loss and the gradient of every input."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    value = loss(**leaves, **options)
    return [value.detach(), *torch.autograd.grad((value * upstream).sum(), list(leaves.values()))]


def oracle(index: Tensor, mixing: HF.Mixing) -> Callable[..., Tensor]:
    """The reference's loss with mixtures of the given hard negatives."""

    def loss(
        query: Tensor, key: Tensor, temperature: Tensor, extra_logits: Tensor | None = None, **rest: Any
    ) -> Tensor:
        mixed = reference.mixed_negative_logits(
            query, key, index, mixing.pairs, alpha=mixing.alpha, temperature=temperature
        )
        extra = mixed if extra_logits is None else torch.cat([extra_logits, mixed], dim=1)
        return reference.info_nce(query, key, temperature=temperature, extra_logits=extra, **rest)

    return loss


def check(
    backend: str,
    inputs: Inputs,
    k: int,
    num_mixed: int = 12,
    *,
    alpha: float = 0.3,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Tensor:
    """Loss and gradients agree with the reference; returns the hard negatives."""
    typed = {name: x.to(dtype) if name != "temperature" else x for name, x in inputs.items()}
    mixing = HF.Mixing(k, HF.random_pairs(len(typed["query"]), num_mixed, max(2, k), seed=3) % k, alpha)
    index = HF.info_nce_with_statistics(**typed, **options, mixing=mixing, backend=backend).hard_negatives
    fused = lambda **a: HF.info_nce(**a, mixing=mixing, backend=backend)  # noqa: E731
    got = evaluate(fused, typed, options, upstream=1.5)
    exact = evaluate(oracle(index, mixing), {k: x.double() for k, x in typed.items()}, options, upstream=1.5)
    eager = evaluate(oracle(index, mixing), typed, options, upstream=1.5)
    for name, ours, plain, right in zip(["loss", *typed], got, eager, exact, strict=True):
        scale = right.abs().max().clamp_min(1e-12 if right.dim() else 1.0)  # a lone sum may cancel
        error, plain_error = ((x.double() - right).abs().max() / scale for x in (ours, plain))
        sums = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        assert error <= 4 * plain_error + 8 * torch.finfo(dtype).eps + 200 * sums, name
    return index


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("n", "m", "d", "k"), [(2, 2, 7, 1), (5, 9, 16, 3), (19, 19, 33, 10), (70, 131, 40, 17)], ids=str
)
def test_types_and_sizes(backend: str, n: int, m: int, d: int, k: int, dtype: torch.dtype) -> None:
    inputs = draw(n, m, d)
    index = check(backend, inputs, k, dtype=dtype)
    if dtype == torch.float64:
        assert torch.equal(index, reference.hard_negatives(inputs["query"], inputs["key"], k)[1])


@pytest.mark.parametrize("n", [63, 64, 65, 127, 128, 129])
def test_across_the_edges_of_tiles(backend: str, n: int) -> None:
    check(backend, draw(n, n, 20), 10, dtype=torch.float32)


@pytest.mark.parametrize("same_group", ["exclude", "negative", "positive"])
@pytest.mark.parametrize("with_more_columns", [False, True])
def test_beside_every_other_option(backend: str, same_group: str, with_more_columns: bool) -> None:
    n, m, d = 21, 30, 12
    inputs = draw(n, m, d)
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, m, (n,), generator=generator)
    group = torch.randint(0, 6, (m,), generator=generator)
    options: Options = {"query_group": group[target], "key_group": group, "same_group": same_group}
    options |= {"target": target, "margin": 0.1, "reduction": "sum"}
    if with_more_columns:
        inputs["negatives"] = torch.randn(n, d, generator=generator, dtype=torch.float64)
        inputs["extra_logits"] = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        options |= {"hard_negative_weight": 0.7, "bank": torch.randn(8, d, generator=generator, dtype=torch.float64)}
        options |= {"bank_group": torch.randint(0, 6, (8,), generator=generator)}
    index = check(backend, inputs, 5, **options)
    assert not (index == target[:, None]).any()
    if same_group != "negative":
        assert not (group[index] == group[target][:, None]).any()


def test_a_loss_per_row(backend: str) -> None:
    check(backend, draw(9, 9, 8), 4, reduction="none")


@pytest.mark.parametrize("length", [0.0, 1e-13, 1e-5, 1e5])
def test_short_long_and_zero_rows(backend: str, length: float) -> None:
    """A key's gradient by way of a mixture is that of the key as it is, not of its unit vector."""
    inputs = draw(8, 8, 6)
    inputs["key"][5] *= length
    inputs["query"][2] *= 0 if length == 0 else 1
    index = check(backend, inputs, 7)
    assert (index == 5).sum() == 7


@pytest.mark.parametrize(("alpha", "order"), [(0.1, 1), (0.5, 11), (0.9, 11)])
def test_keys_of_very_different_lengths(backend: str, alpha: float, order: int) -> None:
    """Each key's gradient is right by its own measure: one of a short key, mixed with a long one, is the larger."""
    inputs = draw(12, 12, 16)
    inputs["key"] *= torch.logspace(-8, 8, 12, dtype=torch.float64)[torch.arange(12) * order % 12][:, None]
    typed = {name: x.float() for name, x in inputs.items() if name != "temperature"}
    mixing = HF.Mixing(11, HF.random_pairs(12, 40, 11, seed=1), alpha)
    index = HF.info_nce_with_statistics(**typed, mixing=mixing, backend=backend).hard_negatives
    temperature = torch.tensor(0.01, dtype=torch.float64)  # keys that get nothing but by way of their mixtures

    def of_keys(loss: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        leaves = {name: x.to(dtype) for name, x in typed.items()} | {"temperature": temperature}
        return evaluate(loss, leaves, {})[2].double()

    fused = of_keys(lambda **x: HF.info_nce(**x, mixing=mixing, backend=backend), torch.float32)
    eager = of_keys(oracle(index, mixing), torch.float32)
    exact = of_keys(oracle(index, mixing), torch.float64)
    error, eager_error = ((x - exact).norm(dim=1) / exact.norm(dim=1) for x in (fused, eager))
    assert error.max() <= 3 * eager_error.max() + 50 * torch.finfo(torch.float32).eps


def test_mixtures_that_vanish(backend: str) -> None:
    inputs = draw(6, 8, 5)
    inputs["key"][6:] = torch.stack([inputs["key"][7], -inputs["key"][7]])
    check(backend, inputs, 7, 60, alpha=0.5)


def test_duplicates_are_taken_by_lower_index(backend: str) -> None:
    inputs = draw(10, 10, 24)
    inputs = {name: x.repeat(7, 1) if name != "temperature" else x for name, x in inputs.items()}
    index = check(backend, inputs, 5, dtype=torch.float32)
    query, key = inputs["query"].float(), inputs["key"].float()
    assert torch.equal(index, HF.hard_negatives(query, key, 5, backend=backend)[1])


@pytest.mark.parametrize("wanted", ["query", "key", "temperature"])
def test_only_one_gradient(backend: str, wanted: str) -> None:
    inputs = draw(12, 14, 9)
    mixing = HF.Mixing(4, HF.random_pairs(12, 9, 4, seed=0))
    everything = dict(
        zip(inputs, evaluate(lambda **a: HF.info_nce(**a, mixing=mixing, backend=backend), inputs, {})[1:], strict=True)
    )
    leaf = inputs[wanted].requires_grad_()
    HF.info_nce(**inputs, mixing=mixing, backend=backend).backward()
    torch.testing.assert_close(leaf.grad, everything[wanted])


def test_many_hard_negatives(backend: str) -> None:
    """So many that rows come in several blocks."""
    index = check(backend, draw(130, 140, 8), 128, 20)
    assert index.shape == (130, 128)


@given(
    n=st.integers(2, 20),
    more=st.integers(0, 9),
    d=st.integers(
        6, 24
    ),  # in a plane two of a few vectors are soon nearly opposite, and no digit of their mixture is right
    k=st.integers(1, 19),
    num_mixed=st.integers(1, 9),
    alpha=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_any_shape(backend: str, n: int, more: int, d: int, k: int, num_mixed: int, alpha: float, seed: int) -> None:
    check(backend, draw(n, n + more, d, seed), min(k, n + more - 1), num_mixed, alpha=alpha)


def test_compiled(backend: str) -> None:
    inputs = {name: x.float() for name, x in draw(8, 8, 6).items()}
    mixing = HF.Mixing(3, HF.random_pairs(8, 5, 3, seed=0))
    loss = lambda **a: HF.info_nce(**a, mixing=mixing, backend=backend)  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, expected in zip(evaluate(compiled, inputs, {}), evaluate(loss, inputs, {}), strict=True):
        torch.testing.assert_close(got, expected)


def test_fewer_candidates_than_k(backend: str) -> None:
    query, key, _ = draw(6, 6, 4).values()
    pairs = HF.random_pairs(6, 3, 2, seed=0)
    with pytest.raises(ValueError, match=r"k: expected 1 to 5, got 6"):
        HF.info_nce(query, key, mixing=HF.Mixing(6, pairs), backend=backend)
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    with pytest.raises(ValueError, match=re.escape("row 0 has 2 outside its target and group, got k = 3")):
        HF.info_nce(query, key, query_group=group, key_group=group, mixing=HF.Mixing(3, pairs), backend=backend)


@pytest.mark.parametrize(
    ("mixing", "options", "error", "message"),
    [
        ((2, torch.zeros(6, 3, 2, dtype=torch.int64)), {"symmetric": True}, ValueError, "mixing: expected None"),
        ((2, torch.zeros(6, 3, dtype=torch.int64)), {}, ValueError, r"pairs: expected shape \(6, m, 2\)"),
        ((2, torch.zeros(6, 3, 2)), {}, TypeError, "pairs: expected an int64 tensor"),
        ((2, torch.full((6, 3, 2), 2)), {}, ValueError, "pairs: expected .* 0 to 1, got values from 2 to 2"),
        ((2, torch.zeros(6, 3, 2, dtype=torch.int64), 1.5), {}, ValueError, "alpha: expected"),
        ((2.0, torch.zeros(6, 3, 2, dtype=torch.int64)), {}, TypeError, "k: expected an integer"),
    ],
)
def test_wrong_arguments_are_named(backend: str, mixing: Any, options: Options, error: type, message: str) -> None:
    query, key, _ = draw(6, 6, 4).values()
    with pytest.raises(error, match=message):
        HF.info_nce(query, key, mixing=HF.Mixing(*mixing), backend=backend, **options)


def test_one_sweep_does_it_all(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken apart where a backend can't, in one pass where it can: nothing else tells the two apart but time."""
    if backend != "cpp":
        pytest.skip("only cpp has the one pass")
    query, key, _ = draw(40, 40, 32).values()
    mixing = HF.Mixing(6, HF.random_pairs(40, 9, 6, seed=1))
    calls: list[str] = []
    monkeypatch.setattr("hicl_fast.ops.hard_negatives.operator.apply", lambda *a: calls.append("selection"))
    together = evaluate(lambda **a: HF.info_nce(**a, mixing=mixing, backend=backend), {"query": query, "key": key}, {})
    assert calls == []
    monkeypatch.undo()
    monkeypatch.setattr(cpp_info_nce, "MIXES_WHILE_SWEEPING", False)
    apart = evaluate(lambda **a: HF.info_nce(**a, mixing=mixing, backend=backend), {"query": query, "key": key}, {})
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_comparison_can_fail(backend: str) -> None:
    """Mixtures with another share are found out."""
    inputs = draw(9, 9, 8)
    pairs = HF.random_pairs(9, 5, 3, seed=0)
    right, wrong = HF.Mixing(3, pairs, 0.5), HF.Mixing(3, pairs, 0.501)
    index = HF.info_nce_with_statistics(**inputs, mixing=right, backend=backend).hard_negatives
    exact = evaluate(oracle(index, right), inputs, {})
    got = evaluate(lambda **a: HF.info_nce(**a, mixing=wrong, backend=backend), inputs, {})
    assert all(((a - b).norm() / b.norm()) > 1e-6 for a, b in zip(got, exact, strict=True))
