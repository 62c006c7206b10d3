"""The gradient paradigm's kernels in Triton's interpreter, against the same passes and the reference in float64.

Tiles there are 32 rows × 32 columns × 32 dimensions, and chunks here are one tile high.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hicl_fast.functional as HF
from hicl_fast.ops.backends import BackendError
from hicl_fast.ops.common.constants import POWER_FLOOR
from hicl_fast.ops.common.unit_rows import UnitRows
from hicl_fast.ops.paradigm.engine import Engine, Term
from hicl_fast.reference import normalise
from tests.ops.test_paradigm import (
    CASES,
    POWERS,
    assert_as_exact_as_eager,
    assert_exact_at_a_power,
    draw,
    evaluate,
)

pytestmark = [pytest.mark.triton, pytest.mark.interpret]

EDGES = [(2, 33), (31, 5), (32, 32), (33, 31), (65, 65)]  # N, D
each_edge = pytest.mark.parametrize(("n", "d"), EDGES)
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backend's passes, in chunks of one row tile."""
    from hicl_fast.ops.paradigm import triton as triton_paradigm

    monkeypatch.setattr(triton_paradigm, "CHUNK_BYTES", 1)
    return triton_paradigm


def unit_rows(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return tuple(normalise(x).float() for x in draw(n, d, seed))  # type: ignore[return-value]


def off_diagonal(x: Tensor, y: Tensor) -> Tensor:  # (N, D), (N, D) -> (N, N) float64
    s = x.double() @ y.double().T
    return s.fill_diagonal_(-torch.inf)


def assert_largest(value: Tensor, index: Tensor, s: Tensor) -> None:
    """Along the rows of s (N, N), whatever the rounding."""
    assert value.dtype == torch.float32 and index.dtype == torch.int64
    largest = s.max(dim=1).values
    assert (value - largest).abs().max() <= 4 * EPS
    assert (s.gather(1, index[:, None])[:, 0] - largest).abs().max() <= 4 * EPS


@each_edge
def test_statistics_at_every_tile_edge(engine: Engine, n: int, d: int) -> None:
    x, y = unit_rows(n, d)
    s = off_diagonal(x, y)
    found = engine.statistics(x, y, 0.05, columns=True)
    assert_largest(found.hardest, found.nearest, s)
    assert_largest(found.column_hardest, found.column_index, s.T)
    torch.testing.assert_close(found.lse.double(), torch.logsumexp(s / 0.05, dim=1), rtol=0, atol=100 * EPS)


def test_statistics_that_are_not_asked_for(engine: Engine) -> None:
    found = engine.statistics(*unit_rows(33, 7), None, columns=False)
    assert [len(x) for x in found] == [33, 33, 0, 0, 0]


@pytest.mark.parametrize("n", [7, 70])
def test_the_first_of_equal_similarities_counts(engine: Engine, n: int) -> None:
    """Vectors of ±1/4: every similarity is exact, and most are equal to others in their own tile and in others."""
    generator = torch.Generator().manual_seed(n)
    x, y = (torch.randint(0, 2, (n, 16), generator=generator).mul_(2).sub_(1) / 4 for _ in range(2))
    s = off_diagonal(x, y)
    found = engine.statistics(x, y, None, columns=True)
    combined = engine.combine(x, y, y, "softmax", 0.05)
    for hardest, index, along in (
        (found.hardest, found.nearest, s),
        (found.column_hardest, found.column_index, s.T),
        (combined.hardest, combined.nearest, s),
    ):
        largest = along.max(dim=1, keepdim=True).values
        is_largest = along == largest
        assert (is_largest.sum(dim=1) > 1).any()
        assert torch.equal(hardest.double(), largest[:, 0])
        assert torch.equal(index, is_largest.int().argmax(dim=1))


def test_nan_is_the_largest(engine: Engine) -> None:
    x, y = unit_rows(70, 12)
    x[3], y[40], y[66] = torch.nan, torch.nan, torch.nan
    s = off_diagonal(x, y)
    found = engine.statistics(x, y, 0.05, columns=True)
    assert found.hardest.isnan().all() and found.lse.isnan().all()
    assert torch.equal(found.nearest, s.isnan().int().argmax(dim=1))
    has_nan = s.isnan().any(dim=0)
    assert torch.equal(found.column_hardest.isnan(), has_nan) and not has_nan[3]
    assert torch.equal(found.column_index[has_nan], s.isnan().int().argmax(dim=0)[has_nan])


WEIGHTS = {
    "softmax": ("softmax", 0.05),
    "broad softmax": ("softmax", 1.0),
    "as sharp as one pass takes": ("softmax", 1 / 35),
    "sharper": ("softmax", 0.004),
    "power": ("power", 3.0),
    "fractional power": ("power", 0.5),
}


def weights_of(s: Tensor, weight: str, parameter: float) -> Tensor:  # (N, N) float64, 0 where s is −∞
    raw = (s / parameter).exp() if weight == "softmax" else s.clamp_min(POWER_FLOOR).pow(parameter)
    return raw.masked_fill(s == -torch.inf, 0.0)


def assert_combined(engine: Engine, x: Tensor, y: Tensor, t: Tensor, weight: str, parameter: float) -> None:
    s = off_diagonal(x, y)
    exact = weights_of(s, weight, parameter)
    found = engine.combine(x, y, t, weight, parameter)
    steepness = (1 / parameter if weight == "softmax" else parameter / POWER_FLOOR) * EPS
    total = exact.sum(dim=1, keepdim=True)
    torch.testing.assert_close(found.rows.double(), exact @ t.double() / total, rtol=0, atol=8 * EPS + 4 * steepness)
    torch.testing.assert_close(found.log_total.double(), total.log()[:, 0], rtol=8 * EPS, atol=8 * EPS + 4 * steepness)
    assert_largest(found.hardest, found.nearest, s)


@each_edge
@pytest.mark.parametrize("name", WEIGHTS)
def test_weighted_sums(engine: Engine, name: str, n: int, d: int) -> None:
    x, y = unit_rows(n, d)
    t = torch.randn(n, d, generator=torch.Generator().manual_seed(1))
    assert_combined(engine, x, y, t, *WEIGHTS[name])
    if n == 33:
        assert_combined(engine, x, x, y, *WEIGHTS[name])


@pytest.mark.parametrize("temperature", [0.004, 0.05])
def test_softmax_weights_neither_over_nor_underflow(engine: Engine, temperature: float) -> None:
    """Views that are opposite, equal, or all one: similarities of −1 and 1 alone."""
    x = torch.zeros(34, 3)
    x[:, 0] = 1
    y = -x
    y[::2, 0] = 1
    for views in ((x, x), (x, -x), (x, y)):
        assert_combined(engine, *views, torch.eye(34), "softmax", temperature)


def test_a_diagonal_that_stands_out_has_no_weight(engine: Engine) -> None:
    x = torch.eye(40)
    found = engine.combine(x, x, x, "softmax", 0.004)
    torch.testing.assert_close(found.rows, (1 - torch.eye(40)) / 39)
    assert torch.equal(found.nearest, (torch.arange(40) == 0).long())


@each_edge
def test_rows_are_added_up_at_their_targets(engine: Engine, n: int, d: int) -> None:
    """Half of all go to row 0, and most rows are the target of none."""
    generator = torch.Generator().manual_seed(n)
    x, y = (torch.randn(n, d, generator=generator) for _ in "ab")
    factor, source = torch.randn(n, generator=generator), torch.randperm(n, generator=generator)
    target = torch.randint(0, n, (n,), generator=generator) * (torch.rand(n, generator=generator) < 0.5)
    unit = UnitRows.of(x, torch.float32)
    got = engine.gradient(unit, [Term(x, factor), Term(y, factor, source, target), Term(y, factor, None, target)])
    sent = (y[source].double() + y.double()) * factor.double()[:, None]
    total = (x * factor[:, None]).double().index_add_(0, target, sent)
    exact = UnitRows.of(x, torch.float64).gradient(total)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=4 * n**0.5 * EPS * float(exact.abs().max()))


