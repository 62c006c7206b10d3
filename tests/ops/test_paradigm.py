"""Every objective of the gradient paradigm on every CPU backend against the float64 reference."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hicl_fast
import hicl_fast.functional as HF
from hicl_fast import reference
from hicl_fast.ops.backends import registry
from hicl_fast.ops.info_nce import torch as chunked_info_nce
from hicl_fast.ops.paradigm.reference import paradigm_gradient, paradigm_terms
from hicl_fast.ops.paradigm.settings import MODIFIABLE, OBJECTIVES, PairStatistics
from hicl_fast.reference import normalise

BACKENDS = [s.name for s in hicl_fast.backends() if s.available and s.name != "triton"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
Options = dict[str, Any]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few rows already make several chunks."""
    monkeypatch.setitem(chunked_info_nce.CHUNK_BYTES, "cpu", 4096)


def steep(similarity: Tensor, rows: PairStatistics) -> Tensor:
    return (3 * (similarity - rows.hardest[:, None])).exp()


CASES: dict[str, Options] = {name: {"objective": name} for name in OBJECTIVES}
for _name in MODIFIABLE:
    for _count in (1, 2, 3):
        for _modified in itertools.combinations(("gd", "w", "r"), _count):
            CASES[" ".join((_name, *_modified))] = {"objective": _name, "modified": _modified, "strength": 0.7} | (
                {"ratio": 1.5} if "r" in _modified else {}
            )
            if _name in ("vicreg", "barlow_twins"):
                # The diagonal's weight e^(1/τ) cancels in the reference's gradient, with its digits.
                CASES[" ".join((_name, *_modified))]["temperature"] = 0.5
CASES |= {
    f"custom {name}": {"objective": "custom", **options}
    for name, options in {
        "margin": {"dissipation": 0.3, "ratio": 1.25},
        "no dissipation": {"dissipation": None, "ratio": "arccon"},
        "uniform": {"weight": "uniform", "ratio": "met"},
        "hardest": {"weight": "hardest", "ratio": "mat", "dissipation": 0.2},
        "power": {"weight": ("power", 3)},
        "fractional power": {"weight": ("power", 0.5), "dissipation": None},
        "functions": {
            "dissipation": lambda rows: torch.sigmoid(rows.lse) * rows.positive,
            "weight": steep,
            "ratio": lambda rows: 1 + rows.hardest,
        },
    }.items()
}


def draw(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    u, noise = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    u += 0.8 * torch.randn(1, d, generator=generator, dtype=torch.float64)
    return u, u + 0.7 * noise


def evaluate(
    loss: Callable[..., Tensor], views: tuple[Tensor, Tensor], options: Options, upstream: float = 2.0
) -> list[Tensor]:
    """The loss and both gradients."""
    u, v = (x.detach().clone().requires_grad_() for x in views)
    value = loss(u, v, **options)
    return [value.detach(), *torch.autograd.grad(value * upstream, (u, v))]


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-12))


def assert_as_exact_as_eager(views: tuple[Tensor, Tensor], options: Options, backend: str, dtype: torch.dtype) -> None:
    typed = tuple(x.to(dtype) for x in views)
    upstream = 64.0 if dtype == torch.float16 else 2.0
    exact = evaluate(reference.paradigm, tuple(x.double() for x in typed), options, upstream)  # type: ignore[arg-type]
    eager = evaluate(reference.paradigm, typed, options, upstream)  # type: ignore[arg-type]
    fused = evaluate(lambda u, v, **o: HF.paradigm(u, v, backend=backend, **o), typed, options, upstream)  # type: ignore[arg-type]
    sum_eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    roundings = 8 * torch.finfo(dtype).eps + (32 + 8 / options.get("temperature", 0.05)) * sum_eps
    for name, got, plain, expected in zip(("loss", "u", "v"), fused, eager, exact, strict=True):
        assert got.dtype == (torch.promote_types(dtype, torch.float32) if name == "loss" else dtype)
        assert relative_error(got, expected) <= 4 * relative_error(plain, expected) + roundings, name


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_against_the_reference(backend: str, case: str, dtype: torch.dtype) -> None:
    assert_as_exact_as_eager(draw(19, 33), CASES[case], backend, dtype)


