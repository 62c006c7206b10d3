"""The kernels of csrc/cuda that work row by row, emulated on the CPU, against float64; the large-batch path over them."""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

import hicl_fast.functional as HF
from hicl_fast import reference
from hicl_fast.reference import normalise

pytest.importorskip("triton")  # kernels/rows.py, whose functions these are, imports it

from hicl_fast.kernels import rows as triton_rows  # noqa: E402
from hicl_fast.kernels.rows import Partners, Rows  # noqa: E402

from hicl_fast.ops.common import cuda_rows  # noqa: E402
from hicl_fast.ops.common import triton as triton_common  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.triton, pytest.mark.usefixtures("emulated")]

TYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOOR = 1e-12
ACCURACY = 4e-6  # of float32 sums over some thousand dimensions, relative to the sizes of what is summed
# A thread holds 32 elements, 16 bytes at a time: a warp 1024, a block 4096 of a longer row. Odd rows go one by one.
DIMENSIONS = (1, 7, 8, 33, 264, 1024, 1025, 1032, 4096, 4097, 4104, 8200)
PARTNERS = ("nobody", "same index", "target", "listed")


def rows(n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * n + d + seed)
    sizes = torch.logspace(-1, 1, n)[torch.randperm(n, generator=generator), None]  # norms differ a hundredfold
    return (torch.randn(n, d, generator=generator) * sizes).to(dtype)


def placed(value: Any, device: str) -> Any:
    """A tensor, rows or partners on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if value is None:
        return None
    return type(value)(**{field.name: placed(getattr(value, field.name), device) for field in fields(value)})


def assert_normalised(x: Tensor) -> None:
    exact = x.double()
    norm = exact.norm(dim=1)
    unit = torch.full_like(x, torch.nan)
    ours = cuda_rows.normalise(x, FLOOR, unit)
    assert ours.x is x
    expected = torch.where(norm == 0, 0, 1 / norm.clamp_min(FLOOR))
    torch.testing.assert_close(ours.inverse.double(), expected, rtol=ACCURACY, atol=0)
    torch.testing.assert_close(unit.double(), normalise(exact), rtol=torch.finfo(x.dtype).eps, atol=1e-7)
    assert torch.equal(cuda_rows.normalise(x, FLOOR).inverse, ours.inverse)


def draw_gradient(n: int, d: int, dtype: torch.dtype, kind: str) -> tuple[Tensor, Tensor, Rows, Partners | None]:
    """What ``gradient`` takes but the floor; partners' rows with several rows of one and rows of none."""
    x, other = rows(n, d, dtype), rows(n + 2 if kind == "listed" else n - 1, d, dtype, seed=1)
    product, factor = rows(n, d, seed=2), torch.linspace(-1, 2, n)
    sides = [Rows(y, 1 / y.double().norm(dim=1).clamp_min(FLOOR).float(), y) for y in (x, other)]
    coefficient = torch.linspace(2, -1, n)
    if kind == "nobody":
        return product, factor, sides[0], None
    if kind == "same index":
        return product, factor, sides[0], Partners(sides[1], coefficient)
    index = torch.arange(n) * 3 % len(other)
    if kind == "target":
        return product, factor, sides[0], Partners(sides[1], coefficient, index)
    target = torch.arange(len(other)) ** 2 % (n + 1)  # n: of no row
    order = target.sort(stable=True)
    begin = torch.searchsorted(order.values, torch.arange(n + 1))
    return product, factor, sides[0], Partners(sides[1], torch.linspace(2, -1, len(other)), order.indices, begin)


def partners_of(row: int, partners: Partners) -> list[tuple[int, Tensor]]:
    """The row's partners and their coefficients."""
    if partners.begin is not None and partners.index is not None:
        listed = partners.index[partners.begin[row] : partners.begin[row + 1]].tolist()
        return [(j, partners.coefficient[j]) for j in listed]
    j = row if partners.index is None else int(partners.index[row])
    return [(j, partners.coefficient[row])] if j < len(partners.other.x) else []


def unit_gradient(product: Tensor, factor: Tensor, partners: Partners | None) -> Tensor:
    """The gradient with respect to the unit rows, in float64, row by row."""
    gradient = product.double() * factor.double()[:, None]
    if partners is not None:
        other = normalise(partners.other.x.double())
        for i, row in enumerate(gradient):
            for j, coefficient in partners_of(i, partners):
                row += coefficient.double() * other[j]
    return gradient


