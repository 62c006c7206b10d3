"""The gradient's parts of each row against the reference's matrices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hicl_fast.analysis import gradient_terms
from hicl_fast.backend import chunked_info_nce
from hicl_fast.reference import normalise
from hicl_fast.reference.paradigm import pair_statistics, paradigm_terms

CASES: dict[str, dict[str, Any]] = {name: {"objective": name} for name in ("info_nce", "arccon", "mpt", "met", "mat")}
CASES |= {
    "power": {"objective": "custom", "weight": ("power", 3), "dissipation": 0.4, "ratio": "met"},
    "uniform": {"objective": "custom", "weight": "uniform", "ratio": lambda rows: 1 + rows.positive},
    "hardest": {"objective": "custom", "weight": "hardest", "dissipation": None},
    "function": {"objective": "custom", "weight": lambda s, rows: (s - rows.hardest[:, None]).exp()},
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked_info_nce.CHUNK_BYTES, "cpu", 4096)


@pytest.mark.parametrize("case", CASES)
def test_against_the_reference(case: str) -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(41, 5, generator=generator, dtype=torch.float64)
    v = u + 0.7 * torch.randn(41, 5, generator=generator, dtype=torch.float64)
    got, exact = gradient_terms(u, v, **CASES[case]), paradigm_terms(u, v, **CASES[case])
    torch.testing.assert_close(got.dissipation, exact.dissipation)
    torch.testing.assert_close(got.ratio, exact.ratio)
    weight = exact.weight / exact.weight.sum(dim=1, keepdim=True)
    hardest = pair_statistics(normalise(u) @ normalise(v).T, 0.05).nearest
    torch.testing.assert_close(got.weight_entropy, torch.special.entr(weight).sum(dim=1))
    torch.testing.assert_close(got.hardest_share, weight.gather(1, hardest[:, None]).squeeze(1))
    assert set(got.means()) == {"dissipation", "weight_entropy", "hardest_share", "ratio"}


def test_equal_negatives_share_alike() -> None:
    u = torch.eye(9)
    terms = gradient_terms(u, u, "info_nce")
    torch.testing.assert_close(terms.weight_entropy, torch.full((9,), math.log(8)))
    torch.testing.assert_close(terms.hardest_share, torch.full((9,), 1 / 8))


def test_what_has_no_such_terms() -> None:
    u = torch.eye(4)
    with pytest.raises(ValueError, match="objective: expected a contrastive one or 'custom', got 'vicreg'"):
        gradient_terms(u, u, "vicreg")
    with pytest.raises(ValueError, match="u: expected at least two rows"):
        gradient_terms(u[:1], u[:1], "mpt")
