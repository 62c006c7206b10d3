"""One case of each kernel against float64: what ``make gpu-first`` runs. The other files of this folder have the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hicl_fast.ops.info_nce import triton_operands
from tests.gpu import test_cuda, test_losses, test_rules
from tests.gpu.device import BACKENDS, DEVICE, IS_GPU, needs_gpu

pytestmark = pytest.mark.gpu

# PyTorch's own kernels are not ours to check, but stand in for them on the CPU.
OURS = [name for name in BACKENDS if name != "torch" or not IS_GPU]
each_of_ours = pytest.mark.parametrize("backend", OURS)
with_cuda = pytest.mark.usefixtures("cuda_backend")
LENGTHS = [1] * 70 + [90]


@pytest.fixture(params=[*OURS, "cuda"])
def any_of_ours(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        request.getfixturevalue("cuda_backend")
    return request.param


@each_of_ours
@pytest.mark.parametrize("extra", test_losses.EXTRAS.values(), ids=test_losses.EXTRAS)
def test_info_nce(backend: str, extra: dict[str, Any]) -> None:
    """Rows that begin at multiples of 16 bytes, more than fill a tile."""
    test_losses.assert_exact(backend, 257, 768, torch.bfloat16, extra)


@each_of_ours
@pytest.mark.parametrize(("dtype", "d"), [(torch.bfloat16, 95), (torch.float16, 768), (torch.float32, 768)], ids=str)
def test_info_nce_under_other_tiles(backend: str, dtype: torch.dtype, d: int) -> None:
    test_losses.assert_exact(backend, 257, d, dtype, {})


@pytest.mark.triton
@needs_gpu
def test_tritons_row_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which csrc/cuda's take the place of."""
    from hicl_fast.kernels import rows

    monkeypatch.setattr(triton_operands, "row_kernels", lambda device: rows)
    test_losses.assert_exact("triton", 257, 768, torch.bfloat16, {})


@each_of_ours
@pytest.mark.parametrize("name", test_rules.CASES)
def test_rules_of_columns(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test_rules.assert_exact(name, backend, monkeypatch)


@each_of_ours
@pytest.mark.parametrize("name", ["down the columns too", "softmax", "power"])
def test_paradigm(name: str, backend: str) -> None:
    test_losses.assert_paradigm_exact(backend, 257, 95, torch.bfloat16, test_losses.PARADIGM[name])


def test_hard_negatives(any_of_ours: str) -> None:
    test_cuda.assert_hardest(any_of_ours, torch.bfloat16, 257, 300, 96, 10)


def test_mixed_negatives(any_of_ours: str) -> None:
    test_cuda.assert_mixed(any_of_ours, torch.bfloat16, (37, 264, 10, 40))


def test_segment_pool(any_of_ours: str) -> None:
    test_losses.assert_pooled(any_of_ours, LENGTHS)


@with_cuda
@pytest.mark.parametrize("extra", test_cuda.EXTRAS.values(), ids=test_cuda.EXTRAS)
def test_cuda_info_nce(extra: dict[str, Any]) -> None:
    test_cuda.assert_exact(65, 768, torch.bfloat16, extra)


@pytest.fixture
def rounded_products() -> Iterator[None]:
    """PyTorch's own products of float32 are rounded to TF32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@needs_gpu
@pytest.mark.triton
@pytest.mark.usefixtures("rounded_products")
def test_products_in_every_digit() -> None:
    from hicl_fast.ops.info_nce.triton_products import matmul

    a, b = (torch.randn(130, 130, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    exact = a.double() @ b.double()
    for precision, least, most in (("ieee", 0.0, 1e-6), ("tf32", 1e-5, 1e-2)):
        error = (matmul(a.to(DEVICE), b.to(DEVICE), precision).cpu().double() - exact).norm() / exact.norm()
        assert least <= error <= most
