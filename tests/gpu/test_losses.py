"""The losses on a GPU, on every backend that is there, against the float64 reference on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hicl_fast.functional as HF
from hicl_fast import FusedHiCLLoss, reference
from tests.gpu.device import BACKENDS, DEVICE, SANITIZED_BACKENDS, first_on_the_cpu, needs_gpu, without_waiting

pytestmark = pytest.mark.gpu

# A bfloat16 gradient is rounded once at the end; float32 products may not use TF32 unless asked to.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
EXTRAS: dict[str, Any] = {
    "plain": {},
    "symmetric": {"symmetric": True},
    "margin": {"margin": 0.17},
    "groups excluded": {"groups": True, "same_group": "exclude"},
    "groups positive": {"groups": True, "same_group": "positive"},
    "own negatives": {"negatives": True, "hard_negative_weight": 0.5},
    "bank and extra logits": {"bank": True, "extra_logits": True},
}


def draw(n: int, d: int, dtype: torch.dtype, extra: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Float64 tensors that ``dtype`` holds exactly, those with a gradient first."""
    generator = torch.Generator().manual_seed(n + d)

    def rows(count: int, width: int = d) -> Tensor:
        return torch.randn(count, width, generator=generator).to(dtype).double()

    query = rows(n)
    inputs = {"query": query, "key": (query + 1.5 * rows(n)).to(dtype).double()}
    options = dict(extra)
    if options.pop("negatives", False):
        inputs["negatives"] = rows(n)
    if options.pop("extra_logits", False):
        inputs["extra_logits"] = rows(n, 3)
    if options.pop("bank", False):
        options["bank"] = rows(2 * n + 1)
    if options.pop("groups", False):
        options["query_group"] = options["key_group"] = torch.arange(n) // 3
    return inputs, options


def run(function: Any, inputs: dict[str, Tensor], options: dict[str, Any], device: str, dtype: Any) -> list[Tensor]:
    """Loss and gradients, under an upstream gradient that keeps float16's gradients out of its subnormal numbers."""

    def place(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)

    leaves = {name: place(x).clone().requires_grad_() for name, x in inputs.items()}
    loss = function(**leaves, **{name: place(x) for name, x in options.items()})
    rows = len(next(iter(inputs.values())))
    (300 * rows * loss).backward()
    return [x.detach().cpu().double() for x in (loss, *(leaf.grad for leaf in leaves.values()))]


def allowed(dtype: torch.dtype, options: dict[str, Any]) -> float:
    """Of a relative error: what the type has, and what two roundings of a similarity make of a small loss at 1/τ."""
    return TOLERANCE[dtype] + 2 * torch.finfo(torch.float32).eps / options.get("temperature", 0.05)


def assert_exact(backend: str, n: int, d: int, dtype: torch.dtype, extra: dict[str, Any]) -> None:
    inputs, options = draw(n, d, dtype, extra)
    exact = run(reference.info_nce, inputs, options, "cpu", torch.float64)
    got = run(HF.info_nce, inputs, {**options, "backend": backend}, DEVICE, dtype)
    for g, e in zip(got, exact, strict=True):
        assert (g - e).norm() <= allowed(dtype, options) * e.norm().clamp_min(1e-6)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_products_add_in_place(dtype: torch.dtype) -> None:
    """The library's products of 16-bit operands onto float32 sums: what every gradient of a large batch rests on."""
    from hicl_fast.ops.info_nce.triton_products import matmul

    a, b = (torch.randn(48, 48, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype) for seed in (0, 1))
    onto = torch.ones(48, 48, device=DEVICE)
    assert matmul(a, b, "ieee", onto=onto) is onto
    torch.testing.assert_close(onto.cpu().double(), a.cpu().double() @ b.cpu().double() + 1, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize(("n", "d"), first_on_the_cpu(2, (64, 768), (257, 95), (2100, 768)))
def test_exact(backend: str, dtype: torch.dtype, extra: dict[str, Any], n: int, d: int) -> None:
    assert_exact(backend, n, d, dtype, extra)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0])
@pytest.mark.parametrize("n", [1, 2, 127, 128, 129])
def test_tile_edges(backend: str, n: int, temperature: float) -> None:
    assert_exact(backend, n, 64, torch.float32, {"temperature": temperature})


@pytest.mark.parametrize("backend", SANITIZED_BACKENDS)
@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
def test_small(backend: str, extra: dict[str, Any]) -> None:
    assert_exact(backend, 37, 21, torch.float32, extra)


# Of each way through the paradigm's passes, one; see tests/ops/test_paradigm.py for the rest.
PARADIGM: dict[str, dict[str, Any]] = {
    "hinge": {"objective": "met"},
    "down the columns too": {"objective": "mhs", "modified": ("gd", "r"), "ratio": 1.5},
    "softmax": {"objective": "custom"},
    "sharp softmax": {"objective": "custom", "temperature": 0.01},
    "power": {"objective": "custom", "weight": ("power", 3), "dissipation": None},
    "log-sum-exp": {"objective": "custom", "weight": "hardest"},
    "function": {"objective": "custom", "weight": lambda s, rows: (3 * (s - rows.hardest[:, None])).exp()},
    "within a view": {"objective": "mhe", "modified": ("gd", "w", "r"), "ratio": 1.5},
    "no similarities": {"objective": "barlow_twins"},
}
each_paradigm = pytest.mark.parametrize("options", PARADIGM.values(), ids=PARADIGM)


