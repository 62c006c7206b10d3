"""The rules of InfoNCE's columns on a GPU, on every backend that has them, against the float64 reference on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hicl_fast.functional as HF
from hicl_fast import reference
from tests.gpu.device import DEVICE, SANITIZED_BACKENDS
from tests.ops import rules
from tests.ops.rules import Case, draw, fused, relative_error, typed

pytestmark = pytest.mark.gpu

# As few as meet every kernel: each of them is compiled for it.
CASES: dict[str, tuple[str, set[str]]] = {
    "plain rows": ("log_sum_exp", set()),
    "limit and relations": ("info_nce", {"limit", "relations", "hard negatives"}),
    "every rule": (
        "log_sum_exp",
        {"limit", "relations", "hard keys", "hard bank", "own negatives' weight", "target", "hard own negatives"},
    ),
    "both ways": ("info_nce", {"symmetric", "relations", "hard keys"}),
    "several positives": ("info_nce", {"groups", "positives", "margin of false negatives"}),
    "several targets": ("info_nce", {"several targets", "limit", "relations", "own negatives"}),
    "own alone": ("info_nce", {"own negatives", "no batch", "rows"}),
}


def run(operator: Any, case: Case, device: str) -> list[Tensor]:
    """What it gives, and the gradient of every input, on the CPU."""
    placed = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in case.items()}
    leaves = {name: placed[name].clone().requires_grad_() for name in rules.DIFFERENTIABLE if name in case}
    outputs = operator(placed | leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs[:2])
    weights = torch.linspace(0.5, 1.5, rules.N, device=device)
    total = sum((x * weights.to(x.dtype) if x.dim() else x).sum() for x in outputs)
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return [x.detach().cpu() for x in (*outputs, *gradients)]


@pytest.mark.parametrize("backend", SANITIZED_BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_exact(name, backend, monkeypatch)


def assert_exact(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At sizes that cross a tile's edge."""
    for size, value in {"N": 131, "M": 150, "P": 131, "B": 140, "D": 40, "H": 300}.items():
        monkeypatch.setattr(rules, size, value)
    monkeypatch.setattr(rules, "NEAR", 1e-6)  # among so many cosines none is as far from a limit as in a small case
    operator, names = CASES[name]
    case = typed(draw(names), torch.float32)
    exact = run(lambda c: getattr(reference, operator)(**c), typed(case, torch.float64), "cpu")
    got = run(lambda c: fused(getattr(HF, operator), c, backend=backend, precision="float32"), case, DEVICE)
    for found, expected in zip(got, exact, strict=True):
        assert found.dtype in (torch.float32, torch.float64)  # the temperature's gradient is in its type
        assert relative_error(found, expected) < 1e-4
