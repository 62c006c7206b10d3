"""Hard-negative mixing on every CPU backend against the float64 reference."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import hicl_fast
import hicl_fast.functional as HF
from hicl_fast import reference
from hicl_fast.ops.common.constants import VANISHING

BACKENDS = [s.name for s in hicl_fast.backends() if s.available and s.name != "triton"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def draw(n: int, k: int, num_mixed: int, d: int, *, num_bank: int | None = None, seed: int = 0) -> tuple[Tensor, ...]:
    """Query (n, d), bank, index (n, k) and pairs; float64. Rows of the bank come up again and again in index."""
    generator = torch.Generator().manual_seed(seed + 7 * n + k + num_mixed + d)
    num_bank = k + 2 if num_bank is None else num_bank
    query = torch.randn(n, d, generator=generator, dtype=torch.float64)
    bank = torch.randn(num_bank, d, generator=generator, dtype=torch.float64)
    index = torch.randint(0, num_bank, (n, k), generator=generator)
    return query, bank, index, HF.random_pairs(n, num_mixed, k, seed)


def results(
    function: Any, query: Tensor, bank: Tensor, index: Tensor, pairs: Tensor, temperature: Tensor, **options: Any
) -> list[Tensor]:
    """Logits, and the gradients of query, bank and temperature under an upstream gradient that is not 1."""
    inputs = [x.detach().requires_grad_() for x in (query, bank, temperature)]
    logits = function(inputs[0], inputs[1], index, pairs, temperature=inputs[2], **options)
    upstream = torch.linspace(-1, 2, logits.numel(), dtype=torch.float64).reshape(logits.shape)
    return [logits.detach(), *torch.autograd.grad(logits, inputs, upstream.to(logits.dtype))]


def assert_agree(ours: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    for got, right in zip(ours, exact, strict=True):
        assert (got.double() - right).abs().max() <= tolerance * (1 + right.abs().max().item())


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "k", "num_mixed"), [(1, 2, 1), (3, 5, 8), (33, 10, 40), (2, 17, 3)], ids=str)
@pytest.mark.parametrize("d", [7, 16, 33, 130])
def test_values_and_gradients(backend: str, d: int, n: int, k: int, num_mixed: int, dtype: torch.dtype) -> None:
    query, bank, index, pairs = draw(n, k, num_mixed, d)
    query, bank, temperature = query.to(dtype), bank.to(dtype), torch.tensor(0.07, dtype=torch.float64)
    ours = results(HF.mixed_negative_logits, query, bank, index, pairs, temperature, alpha=0.3, backend=backend)
    exact = results(
        reference.mixed_negative_logits, query.double(), bank.double(), index, pairs, temperature, alpha=0.3
    )
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours[1].dtype == ours[2].dtype == dtype
    # Short vectors nearly cancel now and then, and the gradient grows as they do.
    assert_agree(ours[:1], exact[:1], 64 * torch.finfo(ours[0].dtype).eps)
    assert_agree(ours[1:3], exact[1:3], 64 * torch.finfo(dtype).eps)
    assert_agree(ours[3:], exact[3:], 64 * torch.finfo(ours[0].dtype).eps)


@every_backend
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_pair_of_a_vector_with_itself(backend: str, alpha: float) -> None:
    query, bank, index, _ = draw(4, 3, 1, 9)
    index[0] = index[0, 0]  # the same row of the bank under different columns
    pairs = torch.tensor([[[0, 0], [1, 0], [2, 1], [2, 2]]]).expand(4, -1, -1)
    temperature = torch.tensor(0.5, dtype=torch.float64)
    ours = results(HF.mixed_negative_logits, query, bank, index, pairs, temperature, alpha=alpha, backend=backend)
    exact = results(reference.mixed_negative_logits, query, bank, index, pairs, temperature, alpha=alpha)
    assert_agree(ours, exact, 1e-13)


@every_backend
def test_mixed_types_and_strides(backend: str) -> None:
    query, bank, index, pairs = draw(6, 5, 8, 22)
    query, bank = query.float()[:, ::2], bank.bfloat16().T.contiguous().T[:, 1::2]
    index, pairs = index.T.contiguous().T, pairs.flip(2).transpose(0, 1).contiguous().transpose(0, 1)
    temperature = torch.tensor(0.1)
    ours = results(HF.mixed_negative_logits, query, bank, index, pairs, temperature, backend=backend)
    exact = results(reference.mixed_negative_logits, query.double(), bank.double(), index, pairs, temperature.double())
    assert ours[0].dtype == torch.float32 and ours[2].dtype == torch.bfloat16
    assert_agree(ours[:2], exact[:2], 1e-5)
    assert_agree(ours[2:], exact[2:], 1e-2)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("alpha", [0.5, 0.7])
def test_opposite_vectors_and_zero_queries(backend: str, alpha: float, dtype: torch.dtype) -> None:
    query, bank, _, _ = draw(2, 2, 1, 75)
    query[1] = 0
    bank[1] = -bank[0] * alpha / (1 - alpha)  # but for rounding, α n_0 + (1 − α) n_1 = 0
    bank[2] = bank[3] = 0
    index, pairs = torch.tensor([[0, 1, 2, 3]] * 2), torch.tensor([[[0, 1], [2, 3], [0, 1]], [[0, 1], [0, 2], [1, 1]]])
    query, bank = query.to(dtype).requires_grad_(), bank.to(dtype).requires_grad_()
    logits = HF.mixed_negative_logits(query, bank, index, pairs, alpha=alpha, backend=backend)
    logits.backward(torch.randn_like(logits))
    assert query.grad is not None and bank.grad is not None
    assert not logits.any() and not query.grad.any() and not bank.grad.any()


@every_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_give_nan(backend: str, value: float) -> None:
    query, bank, _, pairs = draw(2, 3, 4, 9)
    index = torch.tensor([[0, 1, 2], [2, 3, 4]])
    bank[0, 3] = value
    logits = HF.mixed_negative_logits(query, bank, index, torch.tensor([[[0, 1]], [[0, 1]]]), backend=backend)
    assert logits[0].isnan().all() and not logits[1].isnan().any()
    query[1, 0] = value
    logits = HF.mixed_negative_logits(query, bank, index, pairs, backend=backend)
    assert logits[1].isnan().all()


@every_backend
@pytest.mark.parametrize("which", [0, 1])
def test_one_input_alone_wants_a_gradient(backend: str, which: int) -> None:
    *vectors, index, pairs = draw(5, 4, 6, 12)
    both = [x.clone().requires_grad_() for x in vectors]
    HF.mixed_negative_logits(both[0], both[1], index, pairs, backend=backend).sum().backward()
    vectors[which].requires_grad_()
    HF.mixed_negative_logits(vectors[0], vectors[1], index, pairs, backend=backend).sum().backward()
    assert vectors[1 - which].grad is None
    assert torch.equal(vectors[which].grad, both[which].grad)  # type: ignore[arg-type]


@every_backend
def test_blocks_of_rows(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough rows for several blocks of csrc's additions, and a chunk of few rows."""
    from hicl_fast.ops.mixed_negatives import torch as chunked_mixed_negatives

    monkeypatch.setattr(chunked_mixed_negatives, "CHUNK_BYTES", 1 << 16)
    query, bank, index, pairs = draw(150, 45, 6, 5, num_bank=9)
    temperature = torch.tensor(0.2, dtype=torch.float64)
    ours = results(HF.mixed_negative_logits, query, bank, index, pairs, temperature, backend=backend)
    exact = results(reference.mixed_negative_logits, query, bank, index, pairs, temperature)
    assert_agree(ours, exact, 1e-12)


