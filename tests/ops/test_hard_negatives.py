"""Hard negatives on every CPU backend against the float64 reference."""

from __future__ import annotations

import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

import hicl_fast
import hicl_fast.functional as HF
from hicl_fast import reference
from hicl_fast.reference import normalise

BACKENDS = [s.name for s in hicl_fast.backends() if s.available and s.name != "triton"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def draw(n: int, m: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, d, generator=generator, dtype=torch.float64) for rows in (n, m))  # type: ignore[return-value]


def assert_hardest(query: Tensor, key: Tensor, k: int, backend: str, **options: object) -> None:
    """The similarities are the reference's; an index may be another one where that similarity is as large."""
    similarity, index = HF.hard_negatives(query, key, k, backend=backend, **options)  # type: ignore[arg-type]
    exact, _ = reference.hard_negatives(query.double(), key.double(), k, **options)  # type: ignore[arg-type]
    every = normalise(query.double()) @ normalise(key.double()).T
    kept = torch.float64 if torch.float64 in (query.dtype, key.dtype) else torch.float32
    assert similarity.shape == index.shape == (len(query), k)
    assert similarity.dtype == kept and index.dtype == torch.int64
    assert not similarity.requires_grad
    tolerance = 16 * torch.finfo(kept).eps
    assert (similarity.double() - exact).abs().max() <= tolerance
    assert (every.gather(1, index) - exact).abs().max() <= tolerance
    assert (similarity[:, 1:] <= similarity[:, :-1]).all()
    tied = similarity[:, 1:] == similarity[:, :-1]
    assert (index[:, 1:] > index[:, :-1])[tied].all()
    assert (index.sort(dim=1).values.diff(dim=1) > 0).all()  # no key twice
    left_out = torch.zeros_like(every, dtype=torch.bool)
    if options.get("exclude_target", True):
        target = options.get("target")
        rows = torch.arange(len(query)) if target is None else target
        left_out |= rows[:, None] == torch.arange(len(key))  # type: ignore[index]
    if options.get("query_group") is not None:
        left_out |= options["query_group"][:, None] == options["key_group"]  # type: ignore[index]
    assert not left_out.gather(1, index).any()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("n", "m", "d", "k"),
    [
        (1, 2, 1, 1),
        (1, 40, 7, 39),
        (3, 63, 5, 10),
        (8, 64, 16, 63),
        (9, 65, 33, 64),
        (17, 300, 48, 128),
        (130, 129, 3, 128),
        (5, 2049, 19, 128),
        (4, 4097, 8, 2),
    ],
)
def test_against_the_reference(backend: str, n: int, m: int, d: int, k: int, dtype: torch.dtype) -> None:
    query, key = (x.to(dtype) for x in draw(n, m, d))
    target = None if n <= m else torch.arange(n) % m
    assert_hardest(query, key, k, backend, target=target)


@each_backend
@pytest.mark.parametrize("k", [1, 17])
def test_more_rows_than_a_block_and_more_columns_than_a_chunk(backend: str, k: int) -> None:
    query, key = (x.float() for x in draw(1030, 8200, 12))
    assert_hardest(query, key, k, backend)


@each_backend
def test_rows_so_long_that_blocks_are_small(backend: str) -> None:
    query, key = (x.float() for x in draw(20, 500, 120_000))
    assert_hardest(query, key, 5, backend)


@each_backend
@pytest.mark.parametrize("shape", [(40, 40), (5, 700)])
def test_groups_and_targets(backend: str, shape: tuple[int, int]) -> None:
    n, m = shape
    query, key = (x.float() for x in draw(n, m, 9))
    generator = torch.Generator().manual_seed(1)
    groups = {
        "query_group": torch.randint(0, 4, (n,), generator=generator),
        "key_group": torch.randint(1, 7, (m,), generator=generator),
    }
    target = torch.randint(-1, m, (n,), generator=generator)
    assert_hardest(query, key, 12, backend, **groups)
    assert_hardest(query, key, 12, backend, **groups, target=target)
    assert_hardest(query, key, 12, backend, **groups, exclude_target=False)
    assert_hardest(query, key, min(m - 1, 128), backend, target=target)
    assert_hardest(query, key, min(m, 128), backend, exclude_target=False)


@each_backend
def test_a_corpus_without_positives_may_be_smaller(backend: str) -> None:
    query, key = (x.float() for x in draw(50, 7, 5))
    assert_hardest(query, key, 7, backend, exclude_target=False)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 50])
