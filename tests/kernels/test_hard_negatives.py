"""The hard-negatives kernel in Triton's interpreter against the float64 reference, and compiled ahead of time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hicl_fast
import hicl_fast.functional as HF
from hicl_fast import reference
from hicl_fast.reference import normalise
from tests.conftest import INTERPRETING

pytest.importorskip("triton")

from hicl_fast.kernels import hard_negatives  # noqa: E402

from tests.kernels.aot import SHARED_MEMORY_LIMIT, TARGETS, compile_for, resources_of  # noqa: E402

pytestmark = pytest.mark.triton


def draw(n: int, m: int, d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + m + d)
    return torch.randn(n, d, generator=generator), torch.randn(m, d, generator=generator)


def assert_hardest(query: Tensor, key: Tensor, k: int, **options: object) -> None:
    similarity, index = HF.hard_negatives(query, key, k, backend="triton", **options)  # type: ignore[arg-type]
    exact, _ = reference.hard_negatives(query.double(), key.double(), k, **options)  # type: ignore[arg-type]
    every = normalise(query.double()) @ normalise(key.double()).T
    assert similarity.dtype == torch.float32 and index.dtype == torch.int64
    assert (similarity.double() - exact).abs().max() <= 2e-6
    assert (every.gather(1, index) - exact).abs().max() <= 2e-6
    assert (index.sort(dim=1).values.diff(dim=1) > 0).all()


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("n", "m", "d", "k"),
    [(1, 2, 1, 1), (33, 33, 33, 32), (31, 65, 40, 17), (5, 130, 7, 128), (17, 129, 33, 100), (3, 300, 64, 10)],
)
def test_every_tile_edge(n: int, m: int, d: int, k: int) -> None:
    query, key = draw(n, m, d)
    assert_hardest(query, key, k)
    assert_hardest(query, key, k, exclude_target=False)


@pytest.mark.interpret
def test_groups_targets_and_strides() -> None:
    query, key = draw(20, 150, 16)
    target = torch.arange(20) * 7 - 1
    query_group, key_group = torch.arange(20) % 4, torch.arange(150) % 5
    assert_hardest(query[:, ::2], key[:, 1::2], 20, target=target, query_group=query_group, key_group=key_group)
    assert_hardest(query, key, 3, query_group=query_group, key_group=key_group, exclude_target=False)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit(dtype: torch.dtype) -> None:
    query, key = (x.to(dtype) for x in draw(8, 70, 24))
    assert_hardest(query, key, 5)
    assert_hardest(query, key.float(), 5)


@pytest.mark.interpret
def test_equal_columns_and_nan() -> None:
    query, few = (
        (4 * x).round() for x in draw(6, 3, 24)
    )  # the interpreter's products of equal columns differ in rounding
    few[2] = 0
    which = torch.randint(0, 3, (300,), generator=torch.Generator().manual_seed(0))
    _, index = HF.hard_negatives(query, few[which], 128, exclude_target=False, backend="triton")
    exact = (normalise(query.double()) @ normalise(few.double()).T)[:, which]
    assert torch.equal(index, exact.sort(dim=1, descending=True, stable=True).indices[:, :128])
    key = few[which]
    key[[7, 200]] = torch.nan
    similarity, index = HF.hard_negatives(query, key, 4, exclude_target=False, backend="triton")
    assert (index[:, :2] == torch.tensor([7, 200])).all()
    assert similarity[:, :2].isnan().all() and not similarity[:, 2:].isnan().any()


@pytest.mark.interpret
def test_too_few_candidates() -> None:
    query, key = draw(4, 10, 5)
    group = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    with pytest.raises(ValueError, match="row 2 has 6 outside its target and group, got k = 7"):
        HF.hard_negatives(query, key, 7, query_group=group[:4], key_group=group, backend="triton")
    with pytest.raises(hicl_fast.BackendError, match="got float64"):
        HF.hard_negatives(query.double(), key, 2, backend="triton")


PRODUCTS = {"16 bit": ("bf16", "ieee"), "tf32": ("fp32", "tf32"), "fp32": ("fp32", "ieee")}


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING, reason="the interpreter has taken the compiler's place")
@pytest.mark.parametrize("k", [10, 32, 64, 128])
@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("operand", PRODUCTS)
def test_compiles(arch: str, operand: str, k: int) -> None:
    if arch == "gfx942" and operand == "tf32":
        pytest.skip("no such products there")
    kernel = hard_negatives.hard_negatives_kernel
    tile = hard_negatives.hard_negatives_tile(arch, operand, k)
    element, precision = PRODUCTS[operand]
    types = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= dict.fromkeys(("query", "key"), f"*{element}")
    indices = ("special_ptr", "query_group_ptr", "key_group_ptr", "best_ptr")
    types |= dict.fromkeys(indices, "*i64")
    blocks = {name: value for name, value in tile.blocks().items() if name.startswith("BLOCK")}
    constants = {
        **blocks,
        "SPECIAL": 1,
        "GROUPS": 1,
        "RELATIONS": 1,
        "KEPT": hard_negatives.kept(k),
        "PRECISION": precision,
        "DESCRIBED": False,
    }
    needs = resources_of(compile_for(arch, kernel, types, constants, tile.num_warps, tile.num_stages))
    assert needs.spills == 0, needs
    assert needs.shared <= SHARED_MEMORY_LIMIT[arch], needs