@each_backend
@pytest.mark.parametrize("case", CASES)
def test_one_row(backend: str, case: str) -> None:
    """It has no negatives; what is left is pull alone."""
    for d in (1, 33):
        views = draw(1, d)
        exact = evaluate(reference.paradigm, views, CASES[case])
        loss, *gradients = evaluate(lambda u, v, **o: HF.paradigm(u, v, backend=backend, **o), views, CASES[case])
        torch.testing.assert_close([loss, *gradients], exact, rtol=1e-12, atol=1e-14)
    objective, modified = CASES[case]["objective"], CASES[case].get("modified", ())
    assert all(torch.isfinite(x).all() for x in (loss, *gradients))
    if objective not in MODIFIABLE:
        assert loss == 0 and not any(x.any() for x in gradients)
    elif not modified:
        cosine = (normalise(views[0]) * normalise(views[1])).sum()
        assert float(gradients[0].abs().max()) > 0.01
        pulled = views[0] - 0.01 * gradients[0]
        assert (normalise(pulled) * normalise(views[1])).sum() > cosine
        if objective in ("mhe", "mhs"):
            torch.testing.assert_close(loss, 2 - 2 * cosine)
    elif "gd" in modified:
        assert not any(x.any() for x in gradients)


@each_backend
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_row_that_is_nan(backend: str, objective: str) -> None:
    u, v = draw(1, 5)
    assert HF.paradigm(u * torch.nan, v, objective, backend=backend).isnan()  # type: ignore[arg-type]


@each_backend
@pytest.mark.parametrize(("n", "d"), [(2, 3), (3, 2), (64, 5), (65, 70), (130, 16)])
@pytest.mark.parametrize(
    "case", ["met", "custom", "mhe gd w r", "mhs gd", "vicreg", "barlow_twins gd", "barlow_twins gd w", "vicreg r"]
)
def test_shapes(backend: str, case: str, n: int, d: int) -> None:
    assert_as_exact_as_eager(draw(n, d), CASES[case], backend, torch.float64)


@each_backend
@pytest.mark.parametrize("case", ["mat", "mhs gd w r", "custom power", "mhe gd w r", "barlow_twins gd"])
def test_more_rows_than_a_block_of_any_backend_has(backend: str, case: str) -> None:
    assert_as_exact_as_eager(draw(1100, 6), CASES[case], backend, torch.float64)


@each_backend
@pytest.mark.parametrize("objective", ["mpt", "mhs"])
def test_one_key_is_the_nearest_of_many(backend: str, objective: str) -> None:
    u, v = draw(40, 6)
    u += 5  # a common direction, which one key has alone
    v[7] = 1
    s = normalise(u) @ normalise(v).T
    assert (s.fill_diagonal_(-1.0).argmax(dim=1) == 7).sum() > 30
    assert_as_exact_as_eager((u, v), {"objective": objective}, backend, torch.float64)


@each_backend
@pytest.mark.parametrize("case", ["info_nce", "arccon", "custom", "mhe gd w r"])
@pytest.mark.parametrize("temperature", [0.005, 0.3])
def test_temperatures(backend: str, case: str, temperature: float) -> None:
    """At 0.005 a softmax without an offset would over- and underflow float32."""
    options = CASES[case] | {"temperature": temperature}
    assert_as_exact_as_eager(draw(23, 9), options, backend, torch.float64)
    assert_as_exact_as_eager(draw(23, 9), options, backend, torch.float32)


POWERS = (12.0, 40.0, -3.0, -12.0)