def assert_gradient(
    product: Tensor,
    factor: Tensor,
    x: Rows,
    partners: Partners | None,
    out: Tensor | None = None,
    device: str = "cpu",
) -> None:
    upstream = unit_gradient(product, factor, partners)
    leaf = x.x.double().requires_grad_()
    normalise(leaf).backward(upstream)
    out = torch.full_like(product, torch.nan, device=device) if out is None else out
    product, factor, on_device, partners = (placed(value, device) for value in (product, factor, x, partners))
    cuda_rows.gradient(product, factor, on_device, partners, FLOOR, out)
    sizes = upstream.norm(dim=1, keepdim=True) * x.inverse.double()[:, None]
    assert leaf.grad is not None
    error = (out.cpu().double() - leaf.grad).abs()
    assert (error <= ACCURACY * sizes).all(), float((error / sizes).max())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("d", DIMENSIONS)
def test_norms_and_unit_rows(d: int, dtype: torch.dtype) -> None:
    assert_normalised(rows(5, d, dtype))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("d", DIMENSIONS)
def test_scaled_rows(d: int, dtype: torch.dtype) -> None:
    x, factor = rows(5, d, dtype), torch.linspace(-1, 2, 5)
    assert torch.equal(cuda_rows.scale_rows(Rows(x, torch.ones(5), x), factor), (factor[:, None] * x.float()).to(dtype))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("d", DIMENSIONS)
def test_positive_similarity(d: int, dtype: torch.dtype) -> None:
    query, key, target = rows(5, d, dtype), rows(7, d, dtype), torch.tensor([6, 0, 0, 3, 7])
    sides = [cuda_rows.normalise(x, FLOOR) for x in (query, key)]
    positive = cuda_rows.positive_similarity(*sides, target)
    exact = (normalise(query.double())[:4] * normalise(key.double())[target[:4]]).sum(dim=1)
    torch.testing.assert_close(positive[:4].double(), exact, rtol=0, atol=1e-6)
    assert positive[4].isnan()  # there is no key 7


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", PARTNERS)
@pytest.mark.parametrize("d", [8, 33, 1024, 1032, 4097, 8200])
def test_gradient(d: int, kind: str, dtype: torch.dtype) -> None:
    assert_gradient(*draw_gradient(6, d, dtype, kind))


@pytest.mark.parametrize("d", [40, 1040])
def test_orders_of_warps_and_lanes(d: int, order: int) -> None:
    assert_normalised(rows(9, d, torch.bfloat16))
    for kind in PARTNERS:
        assert_gradient(*draw_gradient(9, d, torch.bfloat16, kind))


@pytest.mark.parametrize("d", [40, 1040])
def test_two_runs_give_the_same_bits(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for order in ("0", "5"):
        monkeypatch.setenv("HICL_EMULATION_ORDER", order)
        product, *rest = draw_gradient(9, d, torch.bfloat16, "listed")
        out = torch.empty_like(product)
        cuda_rows.gradient(product, *rest, FLOOR, out)
        results.append([out, cuda_rows.normalise(rows(9, d), FLOOR).inverse])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("which", ["product", "x", "other", "out"])
def test_rows_that_are_not_aligned(which: str) -> None:
    def moved(x: Tensor) -> Tensor:
        memory = torch.empty(x.numel() + 1, dtype=x.dtype)
        memory[1:] = x.flatten()
        assert memory[1:].data_ptr() % 16
        return memory[1:].view(x.shape)

    product, factor, x, partners = draw_gradient(5, 16, torch.bfloat16, "target")
    assert partners is not None
    out = torch.full_like(product, torch.nan)
    if which == "product":
        product = moved(product)
    elif which == "x":
        x = Rows(moved(x.x), x.inverse, x.operand)
        assert_normalised(x.x)
    elif which == "other":
        partners = Partners(
            Rows(moved(partners.other.x), partners.other.inverse, partners.other.operand),
            partners.coefficient,
            partners.index,
        )
    else:
        out = moved(out)
    assert_gradient(product, factor, x, partners, out)


def test_a_part_of_the_rows() -> None:
    product, factor, x, partners = draw_gradient(9, 24, torch.float32, "target")
    assert partners is not None and partners.index is not None
    part, out = slice(2, 7), torch.zeros_like(product)
    of_part = Partners(partners.other, partners.coefficient[part], partners.index[part])
    assert_gradient(product[part], factor[part], x[part], of_part, out[part])
    assert not out[:2].any() and not out[7:].any()


@pytest.mark.parametrize("d", [24, 1032, 8200])
def test_the_gradient_may_take_the_products_place(d: int) -> None:
    product, *rest = draw_gradient(5, d, torch.bfloat16, "listed")
    apart = torch.empty_like(product)
    cuda_rows.gradient(product, *rest, FLOOR, apart)
    cuda_rows.gradient(product, *rest, FLOOR, product)
    assert torch.equal(product, apart)


def test_one_factor_for_all_rows() -> None:
    product, _, *rest = draw_gradient(5, 24, torch.float32, "same index")
    assert_gradient(product, torch.tensor([1.5]).expand(5), *rest)


def test_zero_rows_and_rows_below_the_floor() -> None:
    product, factor, x, partners = draw_gradient(5, 24, torch.float32, "target")
    x.x[1], x.x[2] = 0, 1e-14 * x.x[2] / x.x[2].norm()
    assert_normalised(x.x)
    x = cuda_rows.normalise(x.x, FLOOR)
    assert_gradient(product, factor, x, partners)
    out = torch.empty_like(product)
    cuda_rows.gradient(product, factor, x, partners, FLOOR, out)
    assert not out[1].any() and out[2].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])  # 1e30: its square is infinite in float32