@every_backend
def test_the_same_bits_on_one_thread_and_on_two(backend: str) -> None:
    query, bank, index, pairs = draw(64, 10, 40, 130)
    inputs = query.float(), bank.float(), index, pairs, torch.tensor(0.05)
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            runs.append(results(HF.mixed_negative_logits, *inputs, backend=backend))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(runs[1], runs[2], strict=True))
    if backend == "cpp":  # PyTorch's own products may be cut up by the number of threads
        assert all(torch.equal(a, b) for a, b in zip(runs[0][:3], runs[1][:3], strict=True))


@settings(max_examples=30)
@given(
    n=st.integers(1, 6), k=st.integers(2, 12), num_mixed=st.integers(1, 20), d=st.integers(3, 40),
    alpha=st.floats(0, 1), seed=st.integers(0, 1 << 20), backend=st.sampled_from(BACKENDS),
)  # fmt: skip
def test_lengths_of_queries_do_not_matter_and_cosines_are_bounded(
    n: int, k: int, num_mixed: int, d: int, alpha: float, seed: int, backend: str
) -> None:
    """Cosines within ±1, unmoved by the queries' length and by one factor on the whole bank, right at every size."""
    query, bank, index, pairs = draw(n, k, num_mixed, d, seed=seed)
    cosines = HF.mixed_negative_logits(query, bank, index, pairs, alpha=alpha, temperature=1.0, backend=backend)
    assert cosines.abs().max() <= 1 + 1e-6
    scaled = HF.mixed_negative_logits(
        query * torch.rand(n, 1) * 9, bank * 0.1, index, pairs, alpha=alpha, temperature=1.0, backend=backend
    )
    exact = reference.mixed_negative_logits(query, bank, index, pairs, alpha=alpha, temperature=1.0)
    torch.testing.assert_close(scaled, cosines, rtol=0, atol=1e-7)
    torch.testing.assert_close(cosines, exact, rtol=0, atol=1e-7)


