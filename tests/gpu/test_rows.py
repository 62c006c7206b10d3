"""The kernels of csrc/cuda that work row by row, on a GPU, against float64 on the CPU; tests/cuda has them emulated."""

from __future__ import annotations

import pytest
import torch

import hicl_fast
from hicl_fast.backend import registry

pytest.importorskip("triton")

from hicl_fast.backend import cuda_rows  # noqa: E402
from hicl_fast.backend.row_kernels import row_kernels  # noqa: E402
from tests.cuda.test_rows import FLOOR, PARTNERS, TYPES, assert_gradient, assert_normalised, draw_gradient, rows
from tests.gpu.test_losses import DEVICE

HAS_CUDA = any(status.name == "cuda" and status.available for status in hicl_fast.backends())
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="the extension has no CUDA kernels")]


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("d", [33, 40, 768, 1025, 1032, 8200])
def test_norms_and_unit_rows(d: int, dtype: torch.dtype) -> None:
    assert_normalised(rows(9, d, dtype).to(DEVICE))


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", PARTNERS)
@pytest.mark.parametrize("d", [33, 768, 1032, 4097])
def test_gradient(d: int, kind: str, dtype: torch.dtype) -> None:
    assert_gradient(*draw_gradient(6, d, dtype, kind), device=DEVICE)


def test_the_large_batch_path_takes_them() -> None:
    assert row_kernels(torch.device(DEVICE)) is cuda_rows
    assert registry.is_available("cuda")


def test_more_than_two_to_the_31_elements() -> None:
    n, d = (1 << 22) + 5, 513  # odd: one element at a time
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GB of the GPU's memory")
    x = torch.ones(n, d, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = 2
    unit = torch.empty_like(x)
    inverse = cuda_rows.normalise(x, FLOOR, unit).inverse
    torch.testing.assert_close(inverse[[0, -1]].cpu(), torch.tensor([1.0, 0.5]) * d**-0.5)
    torch.testing.assert_close(unit[-3:].float().cpu(), torch.full((3, d), d**-0.5), rtol=1e-2, atol=0)