def assert_exact_at_a_power(backend: str, power: float) -> None:
    """1e-4¹² is 0 in float32; in a row without anything similar all weights are that."""
    u, v = torch.eye(6, 9), torch.eye(6, 9).roll(1, dims=1)
    u[:3, 6:] += 0.3
    options = {"objective": "custom", "weight": ("power", power), "dissipation": None}
    exact = evaluate(reference.paradigm, (u.double(), v.double()), options)  # type: ignore[arg-type]
    got = evaluate(HF.paradigm, (u, v), {**options, "backend": backend})  # type: ignore[arg-type]
    for g, e in zip(got, exact, strict=True):
        assert relative_error(g, e) <= 1e-5 * abs(power)


@each_backend
@pytest.mark.parametrize("power", POWERS)
def test_powers_that_leave_the_type_s_range(backend: str, power: float) -> None:
    assert_exact_at_a_power(backend, power)


@each_backend
@pytest.mark.parametrize("part", ["dissipation", "ratio", "weight"])
def test_a_function_of_another_shape_is_refused(backend: str, part: str) -> None:
    u, v = draw(8, 5)
    function = (lambda s, rows: s[:, :1]) if part == "weight" else (lambda rows: rows.positive[:, None])
    with pytest.raises(ValueError, match=f"{part}: expected a function that gives a tensor of shape"):
        HF.paradigm(u, v, "custom", **{part: function}, backend=backend)  # type: ignore[arg-type]


@each_backend
@pytest.mark.parametrize("objective", ["info_nce", "arccon", "mpt", "met", "mat"])
def test_closed_form(backend: str, objective: str) -> None:
    u, v = draw(31, 6)
    _, u_grad, _ = evaluate(lambda a, b: HF.paradigm(a, b, objective, backend=backend), (u, v), {}, 1.0)  # type: ignore[arg-type]
    expected = paradigm_gradient(paradigm_terms(u, v, objective), v)  # type: ignore[arg-type]
    unit = normalise(u)
    expected -= (expected * unit).sum(dim=1, keepdim=True) * unit
    torch.testing.assert_close(u_grad * u.norm(dim=1, keepdim=True), expected, rtol=1e-10, atol=1e-12)


@each_backend
def test_custom_is_info_nce(backend: str) -> None:
    views = draw(17, 8)
    _, u_grad, v_grad = evaluate(lambda u, v: HF.paradigm(u, v, "custom", backend=backend), views, {})
    _, by_rows, _ = evaluate(HF.info_nce, views, {})
    _, by_columns, _ = evaluate(HF.info_nce, views[::-1], {})
    torch.testing.assert_close(u_grad, by_rows)
    torch.testing.assert_close(v_grad, by_columns)