def test_norms_that_are_not_finite_show(value: float) -> None:
    x = rows(3, 24)
    x[1, 2] = value
    inverse = cuda_rows.normalise(x, FLOOR).inverse
    assert inverse.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("d", [24, 5000])
def test_rows_whose_squares_vanish_are_divided_by_the_floor(d: int) -> None:
    x = rows(4, d)
    x[1] *= 1e-30
    x[2] *= 0.0
    x[3] *= 1e-42  # subnormal
    unit = torch.empty_like(x)
    inverse = cuda_rows.normalise(x, FLOOR, unit).inverse
    assert inverse[2] == 0
    torch.testing.assert_close(inverse[[1, 3]], torch.full((2,), 1 / FLOOR), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(unit[1], x[1] / FLOOR)


def test_no_rows() -> None:
    nothing = torch.empty(0, 24)
    assert cuda_rows.normalise(nothing, FLOOR, nothing.clone()).inverse.shape == (0,)
    assert cuda_rows.scale_rows(Rows(nothing, torch.empty(0), nothing), torch.empty(0)).shape == (0, 24)
    cuda_rows.gradient(nothing, torch.empty(0), Rows(nothing, torch.empty(0), nothing), None, FLOOR, nothing.clone())


# --- the large-batch path --------------------------------------------------------------------------------------------

LARGE: dict[str, dict[str, Any]] = {
    "plain": {},
    "margin": {"margin": 0.3},
    "several rows of one key": {"target": torch.arange(40) % 5 * 9},
    "symmetric": {"symmetric": True},
    "none": {"reduction": "none"},
}


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", LARGE.values(), ids=LARGE)
def test_the_large_batch_path_over_them(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Triton's interpreter, with none of Triton's own kernels for rows."""
    from tests.kernels import interpreter_bf16

    interpreter_bf16.install()
    monkeypatch.setattr(triton_common, "INTERPRETER_KNOWS_BF16", True)
    large = importlib.import_module("hicl_fast.ops.info_nce.triton")
    monkeypatch.setattr(large, "CHUNK_BYTES", 1)
    monkeypatch.setattr(large, "MIN_CHUNK_ROWS", 1)
    for name in ("normalise", "scale_rows", "positive_similarity", "gradient"):
        monkeypatch.delattr(triton_rows, name)

    query = rows(40, 24, dtype)
    key = (query.float() + rows(40, 24, seed=1)).to(dtype)
    results = []
    for function, kind, more in (
        (HF.info_nce, dtype, {"backend": "triton"}),
        (reference.info_nce, torch.float64, {}),
    ):
        q, k = (x.to(kind).clone().requires_grad_() for x in (query, key))
        loss = function(q, k, **options, **more)
        (100 * loss).sum().backward()
        results.append([loss.detach().double(), q.grad.double(), k.grad.double()])
    tolerance = 5e-6 if dtype == torch.float32 else 5e-3
    for got, exact in zip(*results, strict=True):
        assert (got - exact).norm() <= tolerance * exact.norm()
