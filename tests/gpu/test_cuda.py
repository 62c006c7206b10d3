"""The ``cuda`` backend on a GPU, against the float64 reference on the CPU; csrc/cuda is emulated in tests/cuda."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import hicl_fast.functional as HF
from hicl_fast import FusedHiCLLoss, FusedInfoNCELoss, reference
from hicl_fast.ops.backends import registry
from tests.gpu.device import DEVICE, first_on_the_cpu, needs_gpu, sanitized, without_waiting
from tests.gpu.test_losses import TOLERANCE, allowed, draw, run

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_backend")]

EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "margin": {"margin": 0.17},
    "own negatives": {"negatives": True, "hard_negative_weight": 0.5},
    "groups and extra logits": {"groups": True, "extra_logits": True},
    "sharp": {"temperature": 0.01},
}


def assert_exact(n: int, d: int, dtype: torch.dtype, extra: dict[str, Any]) -> None:
    inputs, options = draw(n, d, dtype, extra)
    exact = run(reference.info_nce, inputs, options, "cpu", torch.float64)
    got = run(HF.info_nce, inputs, {**options, "backend": "cuda"}, DEVICE, dtype)
    for g, e in zip(got, exact, strict=True):
        assert (g - e).norm() <= allowed(dtype, options) * e.norm().clamp_min(1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize(
    ("n", "d"), first_on_the_cpu(4, (2, 8), (64, 768), (65, 1024), (257, 95), (512, 768), (1024, 1024))
)
def test_info_nce(dtype: torch.dtype, extra: dict[str, Any], n: int, d: int) -> None:
    assert_exact(n, d, dtype, extra)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("n", "d"), [(37, 21), (70, 72)])
def test_info_nce_small(dtype: torch.dtype, n: int, d: int) -> None:
    assert_exact(n, d, dtype, EXTRAS["own negatives"])


@pytest.mark.parametrize("lengths", [[1], [3, 1, 5], [1] * 70 + [90], [5000, 1, 300]], ids=len)
@pytest.mark.parametrize(
    ("d", "dtype"),
    sanitized((65, torch.float32), (768, torch.bfloat16), all_of=list(itertools.product([65, 768], TOLERANCE))),
    ids=str,
)
def test_segment_pool(d: int, lengths: list[int], dtype: torch.dtype) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    segments = torch.randn(sum(lengths), d).to(dtype).double()
    weights = torch.randint(1, 33, (sum(lengths),)).double()
    upstream = torch.randint(-4, 5, (len(lengths), d)).double()
    results = []
    for pool, device, kinds in (
        (lambda *a: HF.segment_pool(*a, backend="cuda"), DEVICE, (dtype, torch.float32)),
        (reference.segment_pool, "cpu", (torch.float64, torch.float64)),
    ):
        h, w = (
            x.to(device, kind, copy=True).requires_grad_() for x, kind in zip((segments, weights), kinds, strict=True)
        )
        pooled = pool(h, offsets.to(device), w)
        pooled.backward(upstream.to(device, pooled.dtype))
        results.append([x.detach().cpu().double() for x in (pooled, h.grad, w.grad)])
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("n", "m", "d", "k"),
    first_on_the_cpu(2, (64, 64, 768, 10), (257, 300, 95, 63), (512, 512, 768, 10), (1024, 1024, 1024, 128)),
)
def test_hard_negatives(dtype: torch.dtype, n: int, m: int, d: int, k: int) -> None:
    assert_hardest("cuda", dtype, n, m, d, k)


def assert_hardest(backend: str, dtype: torch.dtype, n: int, m: int, d: int, k: int) -> None:
    generator = torch.Generator().manual_seed(n)
    query, key = (torch.randn(rows, d, generator=generator).to(dtype) for rows in (n, m))
    similarity, index = HF.hard_negatives(query.to(DEVICE), key.to(DEVICE), k, backend=backend)
    exact, _ = reference.hard_negatives(query.double(), key.double(), k)
    every = reference.normalise(query.double()) @ reference.normalise(key.double()).T
    assert (similarity.cpu().double() - exact).abs().max() <= 2e-6
    assert (every.gather(1, index.cpu()) - exact).abs().max() <= 2e-6
    assert (index.sort(dim=1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("m", [70, 300, 1024])
def test_equal_keys_come_in_their_order(dtype: torch.dtype, m: int) -> None:
    """The same product wherever a key lies in a tile: what ties rest on."""
    generator = torch.Generator().manual_seed(m)
    query, few = (torch.randn(rows, 200, generator=generator).to(dtype) for rows in (100, 4))
    which = torch.randint(0, 4, (m,), generator=generator)
    k = min(m, 128)
    _, index = HF.hard_negatives(query.to(DEVICE), few[which].to(DEVICE), k, exclude_target=False, backend="cuda")
    exact = (reference.normalise(query.double()) @ reference.normalise(few.double()).T)[:, which]
    assert torch.equal(index.cpu(), exact.sort(dim=1, descending=True, stable=True).indices[:, :k])


def mixed_logits(
    function: Any, query: Tensor, key: Tensor, index: Tensor, pairs: Tensor, **options: Any
) -> list[Tensor]:
    """Logits and gradients, in float64 on the CPU."""
    leaves = [x.clone().requires_grad_() for x in (query, key)]
    logits = function(*leaves, index, pairs, alpha=0.3, **options)
    gradients = torch.autograd.grad(logits, leaves, torch.linspace(-10, 20, logits.numel()).view_as(logits).to(logits))
    return [x.detach().cpu().double() for x in (logits, *gradients)]


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    sanitized(
        ((5, 40, 3, 7), torch.float32),
        ((70, 75, 10, 40), torch.float16),
        ((37, 264, 64, 130), torch.bfloat16),
        all_of=list(itertools.product([(5, 40, 3, 7), (70, 75, 10, 40), (37, 264, 64, 130)], TOLERANCE)),
    ),
    ids=str,
)
def test_mixed_negatives(dtype: torch.dtype, sizes: tuple[int, int, int, int]) -> None:
    assert_mixed("cuda", dtype, sizes)


def assert_mixed(backend: str, dtype: torch.dtype, sizes: tuple[int, int, int, int]) -> None:
    n, d, k, num_mixed = sizes
    generator = torch.Generator().manual_seed(n)
    query, key = (torch.randn(rows, d, generator=generator).to(dtype) for rows in (n, 2 * n))
    index, pairs = torch.randint(0, n, (n, k), generator=generator), HF.random_pairs(n, num_mixed, k, seed=0)
    on_device = (x.to(DEVICE) for x in (query, key, index, pairs))
    got = mixed_logits(HF.mixed_negative_logits, *on_device, backend=backend)
    exact = mixed_logits(reference.mixed_negative_logits, query.double(), key.double(), index, pairs)
    for g, e in zip(got, exact, strict=True):
        assert (g - e).norm() <= TOLERANCE[dtype] * e.norm()


@pytest.mark.sanitizer
@pytest.mark.parametrize(("n", "m", "k"), [(37, 70, 10), (9, 300, 20)])
def test_hard_negatives_small(n: int, m: int, k: int) -> None:
    query, key = torch.randn(n, 72, device=DEVICE), torch.randn(m, 72, device=DEVICE)
    similarity, _ = HF.hard_negatives(query, key, k, backend="cuda")
    exact, _ = reference.hard_negatives(query.cpu().double(), key.cpu().double(), k)
    torch.testing.assert_close(similarity.cpu().double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("n", "d"), first_on_the_cpu(1, (64, 768), (256, 768), (512, 384)))
def test_info_nce_with_mixing(dtype: torch.dtype, n: int, d: int) -> None:
    inputs, _ = draw(n, d, dtype, {})
    mixing = HF.Mixing(10, HF.random_pairs(n, 40, 10, seed=0), 0.5)
    on_device = HF.Mixing(10, mixing.pairs.to(DEVICE), 0.5)
    query, key = (x.to(DEVICE, dtype) for x in inputs.values())
    chosen = HF.info_nce_with_statistics(query, key, mixing=on_device, backend="cuda").hard_negatives.cpu()

    def composed(query: Tensor, key: Tensor) -> Tensor:
        mixed = reference.mixed_negative_logits(query, key, chosen, mixing.pairs, temperature=0.05)
        return reference.info_nce(query, key, temperature=0.05, extra_logits=mixed)

    exact = run(composed, inputs, {}, "cpu", torch.float64)
    got = run(HF.info_nce, inputs, {"mixing": on_device, "backend": "cuda"}, DEVICE, dtype)
    for g, e in zip(got, exact, strict=True):
        assert (g - e).norm() <= 2 * TOLERANCE[dtype] * e.norm().clamp_min(1e-6)


def test_it_is_preferred_where_it_does_the_call() -> None:
    assert registry.choose("auto", "info_nce", DEVICE, torch.float32) == "cuda"
    for operator in ("segment_pool", "hard_negatives", "mixed_negatives"):
        assert registry.choose("auto", operator, DEVICE, torch.bfloat16) == "cuda"
    assert registry.choose("auto", "info_nce", DEVICE, torch.float32, ("a bank",)) != "cuda"


@pytest.mark.parametrize(("n", "d"), first_on_the_cpu(1, (70, 72), (700, 256)))
def test_two_runs_give_the_same_bits(n: int, d: int) -> None:
    inputs, _ = draw(n, d, torch.bfloat16, {})
    mixing = HF.Mixing(10, HF.random_pairs(n, 40, 10, seed=0, device=DEVICE))
    for options in ({"backend": "cuda"}, {"backend": "cuda", "mixing": mixing}):
        first, second = (run(HF.info_nce, inputs, options, DEVICE, torch.bfloat16) for _ in "ab")
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_host_does_not_wait() -> None:
    offsets = torch.arange(0, 65, 4, device=DEVICE)
    h, positive = (torch.randn(64, 32, device=DEVICE).requires_grad_() for _ in range(2))
    lengths = torch.full((64,), 32, device=DEVICE)
    learned, pooled = FusedInfoNCELoss(learnable_temperature=True).to(DEVICE), FusedHiCLLoss()
    mixing = HF.Mixing(10, HF.random_pairs(64, 40, 10, seed=0, device=DEVICE))
    for step in range(2):
        with without_waiting() if step else contextlib.nullcontext():  # the first call compiles what Triton has of it
            mixed = HF.info_nce(h, positive, mixing=mixing, backend="cuda")
            (learned(h, positive) + pooled(h, positive, offsets, lengths) + mixed).backward()


@needs_gpu
@pytest.mark.parametrize("is_mixed", [False, True])
def test_under_a_graph_and_on_another_stream(is_mixed: bool) -> None:
    pairs = HF.random_pairs(128, 40, 10, seed=0, device=DEVICE)
    options: dict[str, Any] = {"backend": "cuda", "mixing": HF.Mixing(10, pairs) if is_mixed else None}
    query, key = (torch.randn(128, 256, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        HF.info_nce(query, key, **options).backward()
        query.grad = key.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            loss = HF.info_nce(query, key, **options)
    with torch.no_grad():
        query.copy_(torch.randn_like(query))
    graph.replay()
    torch.testing.assert_close(loss, HF.info_nce(query, key, **options), rtol=0, atol=0)


@needs_gpu
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
