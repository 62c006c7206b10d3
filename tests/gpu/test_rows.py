"""The kernels of csrc/cuda that work row by row, on a GPU, against float64 on the CPU; tests/cuda has them emulated."""

from __future__ import annotations

import itertools

import pytest
import torch

from hicl_fast.ops.backends import registry

pytest.importorskip("triton")

from hicl_fast.ops.common import cuda_rows  # noqa: E402
from hicl_fast.ops.common.row_kernels import row_kernels  # noqa: E402
from tests.cuda.test_rows import FLOOR, PARTNERS, TYPES, assert_gradient, assert_normalised, draw_gradient, rows
from tests.gpu.device import DEVICE, needs_gpu, sanitized

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_backend")]


@pytest.mark.parametrize(
    ("d", "dtype"),
    sanitized(
        (33, torch.float32),
        (1025, torch.bfloat16),
        (8200, torch.float16),
        all_of=list(itertools.product([33, 40, 768, 1025, 1032, 8200], TYPES)),
    ),
    ids=str,
)
def test_norms_and_unit_rows(d: int, dtype: torch.dtype) -> None:
    assert_normalised(rows(9, d, dtype).to(DEVICE))


@pytest.mark.parametrize("kind", PARTNERS)
@pytest.mark.parametrize(
    ("d", "dtype"),
    sanitized(
        (33, torch.float32), (1032, torch.bfloat16), all_of=list(itertools.product([33, 768, 1032, 4097], TYPES))
    ),
    ids=str,
)
def test_gradient(d: int, kind: str, dtype: torch.dtype) -> None:
    assert_gradient(*draw_gradient(6, d, dtype, kind), device=DEVICE)


def test_the_large_batch_path_takes_them() -> None:
    assert row_kernels(torch.device(DEVICE)) is cuda_rows
    assert registry.is_available("cuda")


@needs_gpu
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