def with_traps(kind: str, n: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    u, v = draw(n, d, seed)
    if kind == "equal views":
        v = u.clone()
    elif kind == "opposite views":
        v = -u
    elif kind == "near views":  # nearer than MET tells apart
        v = u + 1e-4 * (v - u)
    elif kind == "copies":
        u[1:] = u[:1]
        v[1:] = v[:1]
    elif kind == "zero rows":
        u[0] = v[1] = 0
    elif kind == "all zero":
        u, v = torch.zeros_like(u), torch.zeros_like(v)
    elif kind == "tiny":
        u, v = u * 1e-14, v * 1e-25
    return u, v


@each_backend
def test_met_does_not_pull_what_is_near(backend: str) -> None:
    views = with_traps("near views", 9, 5, 0)
    exact = evaluate(reference.paradigm, views, {"objective": "met", "margin": 3.0})
    fused = evaluate(HF.paradigm, views, {"objective": "met", "margin": 3.0, "backend": backend})
    for got, expected in zip(fused, exact, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


@each_backend
@pytest.mark.parametrize("case", ["mat", "custom", "mhe gd w r", "mhs r", "vicreg", "barlow_twins"])
def test_the_length_of_a_row_below_the_floor_is_constant(backend: str, case: str) -> None:
    u, v = draw(9, 5)
    u[2] *= 1e-14 / u[2].norm()
    v[4] *= 5e-13 / v[4].norm()
    exact = evaluate(reference.paradigm, (u, v), CASES[case])
    fused = evaluate(HF.paradigm, (u, v), CASES[case] | {"backend": backend})
    for got, expected in zip(fused, exact, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


TRAPS = ["equal views", "opposite views", "copies", "zero rows", "all zero", "tiny"]


@each_backend
@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("case", CASES)
def test_finite_at_the_traps(backend: str, case: str, trap: str) -> None:
    views = tuple(x.float() for x in with_traps(trap, 5, 4, 0))
    loss, u_grad, v_grad = evaluate(lambda u, v, **o: HF.paradigm(u, v, backend=backend, **o), views, CASES[case])  # type: ignore[arg-type]
    assert loss.isfinite() and u_grad.isfinite().all() and v_grad.isfinite().all()
    for x, gradient in zip(views, (u_grad, v_grad), strict=True):
        assert (gradient[(x == 0).all(dim=1)] == 0).all()


@each_backend
@settings(max_examples=60)
@given(data=st.data())
def test_any_shape_near_any_trap(backend: str, data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(sorted(CASES)), label="case")
    kind = data.draw(
        st.sampled_from(["none", "equal views", "near views", "opposite views", "zero rows"]), label="kind"
    )
    n, d = data.draw(st.integers(2, 40), label="n"), data.draw(st.integers(3, 40), label="d")
    views = with_traps(kind, n, d, data.draw(st.integers(0, 99), label="seed"))
    exact = evaluate(reference.paradigm, views, CASES[case])
    fused = evaluate(lambda u, v, **o: HF.paradigm(u, v, backend=backend, **o), views, CASES[case])
    # A positive at s = ±1 has a slope of up to 2000 that a rounding of s moves; it is along the row itself.
    steepness = 1e-6 if "views" in kind else 1e-10
    for got, expected in zip(fused, exact, strict=True):
        assert float((got - expected).norm()) <= steepness * (1 + float(expected.norm()))


@each_backend
@pytest.mark.parametrize("n", [7, 70, 300])
@pytest.mark.parametrize("objective", ["mpt", "met", "mat", "mhs"])
def test_the_first_of_equal_negatives_gets_the_gradient(backend: str, objective: str, n: int) -> None:
    """Vectors of ±1 whose length is a power of two: every similarity is exact, and most are equal to others."""
    generator = torch.Generator().manual_seed(n)
    u, v = (torch.randint(0, 2, (n, 16), generator=generator).mul_(2).sub_(1).float() for _ in range(2))
    s = normalise(u.double()) @ normalise(v.double()).T
    hardest = s.masked_fill(torch.eye(n, dtype=torch.bool), -2.0).max(dim=1, keepdim=True).values
    assert ((s == hardest).sum(dim=1) > 1).any()
    _, u_grad, v_grad = evaluate(lambda a, b: HF.paradigm(a, b, objective, backend=backend), (u, v), {})  # type: ignore[arg-type]
    exact = evaluate(reference.paradigm, (u.double(), v.double()), {"objective": objective})
    assert relative_error(u_grad, exact[1]) < 1e-5 and relative_error(v_grad, exact[2]) < 1e-5


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("n", [27, 65, 130, 205])
def test_equal_keys_are_equal_wherever_they_lie(backend: str, n: int, dtype: torch.dtype) -> None:
    """A BLAS treats what is left over at the edges of its tiles with code of its own."""
    u, v = (x.to(dtype) for x in draw(n, 67))
    v[1] = v[n - 1] = u.mean(dim=0)  # the nearest of most
    engine = registry.implementation("paradigm", backend)
    views = engine.views(u, v, dtype)
    for found in (
        engine.statistics(views.u.rows, views.v.rows, None, False),
        engine.combine(views.u.rows, views.v.rows, views.v.rows, "softmax", 0.05),
    ):
        assert (found.nearest == 1).sum() > n / 2
        assert (found.nearest == n - 1).nonzero().flatten().tolist() in ([], [1])


@each_backend
@pytest.mark.parametrize("case", ["mpt", "met", "mat", "mhe gd", "mhs gd w r", "vicreg gd w", "custom margin"])
def test_no_row_passes_the_mask(backend: str, case: str) -> None:
    u = torch.eye(6, dtype=torch.float64)
    v = u + 1e-3 * torch.roll(u, 1, dims=1)
    _, u_grad, v_grad = evaluate(lambda a, b, **o: HF.paradigm(a, b, backend=backend, **o), (u, v), CASES[case])
    assert (u_grad == 0).all() and (v_grad == 0).all()


@each_backend
@pytest.mark.parametrize(
    "options",
    [
        {"objective": "mhe", "modified": ("gd",)},
        {"objective": "vicreg", "modified": ("gd", "w"), "temperature": 0.5},
        {"objective": "custom", "dissipation": 1.0},
    ],
)
def test_a_row_at_the_margin_gets_no_gradient(backend: str, options: Options) -> None:
    u = torch.eye(6, dtype=torch.float64)  # nearest neighbours at exactly 1 − s = 1
    v = u if options["objective"] == "custom" else u.roll(1, dims=0)
    margin = "dissipation" if options["objective"] == "custom" else "margin"
    at, beyond = (
        evaluate(HF.paradigm, (u, v), options | {margin: value, "backend": backend}) for value in (1.0, 1.001)
    )
    assert (at[1] == 0).all() and (at[2] == 0).all()
    assert (beyond[1] != 0).any() and (beyond[2] != 0).any()


@each_backend
@pytest.mark.parametrize("case", CASES)
def test_nan_is_not_hidden(backend: str, case: str) -> None:
    u, v = draw(9, 5)
    v[3, 2] = torch.nan
    assert HF.paradigm(u, v, backend=backend, **CASES[case]).isnan()


@each_backend
@pytest.mark.parametrize("case", ["arccon", "mat", "custom power", "mhe gd w r", "mhs r", "vicreg", "barlow_twins w"])
def test_types_strides_and_autocast(backend: str, case: str) -> None:
    u, v = (x.float() for x in draw(16, 24))
    exact = reference.paradigm(u.double(), v.double(), **CASES[case])
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    strided = HF.paradigm(u.T.contiguous().T, torch.cat((v, v))[:16], backend=backend, **CASES[case])
    torch.testing.assert_close(strided.double(), exact, **tolerance)
    assert HF.paradigm(u, v.double(), backend=backend, **CASES[case]).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = HF.paradigm(u, v, backend=backend, **CASES[case])
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast.double(), exact, **tolerance)


@each_backend
def test_partial_gradients_and_repeated_backward(backend: str) -> None:
    u, v = draw(9, 5)
    _, both, _ = evaluate(HF.paradigm, (u, v), {"objective": "mat", "backend": backend}, 1.0)
    leaf = u.clone().requires_grad_()
    loss = HF.paradigm(leaf, v, "mat", backend=backend)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * both)
    with torch.no_grad():
        assert not HF.paradigm(leaf, v, "mat", backend=backend).requires_grad


@each_backend
@pytest.mark.parametrize("case", ["custom power", "mhe gd w r", "vicreg"])
def test_compiled_and_registered(backend: str, case: str) -> None:
    options = dict(CASES[case])
    u, v = (x.requires_grad_() for x in draw(6, 5))
    chosen = HF.paradigm_settings(
        options["objective"],
        options.get("modified", ()),
        None,
        0.05,
        options.get("strength", 1.0),
        dissipation=options.get("dissipation", "softmax"),
        weight=options.get("weight", "softmax"),
        ratio=options.get("ratio", 1.0),
    )
    torch.library.opcheck(torch.ops.hicl_fast.paradigm.default, (u, v, *chosen.flat(), True, backend))
    torch.compiler.reset()
    compiled = torch.compile(
        lambda a, b: HF.paradigm(a, b, backend=backend, **options), fullgraph=True, backend="aot_eager"
    )
    for got, expected in zip(
        evaluate(compiled, (u, v), {}), evaluate(HF.paradigm, (u, v), options | {"backend": backend}), strict=True
    ):
        torch.testing.assert_close(got, expected)


@each_backend
def test_functions_are_refused_where_they_cannot_be_traced(backend: str) -> None:
    def mine(u: Tensor, v: Tensor) -> Tensor:
        return HF.paradigm(u, v, "custom", weight=steep, backend=backend)

    with pytest.raises(Exception, match="expected parts by name or number under torch.compile"):
        torch.compile(mine, fullgraph=True, backend="aot_eager")(*draw(4, 5))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"objective": "nothing"}, ValueError, "objective: expected one of 'info_nce'"),
        ({"modified": ("gd",)}, ValueError, "modified: expected none with 'mpt'"),
        ({"objective": "mhe", "modified": "gd"}, TypeError, "modified: expected a collection"),
        ({"objective": "mhe", "modified": ("x",)}, ValueError, "modified: expected one of 'gd', 'w', 'r'"),
        ({"objective": "arccon", "margin": -0.1}, ValueError, "margin: expected an angle"),
        ({"objective": "info_nce", "margin": 0.1}, ValueError, "margin: expected none"),
        ({"margin": float("nan")}, ValueError, "margin: expected a finite number"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a number above 0"),
        ({"strength": "1"}, TypeError, "strength: expected a number"),
        ({"weight": "uniform"}, ValueError, "weight: expected the default with 'mpt'"),
        ({"ratio": 1.5}, ValueError, "ratio: expected 1.0 without"),
        ({"objective": "mhe", "modified": ("r",), "ratio": "met"}, TypeError, "ratio: expected a number"),
        ({"objective": "custom", "dissipation": "hinge"}, ValueError, "dissipation: expected one of"),
        ({"objective": "custom", "weight": ("power",)}, ValueError, r"weight: expected \('power', p\)"),
        ({"objective": "custom", "weight": 3}, ValueError, "weight: expected one of"),
        ({"objective": "custom", "ratio": "info_nce"}, ValueError, "ratio: expected one of"),
        ({"u": torch.ones(0, 5), "v": torch.ones(0, 5)}, ValueError, "u: expected at least one row"),
        ({"v": torch.ones(4, 6)}, ValueError, r"v: expected shape \(4, 5\)"),
        ({"v": torch.ones(4, 5, dtype=torch.int64)}, TypeError, "v: expected float64"),
        ({"backend": "nothing"}, ValueError, "backend: expected 'auto' or one of"),
    ],
)
def test_arguments_that_are_wrong(options: Options, error: type[Exception], message: str) -> None:
    u, v = draw(4, 5)
    with pytest.raises(error, match=message):
        HF.paradigm(**({"u": u, "v": v, "objective": "mpt"} | options))


MEMORY = """
import resource, sys, torch
import hicl_fast.functional as HF
backend, objective, *modified = sys.argv[1:]
def step(n):
    u, v = (torch.randn(n, 8).requires_grad_() for _ in range(2))
    HF.paradigm(u, v, objective, modified=modified, backend=backend).backward()
step(512)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(16384)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@each_backend
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak in Linux's unit")
@pytest.mark.parametrize("case", ["mhe gd w r", "mhs"])
def test_memory_does_not_grow_with_the_square_of_the_batch(backend: str, case: str) -> None:
    command = [sys.executable, "-c", MEMORY, backend, *case.split()]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 256  # MB; the matrix would take 1074
