"""A call leaves nothing of the process changed, not even for a moment that another thread could see."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import hicl_fast
import hicl_fast.functional as HF
from hicl_fast import reference

BACKENDS = [s.name for s in hicl_fast.backends() if s.available and s.name in ("torch", "cpp")]

# Every setting of PyTorch's that has to do with how a product is rounded, and what it can be set to.
PRECISIONS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "fp32_precision": (torch.backends, ("ieee", "tf32", "none")),
    "mkldnn.fp32_precision": (torch.backends.mkldnn, ("ieee", "tf32", "bf16", "none")),
    "mkldnn.matmul": (torch.backends.mkldnn.matmul, ("ieee", "tf32", "bf16", "none")),
    "cuda.matmul": (torch.backends.cuda.matmul, ("ieee", "tf32", "none")),
}


def precisions() -> dict[str, str]:
    return {name: module.fp32_precision for name, (module, _) in PRECISIONS.items()}


def state() -> dict[str, Any]:
    """What a user can have set, as far as PyTorch tells."""
    return {
        **precisions(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "mkldnn": torch._C._get_mkldnn_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "grad": torch.is_grad_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "random": torch.random.get_rng_state().tolist(),
        "subnormal": float(torch.tensor(1e-40) * 1),
    }


@pytest.fixture
def restored() -> Iterator[None]:
    before = {name: module.fp32_precision for name, (module, _) in PRECISIONS.items()}
    yield
    for name, (module, _) in PRECISIONS.items():
        module.fp32_precision = before[name]


def calls(backend: str) -> list[Callable[[], torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    q, k, n = (torch.randn(24, 16, generator=generator) for _ in range(3))
    half = [x.bfloat16() for x in (q, k)]
    offsets = torch.tensor([0, 3, 24])

    def backward(loss: torch.Tensor, *leaves: torch.Tensor) -> torch.Tensor:
        torch.autograd.grad(loss, leaves)
        return loss.detach()

    def of(*inputs: torch.Tensor, **options: Any) -> torch.Tensor:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        return backward(HF.info_nce(*leaves, backend=backend, **options).sum(), *leaves)

    def under_autocast() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return of(q, k)

    mixing = HF.Mixing(3, torch.zeros(24, 2, 2, dtype=torch.int64))
    return [
        lambda: of(q, k),
        lambda: of(*half),
        lambda: of(q, k, precision="bf16"),
        lambda: of(q, k, precision="float32"),
        lambda: of(*half, precision="float32", symmetric=True),
        lambda: of(q, k, precision="bf16", reduction="none"),
        lambda: of(q, k, mixing=mixing),
        under_autocast,
        lambda: HF.hard_negatives(q, k, 3, backend=backend)[0],
        lambda: HF.paradigm(q, k, "custom", backend=backend),
        lambda: HF.segment_pool(n, offsets, backend=backend),
        lambda: HF.positive_mixing(q, k, n, weights="search"),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_setting_is_touched(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even set to what it was: that would pin what the user left to its parent setting."""

    def refuse(*args: Any) -> None:
        raise AssertionError(f"a call sets {args}")

    for setter in ("_set_fp32_precision_setter", "_set_float32_matmul_precision", "_set_cublas_allow_tf32"):
        monkeypatch.setattr(torch._C, setter, refuse)
    monkeypatch.setattr(torch, "set_num_threads", refuse)
    before = state()
    for call in calls(backend):
        assert torch.isfinite(call()).all()
    assert state() == before


@pytest.mark.parametrize("name", PRECISIONS)
def test_settings_of_the_users_stay_and_are_inherited(name: str, restored: None) -> None:
    module, values = PRECISIONS[name]
    for value in values:
        module.fp32_precision = value
        before = precisions()
        for backend in BACKENDS:
            for call in calls(backend)[1:4]:
                call()
        assert precisions() == before


def test_threads_do_not_see_each_others_precision(restored: None) -> None:
    """Eight threads with calls of every precision, while the settings and an unrelated product are watched."""
    before, seen = precisions(), []
    a = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    product = a @ a
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append((precisions(), torch.equal(a @ a, product)))

    expected = [[call() for call in calls(backend)] for backend in BACKENDS]
    failures: list[str] = []

    def work() -> None:
        for _ in range(5):
            for backend, values in zip(BACKENDS, expected, strict=True):
                for i, (call, value) in enumerate(zip(calls(backend), values, strict=True)):
                    if not torch.allclose(call(), value, rtol=1e-6):
                        failures.append(f"{backend}, call {i}")

    watcher, workers = threading.Thread(target=watch), [threading.Thread(target=work) for _ in range(8)]
    for thread in (watcher, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    watcher.join()
    assert not failures
    assert len(seen) > 10 and all(settings == before and same for settings, same in seen)
    assert precisions() == before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"reduction": "none"}], ids=str)
def test_float32_is_float32_whatever_the_process_allows(backend: str, options: dict[str, Any], restored: None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(64, 512, generator=generator) for _ in range(2))

    def evaluate(loss: Callable[..., torch.Tensor], *inputs: torch.Tensor, **more: Any) -> list[torch.Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        value = loss(*leaves, **options, **more)
        return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]

    exact = evaluate(reference.info_nce, q.double(), k.double())
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    for got, expected in zip(evaluate(HF.info_nce, q, k, backend=backend, precision="float32"), exact, strict=True):
        assert got.dtype == torch.float32
        assert float((got.double() - expected).norm() / expected.norm()) < 2e-6
