"""Random pairs: which they are, how often each comes, and that nothing but the arguments decides."""

from __future__ import annotations

import pytest
import torch

import hicl_fast.functional as HF
from hicl_fast import pairs as module
from hicl_fast.ops.backends import registry


@pytest.mark.parametrize("k", [2, 3, 10, 1000, 65536])
def test_pairs_are_ordered_and_within_range(k: int) -> None:
    pairs = HF.random_pairs(50, 40, k, seed=3)
    assert pairs.shape == (50, 40, 2) and pairs.dtype == torch.int64
    first, second = pairs.unbind(-1)
    assert (0 <= first).all() and (first < second).all() and (second < k).all()


@pytest.mark.parametrize("k", [2, 3, 10, 1000, 65535, 65536])
@pytest.mark.parametrize("seed", [0, -1, 3, (7 << 32) + 5, 1 << 63, (1 << 64) + 3])
def test_the_compiled_pairs_are_the_same(k: int, seed: int) -> None:
    if not registry.is_available("cpp"):
        pytest.skip("the C++ extension is not there")
    assert module._runs_in_cpp("cpu", 70, 60, k, seed)
    pairs = HF.random_pairs(70, 60, k, seed)
    assert torch.equal(pairs, module._random_pairs(70, 60, k, seed, "cpu", 0))
    part = HF.random_pairs(20, 60, k, seed, first_row=50)
    assert torch.equal(part, pairs[50:]) and torch.equal(part, module._random_pairs(20, 60, k, seed, "cpu", 50))


def test_two_make_one_pair() -> None:
    assert torch.equal(HF.random_pairs(3, 4, 2, seed=0), torch.tensor([0, 1]).expand(3, 4, 2))


@pytest.mark.parametrize("num_ranks", [1, 45, 4950])
def test_every_rank_is_a_pair_of_its_own(num_ranks: int) -> None:
    pairs = module._pair_of_rank(torch.arange(num_ranks))
    expected = [(a, b) for b in range(1, 101) for a in range(b)][:num_ranks]
    assert pairs.tolist() == [list(pair) for pair in expected]


def test_the_largest_ranks() -> None:
    k = module.LARGEST_K
    last = k * (k - 1) // 2 - 1
    ranks = torch.tensor([last, last - 1, last - (k - 2), last - (k - 1)])
    assert module._pair_of_rank(ranks).tolist() == [[k - 2, k - 1], [k - 3, k - 1], [0, k - 1], [k - 3, k - 2]]


@pytest.mark.parametrize("seed", [0, 1, 12345, -1, 1 << 63])
@pytest.mark.parametrize("k", [3, 10])
def test_uniform(k: int, seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    first, second = HF.random_pairs(500, 40, k, seed).flatten(0, 1).unbind(-1)
    count = torch.bincount(second * (second - 1) // 2 + first, minlength=k * (k - 1) // 2)
    assert stats.chisquare(count.numpy()).pvalue > 1e-4


def test_neighbours_are_independent() -> None:
    """A pair says nothing about the next one in the row, in the column, or of the next seed."""
    stats = pytest.importorskip("scipy.stats")
    rank = [pairs[..., 0] + pairs[..., 1] * (pairs[..., 1] - 1) // 2 for pairs in (
        HF.random_pairs(300, 300, 4, seed) for seed in (7, 8)
    )]  # fmt: skip
    for this, other in ((rank[0][:, :-1], rank[0][:, 1:]), (rank[0][:-1], rank[0][1:]), (rank[0], rank[1])):
        together = torch.bincount((this * 6 + other).flatten(), minlength=36)
        assert stats.chisquare(together.numpy()).pvalue > 1e-4


def test_the_same_arguments_give_the_same_pairs() -> None:
    state = torch.random.get_rng_state()
    pairs = HF.random_pairs(8, 40, 10, seed=5)
    assert torch.equal(pairs, HF.random_pairs(8, 40, 10, seed=5, device="cpu"))
    assert torch.equal(pairs[:5, :7], HF.random_pairs(5, 7, 10, seed=5))  # whatever the sizes
    assert torch.equal(pairs, HF.random_pairs(8, 40, 10, seed=5 + (1 << 64)))
    assert torch.equal(state, torch.random.get_rng_state())


def test_written_down() -> None:
    """Values that training runs depend on: a change here changes them all."""
    assert HF.random_pairs(2, 3, 10, seed=0).tolist() == [[[2, 5], [1, 8], [3, 8]], [[6, 9], [2, 3], [5, 8]]]


def test_rows_and_seeds_differ() -> None:
    pairs = HF.random_pairs(64, 40, 10, seed=0)
    assert len({tuple(row.flatten().tolist()) for row in pairs}) == 64
    seeds = [tuple(HF.random_pairs(1, 40, 10, seed).flatten().tolist()) for seed in range(64)]
    assert len(set(seeds)) == 64


def test_compiled() -> None:
    compiled = torch.compile(HF.random_pairs, fullgraph=True, backend="aot_eager")
    for seed in (3, 4):
        assert torch.equal(compiled(8, 40, 10, seed), HF.random_pairs(8, 40, 10, seed))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((4, 3, 1, 0), ValueError, "k: expected 2 to 65536 .* got 1"),
        ((4, 3, 1 << 17, 0), ValueError, "k: expected 2 to 65536"),
        ((-1, 3, 4, 0), ValueError, "num_rows: expected at least 0, got -1"),
        ((4, -3, 4, 0), ValueError, "num_mixed: expected at least 0, got -3"),
        ((4, 3, 4, 0.5), TypeError, "seed: expected an integer, got 0.5"),
        ((4, 3, True, 0), TypeError, "k: expected an integer"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[int, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HF.random_pairs(*arguments)
