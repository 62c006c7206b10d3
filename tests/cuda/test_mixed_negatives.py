"""Hard-negative mixing in csrc/cuda, emulated on the CPU, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hicl_fast.functional as HF
from hicl_fast import BackendError, reference
from hicl_fast.ops.mixed_negatives import cuda as cuda_mixed_negatives
from tests.cuda.test_info_nce import TOLERANCE, rows

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("emulated")]

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def draw(n: int, k: int, num_mixed: int, d: int, dtype: torch.dtype = torch.float32, num_bank: int = 0) -> Inputs:
    """Query, bank, index and pairs. Rows of the bank come up again and again."""
    num_bank = num_bank or k + 3
    index = torch.randint(0, num_bank, (n, k), generator=torch.Generator().manual_seed(n + k + d))
    return rows(n, d, dtype), rows(num_bank, d, dtype, seed=1), index, HF.random_pairs(n, num_mixed, k, seed=0)


def run(function: Any, query: Tensor, bank: Tensor, index: Tensor, pairs: Tensor, **options: Any) -> list[Tensor]:
    """Logits and gradients, under an upstream gradient that keeps float16's gradients out of its subnormal numbers."""
    leaves = [x.detach().clone().requires_grad_() for x in (query, bank)]
    logits = function(*leaves, index, pairs, alpha=0.3, temperature=0.07, **options)
    upstream = torch.linspace(-100, 200, logits.numel(), dtype=torch.float64).reshape(logits.shape)
    return [logits.detach(), *torch.autograd.grad(logits, leaves, upstream.to(logits.dtype))]


def assert_exact(*inputs: Tensor, slack: float = 1) -> None:
    query, bank, *choice = inputs
    ours = run(HF.mixed_negative_logits, *inputs, backend="cuda")
    exact = run(reference.mixed_negative_logits, query.double(), bank.double(), *choice)
    eager = run(reference.mixed_negative_logits, query.float(), bank.float(), *choice)
    assert [x.dtype for x in ours] == [torch.float32, query.dtype, bank.dtype]
    for mine, right, in_float32, dtype in zip(
        ours, exact, eager, (torch.float32, query.dtype, bank.dtype), strict=True
    ):
        error, of_eager = ((x.double() - right).norm() / right.norm() for x in (mine, in_float32))
        assert error <= slack * TOLERANCE[dtype] + 4 * of_eager, (error, of_eager)


# A step is 32 float32 or 64 16-bit dimensions; odd widths are not copied by 16 bytes; a row of the bank takes 256.
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("d", [2, 31, 32, 33, 64, 65, 72, 200, 264])
def test_dimensions(d: int, dtype: torch.dtype) -> None:
    # In a plane little is left of a gradient once its part along the row is taken away, but all of its rounding.
    assert_exact(*draw(3, 5, 8, d, dtype), slack=10 if d == 2 else 1)


# Four outputs at a time; 128 threads have a pair and an entry of the Gram matrix each at a time.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("k", "num_mixed"), [(2, 1), (3, 127), (4, 128), (14, 129), (15, 7), (16, 300), (63, 40), (64, 40)]
)
def test_negatives_and_pairs(k: int, num_mixed: int, dtype: torch.dtype) -> None:
    assert_exact(*draw(2, k, num_mixed, 40, dtype))


def test_orders_of_warps_and_lanes(order: int) -> None:
    assert_exact(*draw(4, 10, 40, 136, torch.bfloat16))
    assert_exact(*draw(4, 10, 40, 75))


