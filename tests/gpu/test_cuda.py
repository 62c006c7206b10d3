"""The ``cuda`` backend on a GPU, against the float64 reference on the CPU; csrc/cuda is emulated in tests/cuda."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hicl_fast
import hicl_fast.functional as HF
from hicl_fast import FusedHiCLLoss, FusedInfoNCELoss, reference
from hicl_fast.backend import registry
from tests.gpu.test_losses import DEVICE, TOLERANCE, draw, run

HAS_CUDA = any(status.name == "cuda" and status.available for status in hicl_fast.backends())
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="the extension has no CUDA kernels")]

EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "margin": {"margin": 0.17},
    "own negatives": {"negatives": True, "hard_negative_weight": 0.5},
    "sharp": {"temperature": 0.01},
}


def assert_exact(n: int, d: int, dtype: torch.dtype, extra: dict[str, Any]) -> None:
    inputs, options = draw(n, d, dtype, extra)
    exact = run(reference.info_nce, inputs, options, "cpu", torch.float64)
    got = run(HF.info_nce, inputs, {**options, "backend": "cuda"}, DEVICE, dtype)
    for g, e in zip(got, exact, strict=True):
        assert (g - e).norm() <= TOLERANCE[dtype] * e.norm().clamp_min(1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize(("n", "d"), [(2, 8), (64, 768), (65, 1024), (257, 95), (512, 768), (1024, 1024)])
def test_info_nce(dtype: torch.dtype, extra: dict[str, Any], n: int, d: int) -> None:
    assert_exact(n, d, dtype, extra)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("n", "d"), [(37, 21), (70, 72)])
def test_info_nce_small(dtype: torch.dtype, n: int, d: int) -> None:
    assert_exact(n, d, dtype, EXTRAS["own negatives"])


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", [[1], [3, 1, 5], [1] * 70 + [90], [5000, 1, 300]], ids=len)
@pytest.mark.parametrize("d", [65, 768])
def test_segment_pool(d: int, lengths: list[int], dtype: torch.dtype) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    segments = torch.randn(sum(lengths), d).to(dtype).double()
    weights = torch.randint(1, 33, (sum(lengths),)).double()
    upstream = torch.randint(-4, 5, (len(lengths), d)).double()
    results = []
    for pool, device, kind in (
        (lambda *a: HF.segment_pool(*a, backend="cuda"), DEVICE, dtype),
        (reference.segment_pool, "cpu", torch.float64),
    ):
        h = segments.to(device, kind, copy=True).requires_grad_()
        w = weights.to(device, torch.float32 if device == DEVICE else kind, copy=True).requires_grad_()
        pooled = pool(h, offsets.to(device), w)
        pooled.backward(upstream.to(device, pooled.dtype))
        results.append([x.detach().cpu().double() for x in (pooled, h.grad, w.grad)])
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


def test_it_is_preferred_where_it_does_the_call() -> None:
    assert registry.choose("auto", "info_nce", DEVICE, torch.float32) == "cuda"
    assert registry.choose("auto", "segment_pool", DEVICE, torch.bfloat16) == "cuda"
    assert registry.choose("auto", "info_nce", DEVICE, torch.float32, ("a bank",)) != "cuda"


def test_two_runs_give_the_same_bits() -> None:
    inputs, options = draw(700, 256, torch.bfloat16, {})
    first, second = (run(HF.info_nce, inputs, {**options, "backend": "cuda"}, DEVICE, torch.bfloat16) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_host_does_not_wait() -> None:
    offsets = torch.arange(0, 65, 4, device=DEVICE)
    h, positive = (torch.randn(64, 32, device=DEVICE).requires_grad_() for _ in range(2))
    lengths = torch.full((64,), 32, device=DEVICE)
    learned, pooled = FusedInfoNCELoss(learnable_temperature=True).to(DEVICE), FusedHiCLLoss()
    for step in range(2):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first call compiles what Triton has of it
        try:
            (learned(h, positive) + pooled(h, positive, offsets, lengths)).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_under_a_graph_and_on_another_stream() -> None:
    query, key = (torch.randn(128, 256, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        HF.info_nce(query, key, backend="cuda").backward()
        query.grad = key.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            loss = HF.info_nce(query, key, backend="cuda")
    with torch.no_grad():
        query.copy_(torch.randn_like(query))
    graph.replay()
    torch.testing.assert_close(loss, HF.info_nce(query, key, backend="cuda"), rtol=0, atol=0)


def test_the_tensors_device_is_used() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    query, key = (torch.randn(64, 32, device="cuda:1") for _ in range(2))
    exact = reference.info_nce(query.double().cpu(), key.double().cpu())
    torch.testing.assert_close(HF.info_nce(query, key, backend="cuda").double().cpu(), exact, rtol=1e-5, atol=1e-6)


def test_compiled() -> None:
    inputs, _ = draw(96, 48, torch.float32, {})
    compiled = torch.compile(HF.info_nce, fullgraph=True)
    eager, traced = (run(f, inputs, {"backend": "cuda"}, DEVICE, torch.float32) for f in (HF.info_nce, compiled))
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
