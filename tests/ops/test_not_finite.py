"""NaN or Inf in an input gives NaN, wherever it is; of extra logits −inf is none: it leaves the column out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hicl_fast
from hicl_fast import functional as HF
from hicl_fast import reference

CPU_BACKENDS = [s.name for s in hicl_fast.backends() if s.available and s.name in ("cpp", "torch")]
N, D = 5, 4
PAIRS = HF.random_pairs(N, 6, 2, seed=1)
GROUPS = {"query_group": torch.tensor([0, 1, 1, 2, 3]), "key_group": torch.tensor([0, 1, 1, 2, 3])}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "symmetric": {"symmetric": True},
    "mixing": {"mixing": HF.Mixing(2, PAIRS, 0.5)},
    "excluded": {**GROUPS, "same_group": "exclude"},
    "positives": {**GROUPS, "same_group": "positive"},
    "margin": {"margin": 0.1},
    "own weight": {"hard_negative_weight": 0.5},
}
PLACES = ("query", "key", "negatives", "bank", "extra_logits")
VALUES = (torch.nan, torch.inf, -torch.inf)
OBJECTIVES = ("info_nce", "arccon", "mpt", "met", "mat", "custom", "mhe", "mhs", "vicreg", "barlow_twins")


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = {name: torch.randn(N, D, generator=generator) for name in PLACES}
    made["key"] = made["query"] + 0.1 * made["key"]
    return {name: x.to(dtype) for name, x in made.items()}


def spoiled(x: Tensor, value: float, alone: bool) -> Tensor:
    """With the value in one row: beside ones of one sign, which makes it the largest or the least, or beside zeros."""
    x = x.clone()
    x[3] = 0.0 if alone else 1.0
    x[3, 1] = value
    return x


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "reference"])
@pytest.mark.parametrize("case", OPTIONS)
def test_info_nce(case: str, backend: str) -> None:
    options = OPTIONS[case]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for place in PLACES:
            needed = {"query", "key", place} | ({"negatives"} if "hard_negative_weight" in options else set())
            for value in VALUES:
                if (place, value) == ("extra_logits", -torch.inf):
                    continue
                for alone in (False, True):
                    tensors = {name: x for name, x in inputs(dtype).items() if name in needed}
                    tensors[place] = spoiled(tensors[place], value, alone)
                    if backend == "reference":
                        if "mixing" in options:
                            return
                        assert reference.info_nce(**tensors, **options).isnan(), (place, value, alone)
                        continue
                    for reduction in ("mean", "none"):
                        loss = HF.info_nce(**tensors, **options, reduction=reduction, backend=backend)
                        assert loss.isnan().any(), (place, value, alone, dtype, reduction)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_row_that_would_look_left_out(backend: str) -> None:
    query, key = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    for row in ([-torch.inf, 1.0], [-torch.inf, -torch.inf], [torch.inf, 1.0]):
        assert HF.info_nce(query, key, bank=torch.tensor([row]), backend=backend).isnan()


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "reference"])
def test_an_extra_logit_of_minus_infinity_is_no_column(backend: str) -> None:
    tensors = inputs()
    tensors["extra_logits"][:, 1] = -torch.inf
    tensors["extra_logits"][2] = -torch.inf
    finite = tensors["extra_logits"].masked_fill(tensors["extra_logits"] == -torch.inf, -1e4)
    function = reference.info_nce if backend == "reference" else HF.info_nce
    options = {} if backend == "reference" else {"backend": backend}
    logits = tensors.pop("extra_logits").requires_grad_()
    loss = function(**tensors, extra_logits=logits, **options)
    torch.testing.assert_close(loss, function(**tensors, extra_logits=finite, **options))
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad[logits == -torch.inf] == 0).all() and not logits.grad.isnan().any()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_paradigm(backend: str) -> None:
    for objective in OBJECTIVES:
        modifiable = objective in ("mhe", "mhs", "vicreg", "barlow_twins")
        for modified in ((), ("gd", "w", "r")) if modifiable else ((),):
            for value in VALUES:
                for place in ("query", "key"):
                    tensors = inputs()
                    tensors[place] = spoiled(tensors[place], value, False)
                    options = {"modified": modified, "backend": backend}
                    loss = HF.paradigm(tensors["query"], tensors["key"], objective, **options)  # type: ignore[arg-type]
                    assert loss.isnan(), (objective, modified, value, place)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_parts(backend: str) -> None:
    for value in VALUES:
        tensors = inputs()
        key = spoiled(tensors["key"], value, False)
        similarity, index = HF.hard_negatives(tensors["query"][:3], key, 2, backend=backend)
        assert similarity[:, 0].isnan().all() and (index[:, 0] == 3).all()
        chosen = torch.tensor([[3, 1]] * N)
        logits = HF.mixed_negative_logits(tensors["query"], key, chosen, PAIRS % 2, backend=backend)
        has_it = (PAIRS == 0).any(dim=2)
        assert torch.equal(logits.isnan(), has_it) and has_it.any()
        mixed = HF.positive_mixing(tensors["query"], tensors["key"], key)
        assert not mixed[3].isfinite().all() and mixed[0].isfinite().all()