def test_many_rows_that_choose_the_same(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More entries than a block looks through at a time, in one part and in several; the last row is nobody's."""
    inputs = draw(70, 17, 5, 40, num_bank=6)  # 40 dimensions: two warps of the block have some
    inputs[2].clamp_max_(4)
    assert_exact(*inputs)
    monkeypatch.setattr(cuda_mixed_negatives, "ADDITION_BYTES", 30 * 17 * 40 * 4)
    assert_exact(*inputs)
    assert not run(HF.mixed_negative_logits, *inputs, backend="cuda")[2][5].any()


def test_two_runs_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for order in ("0", "5"):
        monkeypatch.setenv("HICL_EMULATION_ORDER", order)
        results.append(run(HF.mixed_negative_logits, *draw(20, 10, 40, 72, torch.bfloat16), backend="cuda"))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_pairs_of_a_vector_with_itself() -> None:
    query, bank, index, _ = draw(4, 3, 1, 24)
    index[0] = index[0, 0]  # the same row of the bank under different columns
    assert_exact(query, bank, index, torch.tensor([[[0, 0], [1, 0], [2, 1], [2, 2]]]).expand(4, -1, -1))


def test_strides_alignment_and_mixed_types() -> None:
    query, bank, index, pairs = draw(4, 5, 8, 42)
    index, pairs = index.T.contiguous().T, pairs.flip(1).contiguous().flip(1)
    assert_exact(query.T.contiguous().T, bank.half(), index, pairs)
    assert_exact(query[:, 1:25], bank[:, 2:26], index, pairs)


@pytest.mark.parametrize("which", [0, 1])
def test_one_gradient_without_the_other(which: int) -> None:
    *vectors, index, pairs = draw(5, 6, 6, 40)
    both = [x.clone().requires_grad_() for x in vectors]
    HF.mixed_negative_logits(*both, index, pairs, backend="cuda").sum().backward()
    vectors[which].requires_grad_()
    HF.mixed_negative_logits(*vectors, index, pairs, backend="cuda").sum().backward()
    assert vectors[1 - which].grad is None
    assert torch.equal(vectors[which].grad, both[which].grad)


@pytest.mark.parametrize("alpha", [0.5, 0.7])
def test_what_vanishes_is_zero(alpha: float) -> None:
    query, bank = rows(2, 75, torch.float32), rows(4, 75, torch.float32, seed=1)
    query[1] = 0
    bank[1] = -bank[0] * alpha / (1 - alpha)  # but for rounding, α n_0 + (1 − α) n_1 = 0
    bank[2:] = 0
    index, pairs = torch.tensor([[0, 1, 2, 3]] * 2), torch.tensor([[[0, 1], [2, 3], [0, 1]], [[0, 1], [0, 2], [1, 1]]])
    query.requires_grad_(), bank.requires_grad_()
    logits = HF.mixed_negative_logits(query, bank, index, pairs, alpha=alpha, backend="cuda")
    logits.backward(torch.ones_like(logits))
    assert not logits.any() and not query.grad.any() and not bank.grad.any()


def test_a_query_too_short_to_divide_by_its_length() -> None:
    query, bank, index, pairs = draw(3, 4, 5, 24)
    query[1] *= 1e-14 / query[1].norm()
    assert_exact(query, bank, index, pairs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value: float) -> None:
    query, bank, index, pairs = draw(4, 5, 8, 40)
    bank[0, 7] = value
    logits = HF.mixed_negative_logits(query, bank, index, pairs, backend="cuda")
    has_it = (index.gather(1, pairs.flatten(1)) == 0).unflatten(1, (8, 2)).any(dim=2)
    assert torch.equal(logits.isnan(), has_it) and has_it.any() and not has_it.all()


def test_no_pairs() -> None:
    query, bank, index, pairs = draw(3, 4, 1, 24)
    logits, *gradients = run(HF.mixed_negative_logits, query, bank, index, pairs[:, :0], backend="cuda")
    assert logits.shape == (3, 0) and not any(gradient.any() for gradient in gradients)


def test_indices_out_of_range_on_the_device_make_nan() -> None:
    query, bank, index, pairs = draw(4, 4, 6, 24)
    index[1, 2] = -1  # as hard_negatives leaves it where a row has too few
    index[2, 0] = len(bank)
    pairs[3, 1, 0], pairs[3, 2, 1] = 4, -1
    expected = (pairs == torch.tensor([9, 2, 0, 9])[:, None, None]).any(dim=2)
    expected[3, 1:3] = True
    operators = torch.ops.hicl_fast_cuda
    cosine, inverse_norm = operators.mixed_negatives(query, bank, index, pairs, 0.5)
    assert torch.equal(cosine.isnan(), expected)
    query_grad, _ = operators.mixed_negatives_backward(
        query, bank, index, pairs, 0.5, cosine, inverse_norm, torch.ones_like(cosine), True, True, 1 << 20
    )
    assert torch.equal(query_grad.isnan().any(dim=1), expected.any(dim=1))


def test_what_it_leaves_to_others() -> None:
    query, bank, index, pairs = draw(2, 65, 3, 8)
    with pytest.raises(BackendError, match="does not take more than 64 negatives of a row"):
        HF.mixed_negative_logits(query, bank, index, pairs, backend="cuda")
    with pytest.raises(BackendError, match="does not take more than 1024 rows, columns or dimensions"):
        HF.mixed_negative_logits(query, torch.ones(1025, 8), index[:, :9], pairs % 9, backend="cuda")


# --- in the loss -----------------------------------------------------------------------------------------------------


def loss_and_gradients(function: Any, query: Tensor, key: Tensor, upstream: float, **options: Any) -> list[Tensor]:
    temperature = torch.tensor(0.07, dtype=torch.float64).to(torch.promote_types(query.dtype, torch.float32))
    leaves = [query.detach().clone(), key.detach().clone(), temperature]
    loss = function(*(x.requires_grad_() for x in leaves[:2]), temperature=leaves[2].requires_grad_(), **options)
    return [loss.detach(), *torch.autograd.grad((loss * upstream).sum(), leaves)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_info_nce_with_mixing(reduction: str, dtype: torch.dtype) -> None:
    """Selection, mixtures and loss, each by its kernels: as the reference given what was chosen."""
    query, key = rows(40, 48, dtype), rows(70, 48, dtype, seed=1)
    mixing = HF.Mixing(10, HF.random_pairs(40, 40, 10, seed=0), 0.5)
    chosen = HF.info_nce_with_statistics(query, key, mixing=mixing, backend="cuda").hard_negatives
    assert torch.equal(chosen, HF.hard_negatives(query, key, 10, backend="cuda")[1])

    def composed(query: Tensor, key: Tensor, temperature: Tensor) -> Tensor:
        mixed = reference.mixed_negative_logits(query, key, chosen, mixing.pairs, temperature=temperature)
        return reference.info_nce(query, key, temperature=temperature, extra_logits=mixed, reduction=reduction)

    options = {"mixing": mixing, "reduction": reduction, "backend": "cuda"}
    ours = loss_and_gradients(HF.info_nce, query, key, 300.0, **options)
    exact = loss_and_gradients(composed, query.double(), key.double(), 300.0)
    for mine, right in zip(ours, exact, strict=True):
        assert (mine.double() - right).norm() <= (1e-5 if mine.dim() < 2 else 3 * TOLERANCE[dtype]) * right.norm()