def assert_paradigm_exact(backend: str, n: int, d: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    drawn, _ = draw(n, d, dtype, {})
    views = {"u": drawn["query"], "v": drawn["key"]}
    exact = run(reference.paradigm, views, options, "cpu", torch.float64)
    got = run(HF.paradigm, views, {**options, "backend": backend}, DEVICE, dtype)
    rounding = 1e-6 / options.get("temperature", 0.05)  # of a similarity, and what weights make of it
    for g, e in zip(got, exact, strict=True):
        assert (g - e).norm() <= (TOLERANCE[dtype] + rounding) * e.norm().clamp_min(1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@each_paradigm
@pytest.mark.parametrize(("n", "d"), first_on_the_cpu(2, (64, 768), (257, 95), (1100, 768)))
def test_paradigm(backend: str, dtype: torch.dtype, options: dict[str, Any], n: int, d: int) -> None:
    assert_paradigm_exact(backend, n, d, dtype, options)


@pytest.mark.parametrize("backend", SANITIZED_BACKENDS)
@each_paradigm
def test_paradigm_small(backend: str, options: dict[str, Any]) -> None:
    assert_paradigm_exact(backend, 37, 21, torch.float32, options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [70, 700])
def test_paradigm_ties(backend: str, n: int) -> None:
    """Similarities that are exact, and mostly equal to others: the first gets the gradient."""
    generator = torch.Generator().manual_seed(n)
    drawn = (torch.randint(0, 2, (n, 16), generator=generator).mul_(2).sub_(1).double() for _ in range(2))
    views = dict(zip(("u", "v"), drawn, strict=True))
    for objective in ("mpt", "mhs"):
        options = {"objective": objective}
        exact = run(reference.paradigm, views, options, "cpu", torch.float64)
        got = run(HF.paradigm, views, {**options, "backend": backend}, DEVICE, torch.float32)
        for g, e in zip(got, exact, strict=True):
            assert (g - e).norm() <= 1e-5 * e.norm()


@pytest.mark.parametrize("backend", SANITIZED_BACKENDS)
@pytest.mark.parametrize("lengths", [[1], [3, 1, 5], [1] * 70 + [90]], ids=len)
def test_segment_pool(backend: str, lengths: list[int]) -> None:
    assert_pooled(backend, lengths)


def assert_pooled(backend: str, lengths: list[int]) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    segments = torch.randn(sum(lengths), 65, dtype=torch.float64)
    weights = torch.randint(1, 33, (sum(lengths),)).double()
    results = []
    for pool, device, dtype in (
        (lambda *a: HF.segment_pool(*a, backend=backend), DEVICE, torch.float32),
        (reference.segment_pool, "cpu", torch.float64),
    ):
        h, w = (x.to(device, dtype, copy=True).requires_grad_() for x in (segments, weights))
        pool(h, offsets.to(device), w).square().sum().backward()
        results.append([h.grad.cpu().double(), w.grad.cpu().double()])
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_host_does_not_wait(backend: str) -> None:
    offsets = torch.arange(0, 65, 4, device=DEVICE)
    h, positive = (torch.randn(64, 32, device=DEVICE).requires_grad_() for _ in range(2))
    lengths = torch.full((64,), 32, device=DEVICE)
    loss = FusedHiCLLoss(backend=backend)
    loss(h, positive, offsets, lengths).backward()  # compiles
    with without_waiting():
        loss(h, positive, offsets, lengths).backward()


@pytest.mark.parametrize("backend", BACKENDS)
@each_paradigm
def test_the_host_does_not_wait_for_the_paradigm(backend: str, options: dict[str, Any]) -> None:
    u, v = (torch.randn(64, 32, device=DEVICE).requires_grad_() for _ in range(2))
    HF.paradigm(u, v, backend=backend, **options).backward()  # compiles
    with without_waiting():
        HF.paradigm(u, v, backend=backend, **options).backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend: str) -> None:
    inputs, options = draw(700, 256, torch.bfloat16, {"symmetric": True})
    first, second = (run(HF.info_nce, inputs, {**options, "backend": backend}, DEVICE, torch.bfloat16) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled(backend: str) -> None:
    inputs, _ = draw(96, 48, torch.float32, {})
    options = {"backend": backend}
    compiled = torch.compile(HF.info_nce, fullgraph=True)
    eager, traced = (run(f, inputs, options, DEVICE, torch.float32) for f in (HF.info_nce, compiled))
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_matrix_of_similarities(backend: str) -> None:
    n, d = 32768, 64
    query, key = (torch.randn(n, d, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    HF.info_nce(query[:256], key[:256], backend=backend).backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    HF.info_nce(query, key, backend=backend).backward()
    assert torch.cuda.max_memory_allocated() - before < n * n * 2