@pytest.mark.parametrize("power", POWERS)
def test_powers_that_leave_the_type_s_range(power: float) -> None:
    assert_exact_at_a_power("triton", power)


@pytest.mark.parametrize("case", CASES)
def test_objectives_against_the_reference(case: str) -> None:
    assert_as_exact_as_eager(draw(35, 20), CASES[case], "triton", torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["met", "custom", "barlow_twins gd w r"])
def test_16_bit(case: str, dtype: torch.dtype) -> None:
    assert_as_exact_as_eager(draw(35, 20), CASES[case], "triton", dtype)


@pytest.mark.parametrize("case", ["mpt", "mhs", "custom", "custom power", "custom functions", "vicreg w"])
def test_nan_is_not_hidden(case: str) -> None:
    u, v = (x.float() for x in draw(9, 5))
    v[3, 2] = torch.nan
    assert HF.paradigm(u, v, backend="triton", **CASES[case]).isnan()


@pytest.mark.parametrize("case", ["met", "custom functions", "mhs gd w r"])
def test_runs_give_the_same_bits(case: str) -> None:
    views = tuple(x.float() for x in draw(35, 20))
    options = CASES[case] | {"backend": "triton"}
    first, second = (evaluate(HF.paradigm, views, options) for _ in "ab")  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that anything makes."""

    nbytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("case", ["mhs", "mhe"])
def test_no_matrix_of_similarities(case: str) -> None:
    n = 160
    u, v = (x.float().requires_grad_() for x in draw(n, 4))
    with LargestTensor() as made:
        HF.paradigm(u, v, backend="triton", **CASES[case]).backward()
    assert 0 < made.nbytes <= 32 * 192 * 4 < n * n * 4 / 4  # a chunk's weights, columns filled up to a multiple of 64


def test_float64_is_refused() -> None:
    with pytest.raises(BackendError, match="it takes float32, bfloat16 and float16, got float64"):
        HF.paradigm(*draw(4, 5), "met", backend="triton")
