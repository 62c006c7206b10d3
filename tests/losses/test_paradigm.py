"""The paradigm as a module, and what it logs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hicl_fast.functional as HF
from hicl_fast import GradientParadigmLoss
from hicl_fast.analysis import gradient_terms
from hicl_fast.ops.paradigm.settings import MODIFIABLE, OBJECTIVES


def views() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(11, 6, generator=generator)
    return u, u + 0.5 * torch.randn(11, 6, generator=generator)


def test_its_options_reach_the_function() -> None:
    u, v = views()
    options = {"modified": ("r", "gd"), "margin": 0.8, "strength": 0.5, "ratio": 1.5, "temperature": 0.1}
    loss = GradientParadigmLoss("barlow_twins", **options)  # type: ignore[arg-type]
    torch.testing.assert_close(loss(u, v), HF.paradigm(u, v, "barlow_twins", **options))  # type: ignore[arg-type]
    options = {"dissipation": None, "weight": ("power", 2), "ratio": "mat"}
    loss = GradientParadigmLoss("custom", **options)  # type: ignore[arg-type]
    torch.testing.assert_close(loss(u, v), HF.paradigm(u, v, "custom", **options))  # type: ignore[arg-type]
    assert "arccon" in repr(GradientParadigmLoss("arccon"))


def test_what_is_logged() -> None:
    u, v = views()
    loss = GradientParadigmLoss("mat")
    assert loss.last == {}
    value = loss(u.requires_grad_(), v)
    assert set(loss.last) == {"loss", "positive_similarity", "hardest_negative_similarity"}
    assert not any(x.requires_grad for x in loss.last.values())
    torch.testing.assert_close(loss.last["loss"], value.detach())
    plain = GradientParadigmLoss("vicreg")
    plain(u, v)
    assert set(plain.last) == {"loss", "positive_similarity"}


def test_gradient_terms_are_logged_where_asked_for() -> None:
    u, v = views()
    loss = GradientParadigmLoss("arccon", temperature=0.2, log_gradient_terms=True)
    loss(u, v)
    for name, value in gradient_terms(u, v, "arccon", temperature=0.2)._asdict().items():
        torch.testing.assert_close(loss.last[name], value.mean())
    options = {"modified": ("gd", "r"), "margin": 0.2, "strength": 0.5, "ratio": 1.5}
    loss = GradientParadigmLoss("vicreg", **options, log_gradient_terms=True)  # type: ignore[arg-type]
    loss(u, v)
    for name, value in gradient_terms(u, v, "vicreg", **options)._asdict().items():  # type: ignore[arg-type]
        torch.testing.assert_close(loss.last[name], value.mean())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_of_one_trains(objective: str) -> None:
    """With its gradient's terms asked for, which it hasn't."""
    u, v = (x[:1].clone().requires_grad_() for x in views())
    modified = ("gd", "r") if objective in MODIFIABLE else ()
    loss = GradientParadigmLoss(objective, modified=modified, log_gradient_terms=True)  # type: ignore[arg-type]
    loss(*views())
    value = loss(u, v)
    value.backward()
    assert torch.isfinite(value) and u.grad is not None and torch.isfinite(u.grad).all()
    assert set(loss.last) == {"loss", "positive_similarity"}


def test_what_is_wrong_is_said_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="modified: expected none with 'met'"):
        GradientParadigmLoss("met", modified=("gd",))
    with pytest.raises(ValueError, match="objective: expected one of"):
        GradientParadigmLoss("simclr")  # type: ignore[arg-type]
