"""The selection of hard negatives in csrc/cuda, emulated on the CPU, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hicl_fast.functional as HF
from hicl_fast import BackendError
from hicl_fast.reference import normalise
from tests.cuda.test_info_nce import rows
from tests.ops.test_hard_negatives import assert_hardest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("emulated")]

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(n: int, m: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return rows(n, d, dtype), rows(m, d, dtype, seed=1)


# Tiles are 64 × 64; a lane has 8 columns up to 256, else 32; a block selects for four rows.
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "m", "d", "k"),
    [
        (1, 2, 1, 1),
        (3, 33, 7, 32),
        (4, 64, 33, 63),
        (5, 65, 64, 10),
        (66, 256, 8, 17),
        (2, 257, 24, 128),
        (5, 1024, 8, 9),
    ],
)
def test_every_edge(n: int, m: int, d: int, k: int, dtype: torch.dtype) -> None:
    assert_hardest(*draw(n, m, d, dtype), k, "cuda")
    assert_hardest(*draw(n, m, d, dtype), k, "cuda", exclude_target=False)


def test_groups_and_targets() -> None:
    query, key = draw(20, 150, 12)
    target = torch.arange(20) * 7 - 1  # the first row has none
    groups = {"query_group": torch.arange(20) % 4, "key_group": torch.arange(150) % 5}
    assert_hardest(query, key, 20, "cuda", target=target, **groups)
    assert_hardest(query, key, 20, "cuda", **groups)
    assert_hardest(query, key, 3, "cuda", exclude_target=False, **groups)
    assert_hardest(query, key, 128, "cuda", target=target)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("m", [65, 200, 300])
def test_equal_keys_come_in_their_order(m: int, dtype: torch.dtype, order: int) -> None:
    query, few = draw(6, 4, 100, dtype)
    few[2] = 0
    which = torch.randint(0, 4, (m,), generator=torch.Generator().manual_seed(m))
    similarity, index = HF.hard_negatives(query, few[which], min(m, 128), exclude_target=False, backend="cuda")
    exact = (normalise(query.double()) @ normalise(few.double()).T)[:, which]
    assert torch.equal(index, exact.sort(dim=1, descending=True, stable=True).indices[:, : min(m, 128)])
    for row in range(6):
        assert len(similarity[row].unique()) == len(which[index[row]].unique())  # equal in every bit


def test_zero_rows_and_minus_zero() -> None:
    query, key = draw(4, 90, 8)
    query[1], key[7] = 0, 0
    query[2] = 1e-25  # so short that it counts as a zero row: 0 and −0 by its products' signs
    similarity, index = HF.hard_negatives(query, key, 80, exclude_target=False, backend="cuda")
    assert not similarity[1:3].any() and index[1:3].tolist() == [list(range(80))] * 2
    assert_hardest(query[:2], key, 80, "cuda")


def test_nan_comes_first() -> None:
    query, key = draw(3, 300, 8)
    query[0, 2] = torch.nan
    key[[5, 290]] = torch.nan
    similarity, index = HF.hard_negatives(query, key, 10, target=torch.tensor([3, 290, -1]), backend="cuda")
    assert similarity[0].isnan().all() and index[0].tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert similarity[1, 0].isnan() and not similarity[1, 1:].isnan().any() and index[1, 0] == 5
    assert similarity[2, :2].isnan().all() and index[2, :2].tolist() == [5, 290]


def test_too_few_candidates() -> None:
    query, key = draw(4, 10, 5)
    group = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    with pytest.raises(ValueError, match="row 2 has 6 outside its target and group, got k = 7"):
        HF.hard_negatives(query, key, 7, query_group=group[:4], key_group=group, backend="cuda")


def test_orders_of_warps_and_lanes(order: int) -> None:
    assert_hardest(*draw(67, 130, 136, torch.bfloat16), 12, "cuda")


def test_strides_alignment_and_mixed_types() -> None:
    query, key = draw(16, 70, 42)
    target, group = torch.arange(32)[::2], torch.arange(140)[::2] % 3
    assert_hardest(query.T.contiguous().T[:, ::2], key[:, 1::2], 9, "cuda", target=target)
    assert_hardest(query[:, 3:], key[:, 3:].half(), 9, "cuda", query_group=group[:16], key_group=group)


def test_what_it_leaves_to_others() -> None:
    with pytest.raises(BackendError, match="does not take more than 1024 rows, columns or dimensions"):
        HF.hard_negatives(torch.ones(2, 4), torch.ones(1025, 4), 1, backend="cuda")
    with pytest.raises(BackendError, match="got float64"):
        HF.hard_negatives(torch.ones(2, 4).double(), torch.ones(2, 4), 1, backend="cuda")
