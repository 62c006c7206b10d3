"""The learned temperature: its bound, and its way back from it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import hicl_fast.functional as HF
from hicl_fast import FusedInfoNCELoss
from hicl_fast.losses.temperature import Temperature

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


def batch() -> tuple[Tensor, Tensor]:
    """Pairs of which some are further apart than others are from each other: a low temperature is too sure of itself."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(32, 8, generator=generator) + 0.5
    return query, query + 0.9 * torch.randn(32, 8, generator=generator)


def clip_trained(initial: float, optimizer: Optimizer, steps: int, bound: float) -> list[float]:
    """open_clip's way: the parameter is clamped after each step."""
    query, key = batch()
    log_scale = nn.Parameter(torch.tensor(-math.log(initial)))
    step = optimizer([log_scale])
    losses = []
    for _ in range(steps):
        loss = HF.info_nce(query, key, temperature=(-log_scale).exp())
        step.zero_grad()
        loss.backward()
        step.step()
        with torch.no_grad():
            log_scale.clamp_(max=bound)
        losses.append(loss.item())
    return losses


def trained(loss_fn: FusedInfoNCELoss, optimizer: Optimizer, steps: int, sign: float = 1.0) -> list[float]:
    query, key = batch()
    step = optimizer(list(loss_fn.parameters()))
    losses = []
    for _ in range(steps):
        loss = loss_fn(query, key)
        step.zero_grad()
        (sign * loss).backward()
        step.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
        lambda parameters: torch.optim.AdamW(parameters, 0.05, weight_decay=0.0),
    ],
    ids=["SGD", "AdamW"],
)
def test_from_beyond_the_bound_it_learns_as_clip_does(optimizer: Optimizer) -> None:
    loss_fn = FusedInfoNCELoss(0.0099, learnable_temperature=True)
    losses = trained(loss_fn, optimizer, 60)
    assert losses[-1] < 0.5 * losses[0]
    assert losses == pytest.approx(clip_trained(0.0099, optimizer, 60, -math.log(0.0099)), rel=1e-4)


def test_a_long_stay_at_the_bound_is_no_hindrance() -> None:
    """A hundred steps that ask for more, and the next ones that don't: at once, whatever the optimizer has heaped up."""
    loss_fn = FusedInfoNCELoss(0.011, learnable_temperature=True)

    def optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, 0.05)

    trained(loss_fn, optimizer, 100, sign=-1.0)
    assert 1 / loss_fn.temperature().item() == pytest.approx(100, rel=1e-5)
    trained(loss_fn, optimizer, 10)
    assert 1 / loss_fn.temperature().item() < 75


def test_the_bound_is_an_argument() -> None:
    def largest(initial: float, **bound: float | None) -> float:
        temperature = Temperature(initial, True, **bound)
        with torch.no_grad():
            temperature.log_scale.fill_(9.0)
        return 1 / temperature().item()

    assert largest(0.07) == pytest.approx(100)
    assert largest(0.07, max_logit_scale=30.0) == pytest.approx(30)
    assert largest(0.07, max_logit_scale=None) == pytest.approx(math.exp(9), rel=1e-5)
    assert largest(0.005) == pytest.approx(200), "a first value beyond it is kept to"
    assert 1 / Temperature(0.005, True)().item() == pytest.approx(200)
    for wrong in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="max_logit_scale: expected a (number above 0|finite number)"):
            FusedInfoNCELoss(learnable_temperature=True, max_logit_scale=wrong)
    with pytest.raises(TypeError, match="max_logit_scale: expected a number"):
        FusedInfoNCELoss(learnable_temperature=True, max_logit_scale="100")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_logit_scale: expected none without learnable_temperature"):
        FusedInfoNCELoss(max_logit_scale=50.0)
    FusedInfoNCELoss(max_logit_scale=None)


@pytest.mark.parametrize("mode", ["evaluation", "loaded", "functional"])
def test_beyond_the_bound_the_gradient_is_that_at_the_bound(mode: str) -> None:
    """Also where the parameter is not the module's to change."""
    query, key = batch()
    loss_fn = FusedInfoNCELoss(learnable_temperature=True)
    state = {"temperature.log_scale": torch.tensor(6.0, requires_grad=True)}
    if mode == "functional":
        torch.func.functional_call(loss_fn, state, (query, key)).backward()
        held, gradient = state["temperature.log_scale"], state["temperature.log_scale"].grad
    else:
        loss_fn.load_state_dict(state)
        loss_fn.train(mode == "loaded")
        loss_fn(query, key).backward()
        held, gradient = loss_fn.temperature.log_scale, loss_fn.temperature.log_scale.grad
    at_bound = torch.tensor(math.log(100.0), requires_grad=True)
    HF.info_nce(query, key, temperature=(-at_bound).exp()).backward()
    torch.testing.assert_close(gradient, at_bound.grad, rtol=1e-4, atol=0.0)
    assert held.item() == pytest.approx(math.log(100.0) if mode == "loaded" else 6.0)


def test_two_calls_before_one_backward_pass_and_a_term_of_the_parameter() -> None:
    """The parameter is put back without a trace in autograd's record of it."""
    query, key = batch()
    loss_fn = FusedInfoNCELoss(learnable_temperature=True)
    log_scale = loss_fn.temperature.log_scale
    with torch.no_grad():
        log_scale.fill_(5.0)
    (loss_fn(query, key) + log_scale.square() + loss_fn(key, query)).backward()
    assert log_scale.grad is not None and log_scale.grad.isfinite()


def test_compiled_and_copied() -> None:
    query, key = batch()
    loss_fn = FusedInfoNCELoss(learnable_temperature=True)
    with torch.no_grad():
        loss_fn.temperature.log_scale.fill_(6.0)
    other = copy.deepcopy(loss_fn)
    step = torch.compile(lambda module, q, k: module(q, k), backend="aot_eager", fullgraph=True)
    loss, compiled = loss_fn(query, key), step(other, query, key)
    torch.testing.assert_close(compiled, loss)
    loss.backward()
    compiled.backward()
    for module in (loss_fn, other):
        assert module.temperature.log_scale.item() == pytest.approx(math.log(100.0))
    torch.testing.assert_close(other.temperature.log_scale.grad, loss_fn.temperature.log_scale.grad)
