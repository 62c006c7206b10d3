"""The float32 product of our own, against float64, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from hicl_fast.kernels import products  # noqa: E402
from hicl_fast.kernels.products import product  # noqa: E402

from hicl_fast.ops.info_nce import triton_products  # noqa: E402

pytestmark = [pytest.mark.interpret, pytest.mark.triton]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "k", "m"), [(1, 1, 1), (31, 33, 65), (32, 32, 32), (40, 7, 3), (0, 4, 5), (4, 0, 5)])
def test_product(n: int, k: int, m: int) -> None:
    a, b, onto = draw(n, k), draw(k, m, seed=1), draw(n, m, seed=2)
    exact = a.double() @ b.double()
    torch.testing.assert_close(product(a, b).double(), exact, rtol=1e-5, atol=1e-5)
    transposed = product(*(x.T.clone(memory_format=torch.contiguous_format).T for x in (a, b, onto)))
    torch.testing.assert_close(transposed.double(), exact + onto.double(), rtol=1e-5, atol=1e-5)


def test_it_is_taken_where_the_librarys_would_be_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(products, "product", lambda a, b, onto=None: taken.append(a) or a @ b)
    a, b = draw(4, 5), draw(5, 6, seed=1)
    for setting, precision, is_own in (
        ("ieee", "ieee", False),
        ("tf32", "ieee", True),
        ("tf32", "tf32", False),
    ):
        taken.clear()
        monkeypatch.setattr(triton_products, "float32_products", lambda device_type, setting=setting: setting)
        torch.testing.assert_close(triton_products.matmul(a, b, precision), a @ b)
        assert bool(taken) == is_own
