"""Sizes that cross every edge of the blocks of ``cpp``: budgets so small that a few rows and columns are several blocks.

Run with a sanitizer by ``make sanitize``, which sees every read and write beyond a block that a result doesn't show.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hicl_fast
import hicl_fast.functional as HF
from hicl_fast import reference
from hicl_fast.ops.info_nce import cpp as cpp_info_nce

Inputs = dict[str, Tensor]
Limit = Callable[..., None]

pytestmark = pytest.mark.skipif(
    not any(s.name == "cpp" and s.available for s in hicl_fast.backends()), reason="needs the C++ extension"
)

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
# Around one, two and eight multiples of rows, and of columns.
ROWS = (2, 7, 8, 9, 17, 65)
# Blocks of one multiple, whatever the budget; of budgets that aren't a multiple of rows.
BLOCK_ROWS = (1, 13, 31)


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Limit:
    """limit("info_nce", block_bytes=...): the C++ operator is called with that budget."""

    def set_budget(name: str, **budget: int) -> None:
        operator = getattr(torch.ops.hicl_fast_cpp, name)
        limited: Any = functools.partial(getattr(operator, "default", operator), **budget)
        monkeypatch.setattr(torch.ops.hicl_fast_cpp, name, limited)
        if name == "info_nce":
            monkeypatch.setattr(cpp_info_nce, "_operator", lambda: limited)

    return set_budget


def draw(*sizes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 31 * sum(sizes))
    return torch.randn(sizes, generator=generator, dtype=torch.float64)


def pair(n: int, m: int, d: int) -> Inputs:
    query, key = draw(n, d), draw(m, d, seed=1)
    key[: min(n, m)] += query[:m]
    return {"query": query, "key": key}


def evaluate(loss: Callable[..., Tensor], inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """The loss and the gradient of every input."""
    leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    value = loss(**leaves)
    return [value.detach(), *torch.autograd.grad((value * draw(*value.shape).to(dtype)).sum(), list(leaves.values()))]


def check(fused: Callable[..., Tensor], exact: Callable[..., Tensor], inputs: Inputs, dtype: torch.dtype) -> None:
    """As near to the float64 reference as the reference in that type is."""
    rounded = {name: x.to(dtype).double() for name, x in inputs.items()}
    got, plain = evaluate(fused, rounded, dtype), evaluate(exact, rounded, dtype)
    right = evaluate(exact, rounded, torch.float64)
    for name, ours, eager, expected in zip(["loss", *inputs], got, plain, right, strict=True):
        size = expected.abs().max().clamp_min(1e-9)
        error, eager_error = ((x.double() - expected).abs().max() / size for x in (ours, eager))
        assert error <= 4 * eager_error + 300 * torch.finfo(dtype).eps, name


def row_bytes(columns: int, dtype: torch.dtype) -> int:
    return columns * dtype.itemsize


@TYPES
@pytest.mark.parametrize("block_rows", BLOCK_ROWS)
@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce(limit: Limit, symmetric: bool, n: int, block_rows: int, dtype: torch.dtype) -> None:
    limit("info_nce", block_bytes=block_rows * row_bytes(n, dtype))
    options: dict[str, Any] = {"symmetric": symmetric, "temperature": 0.2}
    check(
        lambda **x: HF.info_nce(**x, **options, backend="cpp"),
        lambda **x: reference.info_nce(**x, **options),
        pair(n, n, 9),
        dtype,
    )


@TYPES
@pytest.mark.parametrize("block_rows", BLOCK_ROWS)
@pytest.mark.parametrize("same_group", ["exclude", "positive"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_info_nce_with_everything(
    limit: Limit, reduction: str, same_group: str, block_rows: int, dtype: torch.dtype
) -> None:
    n, m, d = 43, 70, 17
    limit("info_nce", block_bytes=block_rows * row_bytes(m + n + 5 + 3, dtype))
    target = torch.arange(n).flip(0)
    group = torch.arange(m) // 3
    options: dict[str, Any] = {"target": target, "bank": draw(5, d).to(dtype), "hard_negative_weight": 0.5}
    options |= {"query_group": group[target], "key_group": group, "same_group": same_group, "reduction": reduction}
    inputs = pair(n, m, d) | {"negatives": draw(n, d, seed=2), "extra_logits": draw(n, 3)}
    inputs["temperature"] = torch.tensor(0.3, dtype=torch.float64)
    check(
        lambda **x: HF.info_nce(**x, **options, margin=0.1, backend="cpp"),
        lambda **x: reference.info_nce(**x, **{**options, "bank": options["bank"].to(x["query"].dtype)}, margin=0.1),
        inputs,
        dtype,
    )


@TYPES
@pytest.mark.parametrize("block_rows", BLOCK_ROWS)
@pytest.mark.parametrize(("n", "m"), [(7, 7), (8, 63), (9, 64), (17, 65), (65, 193), (20, 200)], ids=str)
def test_mixing_in_the_sweep(limit: Limit, n: int, m: int, block_rows: int, dtype: torch.dtype) -> None:
    inputs, k = pair(n, m, 24), min(6, m - 1)
    inputs = {name: x.to(dtype).double() for name, x in inputs.items()}
    limit("info_nce", block_bytes=block_rows * row_bytes(max(m, 192), dtype))
    mixing = HF.Mixing(k, HF.random_pairs(n, 5, k, seed=3), 0.3)
    typed = {name: x.to(dtype) for name, x in inputs.items()}
    index = HF.info_nce_with_statistics(**typed, mixing=mixing, backend="cpp").hard_negatives
    assert torch.equal(index, HF.hard_negatives(**typed, k=k, backend="cpp")[1])

    def exact(query: Tensor, key: Tensor) -> Tensor:
        mixed = reference.mixed_negative_logits(query, key, index, mixing.pairs, alpha=0.3, temperature=0.2)
        return reference.info_nce(query, key, temperature=0.2, extra_logits=mixed)

    check(lambda **x: HF.info_nce(**x, temperature=0.2, mixing=mixing, backend="cpp"), exact, inputs, dtype)


@TYPES
@pytest.mark.parametrize("block_rows", [1, 13, 65, 193])
@pytest.mark.parametrize("m", [8, 63, 64, 65, 192, 193, 400])
@pytest.mark.parametrize("n", [1, 8, 9, 17])
def test_hard_negatives(limit: Limit, n: int, m: int, block_rows: int, dtype: torch.dtype) -> None:
    d, k = 6, 5
    limit("hard_negatives", operand_bytes=block_rows * row_bytes(d, dtype))
    query, key = (x.to(dtype) for x in pair(n, m, d).values())
    target = torch.arange(n) % m
    options: dict[str, Any] = {"target": target, "query_group": target // 2, "key_group": torch.arange(m) // 2}
    similarity, index = HF.hard_negatives(query, key, k, **options, backend="cpp")
    expected, at = reference.hard_negatives(query.double(), key.double(), k, **options)
    torch.testing.assert_close(similarity.double(), expected, rtol=0, atol=32 * torch.finfo(dtype).eps)
    assert torch.equal(index, at)


@TYPES
@pytest.mark.parametrize("rows_listed", [1, 2, 3, 100])
def test_mixed_negatives(limit: Limit, rows_listed: int, dtype: torch.dtype) -> None:
    n, m, d, k = 13, 9, 19, 4
    limit("mixed_negatives_backward", term_bytes=rows_listed * k * (k + 1) * (8 + dtype.itemsize))
    index, pairs = torch.arange(n * k).reshape(n, k) * 7 % m, HF.random_pairs(n, 6, k, seed=0)
    inputs = {"query": draw(n, d), "negatives": draw(m, d)}
    check(
        lambda **x: HF.mixed_negative_logits(*x.values(), index, pairs, temperature=0.2, backend="cpp"),
        lambda **x: reference.mixed_negative_logits(*x.values(), index, pairs, temperature=0.2),
        inputs,
        dtype,
    )


PARADIGM: dict[str, dict[str, Any]] = {
    "statistics": {"objective": "mpt"},
    "of rows and columns": {"objective": "mhs"},
    "softmax": {"objective": "met"},
    "power": {"objective": "custom", "weight": ("power", 3)},
}


@TYPES
@pytest.mark.parametrize("block_rows", BLOCK_ROWS)
@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("case", PARADIGM)
def test_paradigm(limit: Limit, case: str, n: int, block_rows: int, dtype: torch.dtype) -> None:
    bytes_of_block = block_rows * row_bytes(320, dtype)  # what 1 to 65 columns are padded to, within a factor of 4
    limit("paradigm_statistics", block_bytes=bytes_of_block)
    limit("paradigm_combine", block_bytes=bytes_of_block)
    inputs = {"u": draw(n, 9) + 1, "v": draw(n, 9) + draw(n, 9, seed=1) + 1}
    check(
        lambda **x: HF.paradigm(**x, **PARADIGM[case], backend="cpp"),
        lambda **x: reference.paradigm(**x, **PARADIGM[case]),
        inputs,
        dtype,
    )


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mpt", "mhs"])
def test_paradigm_where_its_own_budget_cuts(objective: str) -> None:
    """A block has fewer than its 1024 rows, and their number needn't be a multiple of anything."""
    u = torch.randn(33000, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    v = (u + torch.randn(33000, 8, generator=torch.Generator().manual_seed(1))).detach()
    loss = HF.paradigm(u, v, objective, backend="cpp")
    loss.backward()
    assert loss.isfinite() and u.grad is not None and u.grad.isfinite().all()


def test_a_long_bank_stays_within_the_budget() -> None:
    """Of logits: 64 rows of these would be 256 MB."""
    peak, bank = Path("/proc/self/status"), torch.randn(1_000_000, 4)
    query, key = torch.randn(64, 4, requires_grad=True), torch.randn(64, 4)
    HF.info_nce(query[:8], key, bank=bank[:8], backend="cpp")  # loads all that is to be loaded
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
    except OSError:
        pytest.skip("needs Linux's /proc/self/clear_refs")

    def kilobytes(name: str) -> int:
        return next(int(line.split()[1]) for line in peak.read_text().splitlines() if line.startswith(name))

    before = kilobytes("VmRSS")
    HF.info_nce(query, key, bank=bank, backend="cpp").backward()
    assert kilobytes("VmHWM") - before < 200_000  # with the factors of a million rows, in four vectors that grow