@every_backend
def test_compiled_and_registered(backend: str) -> None:
    query, bank, index, pairs = draw(4, 3, 5, 6)
    query.requires_grad_(), bank.requires_grad_()
    temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.hicl_fast.mixed_negatives.default, (query, bank, index, pairs, 0.5, backend))

    def gradients(function: Any) -> list[Tensor]:
        logits = function(query, bank, index, pairs, temperature)
        return [logits.detach(), *torch.autograd.grad(logits.square().sum(), (query, bank, temperature))]

    def eager(query: Tensor, bank: Tensor, index: Tensor, pairs: Tensor, temperature: Tensor) -> Tensor:
        return HF.mixed_negative_logits(query, bank, index, pairs, temperature=temperature, backend=backend)

    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    for got, exact in zip(gradients(compiled), gradients(eager), strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.randn(4)}, ValueError, r"query: expected a tensor of shape \(N, D\)"),
        ({"query": torch.randn(0, 3)}, ValueError, "query: expected at least one row"),
        ({"bank": torch.randn(5, 2)}, ValueError, "bank: expected rows of length 3"),
        ({"index": torch.zeros(4, 2)}, TypeError, r"index: expected an int64 tensor of shape \(4, k\)"),
        ({"index": torch.zeros(3, 2).long()}, ValueError, r"index: expected shape \(4, k\)"),
        ({"index": torch.full((4, 2), 5)}, ValueError, "index: expected rows of bank, 0 to 4, got values from 5 to 5"),
        ({"index": torch.full((4, 2), -1)}, ValueError, "index: expected rows of bank, 0 to 4, got values from -1"),
        ({"pairs": torch.zeros(4, 6).long()}, ValueError, r"pairs: expected shape \(4, m, 2\)"),
        (
            {"pairs": torch.full((4, 1, 2), 2)},
            ValueError,
            "pairs: expected columns of index, 0 to 1, got values from 2",
        ),
        ({"pairs": [[0, 1]]}, TypeError, "pairs: expected an int64 tensor"),
        ({"pairs": torch.zeros(4, 1, 2, device="meta").long()}, ValueError, "pairs: expected a tensor on cpu"),
        ({"alpha": 1.5}, ValueError, "alpha: expected a number from 0 to 1, got 1.5"),
        ({"alpha": "half"}, TypeError, "alpha: expected a number"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a number above 0"),
        ({"temperature": torch.tensor(-1.0)}, ValueError, "temperature: expected a number above 0, got -1.0"),
        ({"backend": "fortran"}, ValueError, "backend: expected 'auto' or one of"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "query": torch.randn(4, 3),
        "bank": torch.randn(5, 3),
        "index": torch.zeros(4, 2, dtype=torch.int64),
        "pairs": torch.zeros(4, 6, 2, dtype=torch.int64),
    }
    with pytest.raises(error, match=message):
        HF.mixed_negative_logits(**{**arguments, **change})


def of_nearly_opposite(deviation: float, **options: Any) -> float:
    """cos(q, g) of g = (n + n')/2 with n' = −n but for ``deviation`` along q: 1, or 0 where g is taken to vanish."""
    query, bank = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0], [-1.0, deviation]])
    index, pairs = torch.tensor([[0, 1]]), torch.tensor([[[0, 1]]])
    return float(HF.mixed_negative_logits(query, bank, index, pairs, temperature=1.0, **options))


@every_backend
def test_a_mixture_vanishes_at_sixteen_roundings_of_its_parts(backend: str) -> None:
    """‖g‖² against that many roundings of ‖αn‖² + ‖(1 − α)n'‖² = 1/2, in float32."""
    bound = 2 * (VANISHING * torch.finfo(torch.float32).eps / 2) ** 0.5
    assert of_nearly_opposite(0.9 * bound, backend=backend) == 0
    assert of_nearly_opposite(1.2 * bound, backend=backend) > 0.5