@pytest.mark.parametrize("m", [5, 33, 63, 65, 127, 1023, 4097])
def test_equal_columns_come_in_their_order(backend: str, m: int, n: int, dtype: torch.dtype) -> None:
    query, few = (x.to(dtype) for x in draw(n, 4, 100))
    which = torch.randint(0, 4, (m,), generator=torch.Generator().manual_seed(m))
    k = min(m, 128)
    similarity, index = HF.hard_negatives(query, few[which], k, exclude_target=False, backend=backend)
    exact = (normalise(query.double()) @ normalise(few.double()).T)[:, which]
    torch.testing.assert_close(index, exact.sort(dim=1, descending=True, stable=True).indices[:, :k])
    for row in range(n):
        for value in similarity[row].unique():
            assert which[index[row, similarity[row] == value]].unique().numel() == 1


@each_backend
def test_zero_rows(backend: str) -> None:
    query, key = (x.float() for x in draw(4, 600, 8))
    query[1] = 0
    key[7] = 0
    similarity, index = HF.hard_negatives(query, key, 100, backend=backend)
    assert (similarity[1] == 0).all()
    assert index[1].tolist() == [j for j in range(101) if j != 1]
    assert_hardest(query, key[:20], 19, backend)


@each_backend
def test_tiny_and_equal_everywhere(backend: str) -> None:
    query = torch.full((3, 4), 1e-30)
    similarity, index = HF.hard_negatives(query, query, 2, backend=backend)
    assert index.tolist() == [[1, 2], [0, 2], [0, 1]]
    assert similarity.abs().max() <= 1e-30


@each_backend
def test_nan(backend: str) -> None:
    query, key = (x.float() for x in draw(3, 700, 8))
    query[0, 2] = torch.nan
    key[[5, 600]] = torch.nan
    similarity, index = HF.hard_negatives(query, key, 10, target=torch.tensor([3, 600, -1]), backend=backend)
    assert similarity[0].isnan().all() and index[0].tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert similarity[1, 0].isnan() and not similarity[1, 1:].isnan().any() and index[1, 0] == 5
    assert similarity[2, :2].isnan().all() and index[2, :2].tolist() == [5, 600]
    similarity, index = HF.hard_negatives(query, torch.full_like(key, torch.nan), 2, backend=backend)
    assert similarity.isnan().all() and index[2].tolist() == [0, 1]


@each_backend
def test_strides(backend: str) -> None:
    query, key = (x.float() for x in draw(16, 300, 40))
    groups = {"query_group": torch.arange(32)[::2] % 3, "key_group": torch.arange(600)[::2] % 3}
    assert_hardest(query.T.contiguous().T[:, ::2], key[::2, 1::2], 20, backend, target=torch.arange(32)[::2])
    assert_hardest(query[:, 3:], key.T.contiguous().T[:, 3:], 20, backend, **groups)


@each_backend
def test_mixed_types_and_autocast(backend: str) -> None:
    query, key = draw(5, 30, 8)
    assert_hardest(query, key.bfloat16(), 4, backend)
    assert_hardest(query.half(), key.float(), 4, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        similarity, _ = HF.hard_negatives(query.float(), key.float(), 4, backend=backend)
    exact, _ = reference.hard_negatives(query, key, 4)
    torch.testing.assert_close(similarity.double(), exact, rtol=0, atol=2e-6)


@each_backend
@hypothesis.settings(max_examples=40)
@hypothesis.given(data=st.data())
def test_any_shape(backend: str, data: st.DataObject) -> None:
    n, m = data.draw(st.integers(1, 40), label="n"), data.draw(st.integers(1, 300), label="m")
    d, seed = data.draw(st.integers(1, 40), label="d"), data.draw(st.integers(0, 99), label="seed")
    query, key = (x.float() for x in draw(n, m, d, seed))
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, object] = {"exclude_target": data.draw(st.booleans(), label="exclude_target")}
    if options["exclude_target"]:
        options["target"] = torch.randint(-1, m, (n,), generator=generator)
    if data.draw(st.booleans(), label="groups"):
        options["query_group"] = torch.randint(0, 5, (n,), generator=generator)
        options["key_group"] = torch.randint(0, 5, (m,), generator=generator)
    every = reference.hard_negatives(query, key, m, **options)[1]  # type: ignore[arg-type]
    fewest = int((every >= 0).sum(dim=1).min())
    if fewest:
        assert_hardest(query, key, data.draw(st.integers(1, min(fewest, 128)), label="k"), backend, **options)
    if fewest < min(m - 1, 128):
        with pytest.raises(ValueError, match=f"row [0-9]+ has {fewest if n == 1 else '[0-9]+'} "):
            HF.hard_negatives(query, key, fewest + 1, backend=backend, **options)  # type: ignore[arg-type]


