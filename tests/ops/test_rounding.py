"""Digits that are not to be lost where a type is changed or two gradients are added."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hicl_fast
from hicl_fast import functional as HF
from hicl_fast import reference

CPU_BACKENDS = [s.name for s in hicl_fast.backends() if s.available and s.name in ("cpp", "torch")]


def gradients(loss: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss(*leaves, **options).sum().backward()
    return [x.grad for x in leaves if x.grad is not None]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_float64_with_a_float32_temperature(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, bank = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    temperature = torch.tensor(0.07, dtype=torch.float32, requires_grad=True)
    for inputs, extra in (((query, key), {}), ((query.float(), key.float()), {"bank": bank})):
        loss = HF.info_nce(*inputs, temperature=temperature, backend=backend, **extra)
        exact = temperature.detach().double().requires_grad_()
        doubles = [x.double() for x in inputs]
        expected = reference.info_nce(*doubles, temperature=exact, **extra)
        torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0.0)
        (of_tau,) = torch.autograd.grad(loss, temperature)
        (expected_of_tau,) = torch.autograd.grad(expected, exact)
        assert of_tau.dtype == torch.float32
        torch.testing.assert_close(of_tau, expected_of_tau.float(), rtol=2e-7, atol=0.0)
    index, pairs = torch.tensor([[1, 2]] * 6), torch.tensor([[[0, 1]]] * 6)
    logits = HF.mixed_negative_logits(query, key, index, pairs, temperature=temperature, backend=backend)
    exact_logits = reference.mixed_negative_logits(query, key, index, pairs, temperature=temperature.detach().double())
    torch.testing.assert_close(logits.detach(), exact_logits, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["both directions", "mixing"])
def test_gradients_are_added_before_they_are_rounded(case: str, dtype: torch.dtype, backend: str) -> None:
    """Of two directions, and of a row's own logits and its mixtures': each element within a rounding or two."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(24, 16, generator=generator).to(dtype)
    key = (query + torch.randn(24, 16, generator=generator)).to(dtype)
    pairs = HF.random_pairs(24, 6, 3, seed=2)

    def fused(query: Tensor, key: Tensor) -> Tensor:
        if case == "both directions":
            return HF.info_nce(query, key, bank=key.detach().flip(1), symmetric=True, backend=backend)
        return HF.info_nce(query, key, mixing=HF.Mixing(3, pairs, 0.5), reduction="none", backend=backend)

    exact = gradients(lambda q, k: fused(q, k), query.double(), key.double())
    for mine, expected in zip(gradients(fused, query, key), exact, strict=True):
        assert mine.dtype == dtype
        # float32's error beside the largest element, and one rounding of the result
        allowed = 0.75 * torch.finfo(dtype).eps * expected.abs() + 1e-5 * expected.abs().max()
        assert ((mine.double() - expected).abs() <= allowed + torch.finfo(dtype).tiny).all()
