"""The pooling kernels in Triton's interpreter, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hicl_fast.functional as functional
import hicl_fast.reference as reference

pytestmark = [pytest.mark.triton, pytest.mark.interpret]

# A program takes one sequence and 512 dimensions.
DIMENSIONS = (1, 33, 511, 512, 513, 1025)


def _offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def _gradients(function, segments: Tensor, offsets: Tensor, weights: Tensor | None, **options: str) -> list[Tensor]:  # noqa: ANN001
    """The pooled rows, and the gradients of segments and (floating) weights."""
    h = segments.detach().clone().requires_grad_()
    w = weights.detach().clone().requires_grad_(weights.is_floating_point()) if weights is not None else None
    pooled = function(h, offsets, w, **options)
    upstream = torch.linspace(-1, 2, pooled.numel(), dtype=torch.float64).reshape(pooled.shape).to(pooled.dtype)
    pooled.backward(upstream)
    return [pooled.detach(), h.grad] + ([w.grad] if w is not None and w.requires_grad else [])  # type: ignore[list-item]


def _assert_agrees(segments: Tensor, offsets: Tensor, weights: Tensor | None, tolerance: float = 2e-6) -> None:
    ours = _gradients(functional.segment_pool, segments, offsets, weights, backend="triton")
    exact_weights = weights.double() if weights is not None and weights.is_floating_point() else weights
    exact = _gradients(reference.segment_pool, segments.double(), offsets, exact_weights)
    assert len(ours) == len(exact)
    for mine, right in zip(ours, exact, strict=True):
        # The inputs are of size 1; a single segment's weight has gradient 0, left over from differences of that size.
        torch.testing.assert_close(
            mine.double(), right, rtol=tolerance, atol=tolerance * max(1.0, right.abs().max().item())
        )


@pytest.mark.parametrize("dim", DIMENSIONS)
def test_every_block_edge(dim: int) -> None:
    torch.manual_seed(dim)
    _assert_agrees(torch.randn(8, dim), _offsets(1, 4, 3), torch.rand(8) + 0.1)


@pytest.mark.parametrize("lengths", [(1,), (5,), (1, 1, 1), (1, 2, 33)], ids=str)
def test_lengths(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    num_segments = sum(lengths)
    _assert_agrees(torch.randn(num_segments, 40), _offsets(*lengths), torch.rand(num_segments) + 0.1)
    _assert_agrees(torch.randn(num_segments, 40), _offsets(*lengths), None)


@pytest.mark.parametrize("weights", [torch.tensor([32, 32, 7, 1]), torch.tensor([1.0, 0.0, 2.0, 3.0]).half()], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)],
    ids=str,
)
def test_types(weights: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    from tests.kernels import interpreter_bf16

    interpreter_bf16.install()
    torch.manual_seed(0)
    tolerance = max(tolerance, 2e-3 if weights.dtype == torch.float16 else 0.0)
    _assert_agrees(torch.randn(4, 40).to(dtype), _offsets(3, 1), weights, tolerance)


def test_a_sequence_without_weight_is_zero() -> None:
    weights = torch.tensor([0.0, 0.0, 1.0])
    pooled, grad, _ = _gradients(functional.segment_pool, torch.randn(3, 8), _offsets(2, 1), weights, backend="triton")
    assert not pooled[0].any() and not grad[:2].any() and pooled[1].any()


def test_strides() -> None:
    segments = torch.randn(40, 6).T
    _assert_agrees(segments, _offsets(2, 4), torch.rand(6, 2)[:, 0] + 0.1)
