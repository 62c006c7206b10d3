"""The pooling kernels of csrc/cuda, emulated on the CPU, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hicl_fast.functional as HF
from hicl_fast import reference

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("emulated")]

# A warp takes at least 4 segments: lengths on both sides of that, sequences cut once, twice, and never.
LENGTHS = ([1], [4], [5], [1, 1, 1], [3, 1, 5], [4, 4, 4], [2, 30, 2], [1] * 9 + [17])
# A lane takes 16 bytes, 4 float32 or 8 of 16 bits, a warp 128 or 256 dimensions; odd widths go one by one.
DIMENSIONS = (1, 7, 8, 33, 127, 128, 129, 256, 264, 300)


def draw(lengths: list[int], d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * d + len(lengths))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    segments = torch.randn(sum(lengths), d, generator=generator).to(dtype)
    return segments, offsets, torch.randint(1, 33, (sum(lengths),), generator=generator).float()


def run(function: Any, segments: Tensor, offsets: Tensor, weights: Tensor | None, **options: Any) -> list[Tensor]:
    """Pooled rows and gradients."""
    h = segments.clone().requires_grad_()
    w = None if weights is None else weights.clone().requires_grad_()
    pooled = function(h, offsets, w, **options)
    upstream = torch.arange(pooled.numel()).reshape(pooled.shape) % 13 / 8 - 0.5  # every type holds it exactly
    pooled.backward(upstream.to(pooled.dtype))
    return [x.detach() for x in (pooled, h.grad, None if w is None else w.grad) if x is not None]


def assert_exact(segments: Tensor, offsets: Tensor, weights: Tensor | None) -> None:
    ours = run(HF.segment_pool, segments, offsets, weights, backend="cuda")
    exact = run(reference.segment_pool, segments.double(), offsets, None if weights is None else weights.double())
    for got, right in zip(ours[:2], exact[:2], strict=True):
        assert got.dtype == segments.dtype
        tolerance = torch.finfo(got.dtype).eps * (1 + right.abs().max())
        assert (got.double() - right).abs().max() <= tolerance
    if weights is not None:  # a sum over D of products with differences of rows, in float32 whatever the rows' type
        sizes = segments.double().norm(dim=1).max() * 2 * segments.shape[1] ** 0.5
        assert (ours[2].double() - exact[2]).abs().max() <= 8 * torch.finfo(torch.float32).eps * (1 + sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(lengths: list[int], dtype: torch.dtype) -> None:
    segments, offsets, weights = draw(lengths, 40, dtype)
    assert_exact(segments, offsets, weights)
    assert_exact(segments, offsets, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", DIMENSIONS)
def test_dimensions(d: int, dtype: torch.dtype) -> None:
    assert_exact(*draw([3, 1, 5, 9], d, dtype))


def test_orders_of_warps_and_lanes(order: int) -> None:
    assert_exact(*draw([2, 11, 1, 1, 6], 264, torch.bfloat16))


def test_rows_that_are_not_aligned() -> None:
    memory = torch.randn(5 * 8 + 1).to(torch.bfloat16)
    segments, (_, offsets, weights) = memory[1:].view(5, 8), draw([3, 2], 8, torch.bfloat16)
    assert segments.data_ptr() % 16
    assert_exact(segments, offsets, weights)


def test_strided_rows() -> None:
    segments, offsets, weights = draw([2, 4], 16, torch.float32)
    assert_exact(segments[:, ::2], offsets, weights.repeat_interleave(2)[::2])


def test_integer_weights() -> None:
    segments, offsets, weights = draw([3, 1, 5], 6, torch.float32)
    pooled = HF.segment_pool(segments, offsets, weights.long(), backend="cuda")
    assert torch.equal(pooled, HF.segment_pool(segments, offsets, weights, backend="cuda"))


def test_weights_that_sum_to_zero() -> None:
    segments, offsets, weights = draw([2, 3], 4, torch.float32)
    weights[:2] = 0
    pooled, segments_grad, _ = run(HF.segment_pool, segments, offsets, weights, backend="cuda")
    assert (pooled[0] == 0).all() and (segments_grad[:2] == 0).all() and (pooled[1] != 0).all()


def test_one_gradient_without_the_other() -> None:
    segments, offsets, weights = draw([2, 7, 3], 24, torch.float32)
    both = run(HF.segment_pool, segments, offsets, weights, backend="cuda")
    upstream = torch.arange(3 * 24).reshape(3, 24) % 13 / 8 - 0.5
    for which, expected in ((0, both[1]), (1, both[2])):
        inputs = [segments.clone(), weights.clone()]
        inputs[which].requires_grad_()
        HF.segment_pool(inputs[0], offsets, inputs[1], backend="cuda").backward(upstream)
        assert torch.equal(inputs[which].grad, expected)
        assert inputs[1 - which].grad is None


def test_nan_stays_in_its_sequence() -> None:
    segments, offsets, weights = draw([6, 5], 8, torch.float32)
    segments[2, 3] = torch.nan
    pooled = HF.segment_pool(segments, offsets, weights, backend="cuda")
    assert pooled[0, 3].isnan() and pooled.isnan().sum() == 1
