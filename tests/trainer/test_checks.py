"""``--check_every``: quiet on right losses, and words with a size on wrong ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hicl_fast.functional as HF
from hicl_fast import reference
from hicl_fast.trainer.checks import Diverged, LossMismatch, check_finite, check_loss


def embeddings(rows: int, width: int, spread: float) -> Tensor:
    """Two views of rows that point the same way but for noise of the given size. (2 · rows, width)"""
    generator = torch.Generator().manual_seed(rows)
    first = torch.randn(rows, width, generator=generator)
    return torch.cat([first, first + spread * torch.randn(rows, width, generator=generator)])


def check(fused: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor], rows: Tensor, step: int) -> None:
    rows.requires_grad_()
    check_loss(fused(rows), rows, reference, step)


def fused(temperature: float, error: float = 0.0):
    def loss(rows: Tensor) -> Tensor:
        return HF.info_nce(*rows.chunk(2), temperature=temperature * (1 + error))

    return loss


def exact(temperature: float):
    def loss(rows: Tensor) -> Tensor:
        return reference.info_nce(*rows.chunk(2), temperature=temperature)

    return loss


@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0])
@pytest.mark.parametrize(("rows", "spread"), [(1, 1.0), (2, 0.01), (67, 0.1), (67, 5.0)])
def test_right_losses_pass(temperature: float, rows: int, spread: float) -> None:
    check(fused(temperature), exact(temperature), embeddings(rows, 48, spread), step=0)


@pytest.mark.parametrize("spread", [1.0, 5.0])
def test_wrong_temperature_is_caught(spread: float) -> None:
    with pytest.raises(
        LossMismatch, match=r"step 30: the fused loss differs from the float64 reference by \d.*rounding explains \d"
    ):
        check(fused(0.05, error=1e-3), exact(0.05), embeddings(67, 48, spread), step=30)


def test_wrong_gradient_alone_is_caught() -> None:
    def half_detached(rows: Tensor) -> Tensor:
        query, key = rows.chunk(2)
        return HF.info_nce(query, key.detach()) + 0.0 * key.sum()

    with pytest.raises(LossMismatch, match="the fused gradient differs"):
        check(half_detached, exact(0.05), embeddings(67, 48, 1.0), step=0)


def test_nan_of_the_model_is_not_the_losss_fault() -> None:
    rows = embeddings(8, 16, 1.0)
    rows[3, 3] = torch.nan
    with pytest.raises(Diverged, match="step 7: the model diverged: .* loss nan"):
        check(fused(0.05), exact(0.05), rows, step=7)


def test_nan_of_the_loss_alone_is_caught() -> None:
    def broken(rows: Tensor) -> Tensor:
        return HF.info_nce(*rows.chunk(2)) + torch.nan * rows.sum()

    with pytest.raises(LossMismatch, match="step 0: the fused loss is not finite, where the float64 reference's is"):
        check(broken, exact(0.05), embeddings(8, 16, 1.0), step=0)


def test_what_diverged_is_said() -> None:
    rows, parameters = torch.ones(4, 2), {"first": torch.ones(3), "second": torch.tensor([1.0, torch.inf, 0.0])}
    check_finite(torch.tensor(1.0), rows, parameters.items(), step=3, learning_rate=1e9)
    rows[1, 0] = torch.nan
    with pytest.raises(Diverged) as said:
        check_finite(torch.tensor(torch.nan), rows, parameters.items(), step=3, learning_rate=1e9)
    words = ("step 3", "loss is nan", "1 of 4 embeddings", "first parameter that is not finite is second", "1e+09")
    assert all(word in str(said.value) for word in words), said.value