@each_backend
def test_too_few_candidates(backend: str) -> None:
    query, key = (x.float() for x in draw(4, 10, 5))
    group = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    with pytest.raises(ValueError, match="row 2 has 6 outside its target and group, got k = 7"):
        HF.hard_negatives(query, key, 7, query_group=group[:4], key_group=group, backend=backend)
    with pytest.raises(ValueError, match="expected 1 to 9, got 10, with 4 queries and 10 keys, of which row 0 has 9"):
        HF.hard_negatives(query, key, 10, backend=backend)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 0}, ValueError, "k: expected 1 to 9, got 0"),
        ({"k": 2.0}, TypeError, "k: expected an integer, got 2.0"),
        ({"k": True}, TypeError, "k: expected an integer, got True"),
        ({"key": torch.ones(300, 5), "k": 129}, ValueError, "k: expected 1 to 128, got 129"),
        ({"query": torch.ones(11, 5)}, ValueError, "key: expected at least 11 rows, one for each query, or a target"),
        ({"query": torch.ones(4)}, ValueError, r"query: expected a tensor of shape \(N, D\)"),
        ({"key": torch.ones(10, 6)}, ValueError, "key: expected rows of length 5"),
        ({"key": torch.ones(10, 5, dtype=torch.int64)}, TypeError, "key: expected float64"),
        ({"target": torch.zeros(4)}, TypeError, "target: expected an int64 tensor"),
        ({"target": torch.tensor([0, 1, 2, 10])}, ValueError, "target: .* 0 to 9, or -1 for none, .* from 0 to 10"),
        ({"target": torch.tensor([0, 1, 2, -2])}, ValueError, "got values from -2 to 2"),
        ({"target": torch.arange(4), "exclude_target": False}, ValueError, "target: expected None"),
        ({"exclude_target": 1}, TypeError, "exclude_target: expected True or False"),
        ({"query_group": torch.zeros(4, dtype=torch.int64)}, ValueError, "key_group: expected an int64 tensor"),
        (
            {"query_group": torch.arange(4), "key_group": torch.arange(9), "exclude_target": False},
            ValueError,
            r"key_group: expected shape \(10,\)",
        ),
        ({"backend": "nothing"}, ValueError, "backend: expected 'auto' or one of"),
    ],
)
def test_arguments_that_are_wrong(options: dict[str, object], error: type[Exception], message: str) -> None:
    query, key = draw(4, 10, 5)
    with pytest.raises(error, match=message):
        HF.hard_negatives(**({"query": query, "key": key, "k": 3} | options))  # type: ignore[arg-type]


@each_backend
def test_no_gradient(backend: str) -> None:
    query, key = (x.requires_grad_() for x in draw(3, 10, 5))
    similarity, index = HF.hard_negatives(query, key, 2, backend=backend)
    assert not similarity.requires_grad and not index.requires_grad


@each_backend
def test_compiled_and_registered(backend: str) -> None:
    query, key = (x.float() for x in draw(4, 90, 6))
    group = torch.arange(90) % 5
    operator = torch.ops.hicl_fast.hard_negatives.default
    torch.library.opcheck(operator, (query, key, 3, None, None, None, True, backend))
    torch.library.opcheck(operator, (query, key, 3, torch.arange(4), group[:4], group, True, backend))
    torch.library.opcheck(operator, (query.half(), key.double(), 3, None, None, None, False, backend))

    def mine(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return HF.hard_negatives(query, key, 3, query_group=group[:4], key_group=group, backend=backend)

    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    for q in (query, query.clone().requires_grad_()):
        for got, expected in zip(compiled(q, key), mine(query, key), strict=True):
            assert torch.equal(got, expected)


@each_backend
def test_the_same_bits_whatever_the_number_of_threads(backend: str) -> None:
    query, key = (x.float() for x in draw(300, 3000, 24))
    threads = torch.get_num_threads()
    expected = HF.hard_negatives(query, key, 20, backend=backend)
    torch.set_num_threads(1)
    try:
        got = HF.hard_negatives(query, key, 20, backend=backend)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(got[1], expected[1])


MEMORY = """
import resource, sys, torch
import hicl_fast.functional as HF
dtype = getattr(torch, sys.argv[2])
HF.hard_negatives(torch.randn(1024, 32), torch.randn(4096, 32), 10, backend=sys.argv[1])
query, key = torch.randn(1024, 32).to(dtype), torch.randn(200_000, 32).to(dtype)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
HF.hard_negatives(query, key, 10, backend=sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@each_backend
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak in Linux's unit")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_does_not_grow_with_the_keys(backend: str, dtype: str) -> None:
    ran = subprocess.run([sys.executable, "-c", MEMORY, backend, dtype], capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 128  # MB; the matrix would take 780
