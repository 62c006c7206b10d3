"""The gradient's parts of each row against the reference's matrices."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hicl_fast import reference
from hicl_fast.analysis import gradient_terms
from hicl_fast.ops.info_nce import torch as chunked_info_nce
from hicl_fast.ops.paradigm.reference import negatives_of, pair_statistics, paradigm_gradient, paradigm_terms
from hicl_fast.ops.paradigm.settings import MODIFIABLE
from hicl_fast.reference import normalise

CASES: dict[str, dict[str, Any]] = {name: {"objective": name} for name in ("info_nce", "arccon", "mpt", "met", "mat")}
CASES |= {
    "power": {"objective": "custom", "weight": ("power", 3), "dissipation": 0.4, "ratio": "met"},
    "uniform": {"objective": "custom", "weight": "uniform", "ratio": lambda rows: 1 + rows.positive},
    "hardest": {"objective": "custom", "weight": "hardest", "dissipation": None},
    "function": {"objective": "custom", "weight": lambda s, rows: (s - rows.hardest[:, None]).exp()},
}
# As they stand, and with every set of modifications.
MODIFIED: dict[str, dict[str, Any]] = {
    " ".join((name, *modified)): {"objective": name, "modified": modified, "temperature": 0.3, "strength": 0.7}
    | ({"ratio": 1.5} if "r" in modified else {})
    for name in MODIFIABLE
    for count in range(4)
    for modified in itertools.combinations(("gd", "w", "r"), count)
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked_info_nce.CHUNK_BYTES, "cpu", 4096)


def draw() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(41, 5, generator=generator, dtype=torch.float64)
    return u, u + 0.7 * torch.randn(41, 5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES | MODIFIED)
def test_against_the_reference(case: str) -> None:
    u, v = draw()
    options = (CASES | MODIFIED)[case]
    got, exact = gradient_terms(u, v, **options), paradigm_terms(u, v, **options)
    torch.testing.assert_close(got.dissipation, exact.dissipation)
    torch.testing.assert_close(got.ratio, exact.ratio)
    weight = exact.weight.abs() / exact.weight.abs().sum(dim=1, keepdim=True)
    hardest = pair_statistics(normalise(u) @ normalise(negatives_of(options["objective"], u, v)).T, 0.05).nearest
    torch.testing.assert_close(got.weight_entropy, torch.special.entr(weight).sum(dim=1))
    torch.testing.assert_close(got.hardest_share, weight.gather(1, hardest[:, None]).squeeze(1))
    assert set(got.means()) == {"dissipation", "weight_entropy", "hardest_share", "ratio"}


def test_equal_negatives_share_alike() -> None:
    u = torch.eye(9)
    terms = gradient_terms(u, u, "info_nce")
    torch.testing.assert_close(terms.weight_entropy, torch.full((9,), math.log(8)))
    torch.testing.assert_close(terms.hardest_share, torch.full((9,), 1 / 8))


@pytest.mark.parametrize("case", MODIFIED)
def test_the_dense_terms_are_the_gradient(case: str) -> None:
    """Put together as the paradigm's equation they give what autograd makes of the value."""
    u, v = (normalise(x) for x in draw())
    options = MODIFIED[case] | {"margin": 0.05}  # some rows are held, some are not
    if options["objective"] == "barlow_twins" and "r" not in options["modified"]:
        options["strength"] = 1.0  # else its pull is by dimension
    leaf = u.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reference.paradigm(leaf, v, **options), leaf)
    terms = paradigm_terms(u, v, **options)
    assert "gd" not in options["modified"] or 0 < terms.dissipation.sum() < len(u)
    expected = paradigm_gradient(terms, v, negatives_of(options["objective"], u, v))
    expected -= (expected * u).sum(dim=1, keepdim=True) * u
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_zero_rows_have_no_weights() -> None:
    terms = gradient_terms(torch.zeros(3, 2), torch.zeros(3, 2), "vicreg")
    assert (terms.weight_entropy == 0).all() and (terms.hardest_share == 0).all()


def test_what_is_wrong_is_said() -> None:
    u = torch.eye(4)
    with pytest.raises(ValueError, match="modified: expected none with 'mpt'"):
        gradient_terms(u, u, "mpt", modified=("gd",))
    with pytest.raises(ValueError, match="u: expected at least two rows"):
        gradient_terms(u[:1], u[:1], "mpt")
