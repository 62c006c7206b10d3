"""Every CPU backend against the float64 reference. The Triton kernels have tests of their own in tests/kernels."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hicl_fast
import hicl_fast.functional as HF
from hicl_fast import reference
from hicl_fast.ops.info_nce import torch as chunked_info_nce
from hicl_fast.ops.info_nce.problem import Problem

BACKENDS = [s.name for s in hicl_fast.backends() if s.available and s.name != "triton"]
Inputs = dict[str, Tensor]

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few rows already make several chunks."""
    monkeypatch.setitem(chunked_info_nce.CHUNK_BYTES, "cpu", 4096)


def draw(n: int, m: int, d: int, *, spread: float = 1.0, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(n, d, generator=generator, dtype=torch.float64)
    key = torch.randn(m, d, generator=generator, dtype=torch.float64) * spread
    key[: min(n, m)] += query[: min(n, m)]
    return {"query": query, "key": key}


def evaluate(
    loss: Callable[..., Tensor], inputs: Inputs, options: dict[str, Any], upstream: float = 1.0
) -> list[Tensor]:
    """The loss and the gradient of every input."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    value = loss(**leaves, **options)
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape) * upstream
    gradients = torch.autograd.grad((value * weights).sum(), list(leaves.values()))
    return [value.detach(), *gradients]


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-12))


def assert_as_exact_as_eager(
    inputs: Inputs, options: dict[str, Any], backend: str, dtype: torch.dtype, **kw: Any
) -> None:
    """Its errors against float64 are a few times those of the plain formula in the same type, or a few roundings.

    Of the result, or of the inputs where these matter more: a gradient whose terms cancel has as few digits as they leave.
    """
    typed = {name: x.to(dtype) for name, x in inputs.items()}
    doubles = {name: x.double() for name, x in typed.items()}
    exact = evaluate(reference.info_nce, doubles, options, **kw)
    eager = evaluate(reference.info_nce, typed, options, **kw)
    fused = evaluate(lambda **a: HF.info_nce(**a, backend=backend), typed, options, **kw)
    # A similarity's rounding is a logit's times 1/τ; sums are kept in float32 at least.
    sum_eps, temperature = torch.finfo(torch.promote_types(dtype, torch.float32)).eps, options.get("temperature", 0.05)
    roundings = 8 * torch.finfo(dtype).eps + (32 + 8 / temperature) * sum_eps
    nudged = evaluate(
        reference.info_nce, {name: one_rounding_off(x, sum_eps) for name, x in doubles.items()}, options, **kw
    )
    for name, got, plain, expected, near in zip(["loss", *inputs], fused, eager, exact, nudged, strict=True):
        wanted_type = torch.promote_types(dtype, torch.float32) if name == "loss" else dtype
        assert got.dtype == wanted_type
        allowed = 4 * relative_error(plain, expected) + roundings + 4 * relative_error(near, expected)
        assert relative_error(got, expected) <= allowed, name


def one_rounding_off(x: Tensor, eps: float) -> Tensor:
    sign = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return x + x * sign * eps


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "margin": {"margin": 0.2},
    "symmetric": {"symmetric": True},
    "symmetric margin": {"symmetric": True, "margin": 0.1},
    "rows": {"reduction": "none"},
    "sum": {"reduction": "sum"},
    "symmetric rows": {"symmetric": True, "reduction": "none"},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_types_and_temperatures(backend: str, case: str, temperature: float, dtype: torch.dtype) -> None:
    # Gradients of float16 would underflow at a hundredth of the usual size: that is float16's limit, not the loss's.
    upstream = 64.0 if dtype == torch.float16 else 2.0
    options = {**CASES[case], "temperature": temperature}
    assert_as_exact_as_eager(draw(19, 19, 33), options, backend, dtype, upstream=upstream)


@pytest.mark.parametrize("groups", [None, "exclude", "negative", "positive"])
@pytest.mark.parametrize("columns", ["keys", "negatives", "bank", "grouped bank", "extra", "all"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_columns_and_groups(backend: str, columns: str, groups: str | None, symmetric: bool) -> None:
    n, m, d = 23, 23 if symmetric else 31, 17
    inputs = draw(n, m, d)
    inputs["temperature"] = torch.tensor(0.07, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    options: dict[str, Any] = {"symmetric": symmetric, "margin": 0.05}
    if not symmetric:
        options["target"] = torch.randint(0, m, (n,), generator=generator)
    if columns in ("negatives", "all"):
        inputs["negatives"] = torch.randn(n, d, generator=generator, dtype=torch.float64)
        options["hard_negative_weight"] = 0.7
    if columns in ("extra", "all"):
        inputs["extra_logits"] = 5 * torch.randn(n, 6, generator=generator, dtype=torch.float64)
    if columns in ("bank", "grouped bank", "all"):
        options["bank"] = torch.randn(9, d, generator=generator)
    if groups:
        options |= {"same_group": groups}
        options |= {"query_group": torch.randint(0, 7, (n,), generator=generator)}
        options |= {"key_group": torch.randint(0, 7, (m,), generator=generator)}
        if columns in ("grouped bank", "all"):
            options |= {"bank_group": torch.randint(0, 7, (9,), generator=generator)}
    assert_as_exact_as_eager(inputs, options, backend, torch.float64)
    assert_as_exact_as_eager(inputs, options, backend, torch.float32)


@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (1, 5, 3), (2, 2, 1), (7, 9, 8), (65, 130, 31), (64, 64, 16)])
def test_sizes(backend: str, n: int, m: int, d: int) -> None:
    assert_as_exact_as_eager(draw(n, m, d), {}, backend, torch.float32)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 20), more=st.integers(0, 9), d=st.integers(2, 20), seed=st.integers(0, 99), tau=st.floats(0.01, 2)
)
def test_any_shape(backend: str, n: int, more: int, d: int, seed: int, tau: float) -> None:
    assert_as_exact_as_eager(draw(n, n + more, d, seed=seed), {"temperature": tau}, backend, torch.float64)


def test_several_blocks_of_rows(backend: str) -> None:
    """More rows than the C++ backend takes at a time."""
    group = torch.randint(0, 900, (1100,), generator=torch.Generator().manual_seed(2))
    for symmetric in (False, True):
        options = {"symmetric": symmetric, "query_group": group, "key_group": group}
        assert_as_exact_as_eager(draw(1100, 1100, 9), options, backend, torch.float32)


def test_tiny_losses_keep_their_digits(backend: str) -> None:
    q = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    expected = evaluate(reference.info_nce, {"query": q.double(), "key": q.double()}, {"temperature": 0.04})
    got = evaluate(HF.info_nce, {"query": q, "key": q}, {"temperature": 0.04, "backend": backend})
    assert 0 < expected[0] < 1e-5
    for g, e in zip(got, expected, strict=True):
        assert relative_error(g, e) < 1e-4


def test_very_small_temperature(backend: str) -> None:
    assert_as_exact_as_eager(draw(11, 11, 5), {"temperature": 0.001}, backend, torch.float32)


def test_zero_rows(backend: str) -> None:
    inputs = draw(9, 9, 12)
    inputs["query"][3], inputs["key"][5], inputs["key"][3] = 0, 0, 0
    got = evaluate(HF.info_nce, inputs, {"backend": backend})
    assert (got[1][3] == 0).all() and (got[2][[3, 5]] == 0).all()
    for g, e in zip(got, evaluate(reference.info_nce, inputs, {}), strict=True):
        assert relative_error(g, e) < 1e-10


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_show(backend: str, bad: float) -> None:
    inputs = draw(6, 6, 4)
    inputs["query"][2, 1] = bad
    assert HF.info_nce(**inputs, backend=backend).isnan()
    rows = HF.info_nce(**inputs, backend=backend, reduction="none")
    assert rows[2].isnan() and not rows[[0, 1, 3, 4, 5]].isnan().any()


def test_rows_without_negatives(backend: str) -> None:
    group = torch.zeros(4, dtype=torch.int64)
    inputs = draw(4, 4, 3)
    loss, positive, hardest, _ = HF.info_nce_with_statistics(
        inputs["query"].requires_grad_(), inputs["key"], query_group=group, key_group=group, backend=backend
    )
    loss.backward()
    assert loss == 0 and (inputs["query"].grad == 0).all() and (hardest == -torch.inf).all()
    torch.testing.assert_close(positive, F.cosine_similarity(inputs["query"], inputs["key"]).detach())


def test_statistics(backend: str) -> None:
    inputs = draw(7, 9, 6)
    _, positive, hardest, _ = HF.info_nce_with_statistics(**inputs, backend=backend)
    similarity = F.normalize(inputs["query"]) @ F.normalize(inputs["key"]).T
    torch.testing.assert_close(positive, similarity.diagonal())
    torch.testing.assert_close(hardest, similarity.fill_diagonal_(-2).amax(1))


def test_strided_and_mixed_inputs(backend: str) -> None:
    base = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    query, key = base[:, ::2].T[:12], base.to(torch.bfloat16)[:, 3:15]
    assert not query.is_contiguous() and not key.is_contiguous()
    q, k = query.detach().requires_grad_(), key.detach().requires_grad_()
    HF.info_nce(q, k, backend=backend).backward()
    expected = evaluate(reference.info_nce, {"query": query.double(), "key": key.double()}, {}, upstream=2.0)
    assert q.grad.dtype == torch.float32 and k.grad.dtype == torch.bfloat16
    assert relative_error(q.grad, expected[1]) < 1e-5 and relative_error(k.grad, expected[2]) < 1e-2


@pytest.mark.parametrize("only", ["query", "key", "negatives", "extra_logits", "temperature"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_some_inputs_need_gradients(backend: str, only: str, reduction: str) -> None:
    inputs = draw(6, 6, 5) | {"negatives": torch.randn(6, 5).double(), "extra_logits": torch.randn(6, 2).double()}
    inputs["temperature"] = torch.tensor(0.1, dtype=torch.float64)
    expected = dict(zip(["loss", *inputs], evaluate(reference.info_nce, inputs, {"reduction": reduction}), strict=True))
    leaves = {name: x.detach().clone().requires_grad_(name == only) for name, x in inputs.items()}
    value = HF.info_nce(**leaves, reduction=reduction, backend=backend)
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    (value * weights).sum().backward()
    assert relative_error(leaves[only].grad, expected[only]) < 1e-10
    assert all(x.grad is None for name, x in leaves.items() if name != only)


def test_no_grad_and_autocast(backend: str) -> None:
    inputs = {name: x.float() for name, x in draw(9, 9, 8).items()}
    plain = HF.info_nce(**inputs, backend=backend)
    with torch.no_grad():
        assert HF.info_nce(**inputs, backend=backend) == plain
    with torch.autocast("cpu", torch.bfloat16):
        within = evaluate(HF.info_nce, inputs, {"backend": backend})
    assert within[0] == plain and within[0].dtype == torch.float32
    for got, expected in zip(within, evaluate(HF.info_nce, inputs, {"backend": backend}), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_and_two_forwards_first(backend: str, reduction: str) -> None:
    first, second = draw(6, 6, 5, seed=1), draw(6, 6, 5, seed=2)
    q = [x["query"].requires_grad_() for x in (first, second)]
    losses = [HF.info_nce(**x, reduction=reduction, backend=backend).sum() for x in (first, second)]
    losses[0].backward(retain_graph=True)
    once = q[0].grad.clone()
    losses[0].backward()
    torch.testing.assert_close(q[0].grad, 2 * once)
    losses[1].backward()
    alone = second["query"].detach().requires_grad_()
    HF.info_nce(alone, second["key"], reduction=reduction, backend=backend).sum().backward()
    torch.testing.assert_close(q[1].grad, alone.grad)


def test_scaled_float16_does_not_underflow(backend: str) -> None:
    inputs = {name: x.half() for name, x in draw(64, 64, 16, spread=0.1).items()}
    options = {"temperature": 0.3, "backend": backend}
    scaled = evaluate(HF.info_nce, inputs, options, upstream=4096.0)
    exact = evaluate(
        reference.info_nce, {k: x.double() for k, x in inputs.items()}, {"temperature": 0.3}, upstream=4096.0
    )
    assert relative_error(scaled[1], exact[1]) < 2e-3


def test_every_row_weight_that_is_zero(backend: str) -> None:
    q = draw(5, 5, 4)["query"].requires_grad_()
    loss = HF.info_nce(q, draw(5, 5, 4)["key"], reduction="none", backend=backend)
    (loss * torch.tensor([0.0, 1, 0, 0, 0])).sum().backward()
    assert (q.grad[[0, 2, 3, 4]] == 0).all() and (q.grad[1] != 0).any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_compiled(backend: str, reduction: str, symmetric: bool) -> None:
    options = {"backend": backend, "reduction": reduction, "symmetric": symmetric}
    inputs = {name: x.float() for name, x in draw(8, 8, 6).items()}
    compiled = torch.compile(lambda **a: HF.info_nce(**a, **options), fullgraph=True, backend="aot_eager")
    for got, expected in zip(evaluate(compiled, inputs, {}), evaluate(HF.info_nce, inputs, options), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registered_operators(backend: str, dtype: torch.dtype) -> None:
    q, k = (x.to(dtype).requires_grad_() for x in draw(5, 6, 4).values())
    problem = Problem(q, k, torch.tensor(20.0)).flat()
    wanted = [True, True, False, False, False]
    torch.library.opcheck(torch.ops.hicl_fast.info_nce_mean.default, (*problem, "mean", wanted, backend))
    torch.library.opcheck(torch.ops.hicl_fast.info_nce_rows.default, (*problem, backend))


def test_bf16_products_stay_near(backend: str) -> None:
    inputs = {name: x.float() for name, x in draw(32, 32, 24).items()}
    exact = evaluate(reference.info_nce, {k: x.double() for k, x in inputs.items()}, {})
    got = evaluate(HF.info_nce, inputs, {"backend": backend, "precision": "bf16"})
    for g, e in zip(got, exact, strict=True):
        assert relative_error(g, e) < 2e-2


def test_the_comparison_can_fail(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slope that is off by a thousandth is found out."""
    inputs = draw(9, 9, 8)
    wrong = lambda **a: HF.info_nce(**a | {"temperature": 0.05005}, backend=backend)  # noqa: E731
    exact = evaluate(reference.info_nce, inputs, {})
    assert relative_error(evaluate(wrong, inputs, {})[1], exact[1]) > 1e-4


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("option", ["", "symmetric=True", "query_group=g, key_group=g", "reduction='none'"])
def test_no_matrix_of_all_pairs(backend: str, option: str) -> None:
    """N = 12288: one float32 matrix of all pairs is 604 MB."""
    program = f"""
import pathlib, torch, hicl_fast.functional as HF
q, k = (torch.randn(12288, 8).requires_grad_() for _ in range(2))
g = torch.arange(12288) // 2
HF.info_nce(q[:64], k[:64], backend={backend!r}).backward()
pathlib.Path("/proc/self/clear_refs").write_text("5")
status = lambda field: int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1]) // 1024
before = status("VmRSS")
HF.info_nce(q, k, backend={backend!r}{", " + option if option else ""}).sum().backward()
print(status("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 250, f"{done.stdout} MB"
