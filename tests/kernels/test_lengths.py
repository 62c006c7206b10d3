"""The Triton kernels on rows of every length that float32 can hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.triton, pytest.mark.interpret]

from hicl_fast import functional as HF  # noqa: E402
from hicl_fast import reference  # noqa: E402
from tests.ops.test_lengths import FLOAT32_LENGTHS, OPTIONS, N, assert_right, evaluate, problem, rows  # noqa: E402


@pytest.mark.parametrize("case", ["all columns", "symmetric", "rows"])
@pytest.mark.parametrize("temperature", [0.1, 0.01])  # one sweep, and two
def test_info_nce(case: str, temperature: float) -> None:
    inputs, options = problem({**OPTIONS[case], "temperature": temperature}, FLOAT32_LENGTHS, 1)
    expected = evaluate(reference.info_nce, {k: x.double() for k, x in inputs.items()}, **options)
    assert_right(evaluate(HF.info_nce, inputs, backend="triton", **options), expected, inputs, 1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_mixing(alpha: float) -> None:
    pairs = HF.random_pairs(N, 6, 4, seed=1)
    inputs = {"query": rows(N, 0, FLOAT32_LENGTHS), "bank": rows(N, 5, (1.0, 1e20, 1e38, 1.5e39, 1e-13, 30.0))}
    index = torch.stack([torch.arange(i, i + 4) % N for i in range(N)])
    options: dict[str, Any] = {"index": index, "pairs": pairs, "alpha": alpha}

    def exact(query: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        return reference.mixed_negative_logits(query, bank, **options)

    leaves = {k: x.double().requires_grad_() for k, x in inputs.items()}
    mine = {k: x.clone().requires_grad_() for k, x in inputs.items()}
    expected, got = exact(**leaves), HF.mixed_negative_logits(**mine, **options, backend="triton")
    expected.sum().backward()
    got.sum().backward()
    gradients = [{k: x.grad for k, x in y.items() if x.grad is not None} for y in (mine, leaves)]
    assert_right((got.detach(), gradients[0]), (expected.detach(), gradients[1]), inputs, 2e-5)


def test_hard_negatives() -> None:
    query, key = rows(N, 0, FLOAT32_LENGTHS[:7]), rows(40, 3, FLOAT32_LENGTHS[:7])
    similarity, index = HF.hard_negatives(query, key, 5, backend="triton")
    expected, at = reference.hard_negatives(query.double(), key.double(), 5)
    torch.testing.assert_close(similarity.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(index, at)


@pytest.mark.parametrize("place", ["query", "key", "negatives", "bank", "extra_logits"])
def test_what_is_not_finite_shows(place: str) -> None:
    generator = torch.Generator().manual_seed(3)
    for value in (torch.nan, torch.inf, -torch.inf):
        if (place, value) == ("extra_logits", -torch.inf):
            continue
        tensors = {name: torch.randn(5, 4, generator=generator) for name in ("query", "key", place)}
        tensors[place][3] = torch.tensor([value, 1.0, 1.0, 1.0])
        for symmetric in (False, True):
            assert HF.info_nce(**tensors, symmetric=symmetric, backend="triton").isnan(), (value, symmetric)
