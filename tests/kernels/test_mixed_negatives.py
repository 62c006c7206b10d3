"""The hard-negative mixing kernels in Triton's interpreter, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hicl_fast.functional as functional
import hicl_fast.reference as reference
from tests.conftest import INTERPRETING
from tests.ops.test_mixed_negatives import test_a_mixture_vanishes_at_sixteen_roundings_of_its_parts as at_the_bound

pytestmark = pytest.mark.triton
interpreted = pytest.mark.interpret

# A program takes one row: 64 dimensions and 32 pairs at a time, and k rounded up to 16 or 32.


def _draw(n: int, k: int, num_mixed: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n + k + num_mixed + dim)
    query = torch.randn(n, dim, generator=generator).to(dtype)
    bank = torch.randn(k + 3, dim, generator=generator).to(dtype)
    index = torch.randint(0, k + 3, (n, k), generator=generator)  # rows of the bank come up again and again
    return query, bank, index, functional.random_pairs(n, num_mixed, k, seed=0)


def _results(function: Any, query: Tensor, bank: Tensor, index: Tensor, pairs: Tensor, **options: Any) -> list[Tensor]:
    q, b = query.detach().requires_grad_(), bank.detach().requires_grad_()
    logits = function(q, b, index, pairs, alpha=0.3, **options)
    upstream = torch.linspace(-1, 2, logits.numel(), dtype=torch.float64).reshape(logits.shape).to(logits.dtype)
    logits.backward(upstream)
    assert q.grad is not None and b.grad is not None
    return [logits.detach(), q.grad, b.grad]


def _assert_agrees(query: Tensor, bank: Tensor, index: Tensor, pairs: Tensor, tolerance: float = 4e-6) -> None:
    ours = _results(functional.mixed_negative_logits, query, bank, index, pairs, backend="triton")
    exact = _results(reference.mixed_negative_logits, query.double(), bank.double(), index, pairs)
    for mine, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(
            mine.double(), right, rtol=tolerance, atol=tolerance * max(1.0, right.abs().max().item())
        )


@interpreted
@pytest.mark.parametrize("dim", [1, 7, 63, 64, 65, 130])
def test_every_block_edge_of_the_dimensions(dim: int) -> None:
    if dim == 1:  # every gradient of the bank is what is left of terms that cancel
        _assert_agrees(*_draw(3, 5, 8, dim, torch.float64), tolerance=1e-10)
    else:
        _assert_agrees(*_draw(3, 5, 8, dim))


@interpreted
@pytest.mark.parametrize(("k", "num_mixed"), [(2, 1), (3, 32), (16, 33), (17, 5), (33, 9)])
def test_every_block_edge_of_the_pairs(k: int, num_mixed: int) -> None:
    _assert_agrees(*_draw(2, k, num_mixed, 40))


@interpreted
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 4e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)],
    ids=str,
)
def test_types(dtype: torch.dtype, tolerance: float) -> None:
    from tests.kernels import interpreter_bf16

    interpreter_bf16.install()
    _assert_agrees(*_draw(4, 5, 8, 40, dtype), tolerance=tolerance)


@interpreted
def test_strides_and_mixed_types() -> None:
    query, bank, index, pairs = _draw(4, 5, 8, 40)
    index = index.T.contiguous().T
    _assert_agrees(query.T.contiguous().T, bank.half(), index, pairs.flip(1).contiguous().flip(1), tolerance=1e-3)


@interpreted
def test_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from hicl_fast.ops.mixed_negatives import torch as chunked_mixed_negatives

    monkeypatch.setattr(chunked_mixed_negatives, "CHUNK_BYTES", 2 * 5 * 40 * 4)
    _assert_agrees(*_draw(5, 5, 8, 40))


@interpreted
def test_what_vanishes_is_zero() -> None:
    bank = torch.randn(1, 40).repeat(2, 1) * torch.tensor([[1.0], [-1.0]])
    query = torch.cat((torch.randn(1, 40), torch.zeros(1, 40))).requires_grad_()
    bank.requires_grad_()
    index, pairs = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[[0, 1]], [[0, 0]]])
    logits = functional.mixed_negative_logits(query, bank, index, pairs, backend="triton")
    logits.backward(torch.ones_like(logits))
    assert query.grad is not None and bank.grad is not None
    assert not logits.any() and not query.grad.any() and not bank.grad.any()


@interpreted
def test_when_a_mixture_vanishes() -> None:
    at_the_bound("triton")


@interpreted
def test_nan_stays_in_its_rows() -> None:
    query, bank, index, pairs = _draw(4, 5, 8, 40)
    bank[0] = torch.nan
    logits = functional.mixed_negative_logits(query, bank, index, pairs, backend="triton")
    has_nan = (index == 0).any(dim=1)
    assert torch.equal(logits.isnan().any(dim=1), has_nan) and has_nan.any() and not has_nan.all()


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING, reason="the interpreter has taken the compiler's place")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("block_k", [16, 32])
def test_every_architecture_without_spills(arch: str, block_k: int) -> None:
    import triton.language as tl
    from hicl_fast.kernels import mixed_negatives
    from hicl_fast.kernels.mixed_negatives import BLOCK_DIM, BLOCK_PAIRS, NUM_WARPS

    from tests.kernels.aot import SHARED_MEMORY_LIMIT, compile_for, resources_of

    blocks = {"BLOCK_K": block_k, "BLOCK_PAIRS": BLOCK_PAIRS, "BLOCK_DIM": BLOCK_DIM, "SUM_TYPE": tl.float32}
    for kernel in (mixed_negatives.cosine_kernel, mixed_negatives.gradient_kernel):
        types = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
        types |= {"query_ptr": "*bf16", "bank_ptr": "*bf16", "index_ptr": "*i64", "pairs_ptr": "*i64"}
        types |= {"vanishing": "fp32", "floor": "fp32"}
        needs = resources_of(compile_for(arch, kernel, types, blocks, NUM_WARPS))
        assert needs.spills == 0 and needs.shared <= SHARED_MEMORY_LIMIT[arch]
