"""Ragged pooling on every CPU backend against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hicl_fast
import hicl_fast.functional as HF
from hicl_fast import reference

BACKENDS = [s.name for s in hicl_fast.backends() if s.available and s.name != "triton"]
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def draw(lengths: list[int], d: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    segments = torch.randn(sum(lengths), d, generator=generator, dtype=torch.float64)
    return segments, offsets, torch.randint(1, 33, (sum(lengths),), generator=generator).double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [3, 1, 5], [40, 2], [1] * 70 + [9]], ids=len)
@pytest.mark.parametrize("d", [1, 7, 16, 33])
def test_values_and_gradients(backend: str, d: int, lengths: list[int], dtype: torch.dtype) -> None:
    segments, offsets, weights = draw(lengths, d)
    segments = segments.to(dtype)
    upstream = torch.randn(len(lengths), d, dtype=torch.float64)
    results = []
    for pool, h, options in (
        (HF.segment_pool, segments, {"backend": backend}),
        (reference.segment_pool, segments.double(), {}),
    ):
        h, w = h.clone().requires_grad_(), weights.to(h.dtype).requires_grad_()
        pooled = pool(h, offsets, w, **options)
        pooled.backward(upstream.to(pooled.dtype))
        results.append((pooled.detach(), h.grad, w.grad))
    for got, exact in zip(*results, strict=True):
        assert got.dtype == dtype
        tolerance = 8 * torch.finfo(dtype).eps * (1 + exact.abs().max().item())
        assert (got.double() - exact).abs().max() <= tolerance


def test_integer_weights_and_none(backend: str) -> None:
    segments, offsets, weights = draw([3, 1, 5], 6)
    exact = reference.segment_pool(segments, offsets, weights)
    torch.testing.assert_close(HF.segment_pool(segments, offsets, weights.long(), backend=backend), exact)
    torch.testing.assert_close(
        HF.segment_pool(segments, offsets, backend=backend), reference.segment_pool(segments, offsets)
    )


def test_weights_that_sum_to_zero(backend: str) -> None:
    segments, offsets, weights = draw([2, 3], 4)
    weights[:2] = 0
    segments.requires_grad_()
    pooled = HF.segment_pool(segments, offsets, weights, backend=backend)
    pooled.sum().backward()
    assert (pooled[0] == 0).all() and (segments.grad[:2] == 0).all() and (pooled[1] != 0).all()


def test_strided_segments(backend: str) -> None:
    segments, offsets, weights = draw([2, 3], 8)
    torch.testing.assert_close(
        HF.segment_pool(segments[:, ::2], offsets, weights, backend=backend),
        reference.segment_pool(segments[:, ::2], offsets, weights),
    )


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 2, 5], "start at 0, got 1"),
        ([0, 2, 4], "end at the number of segments, 5, got 4"),
        ([0, 2, 2, 5], "sequence 1 is empty"),
        ([0, 4, 2, 5], "sequence 1 falls"),
    ],
)
def test_offsets_that_are_wrong(backend: str, offsets: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=f"offsets: .*{message}"):
        HF.segment_pool(torch.randn(5, 3), torch.tensor(offsets), backend=backend)


def test_compiled_and_registered(backend: str) -> None:
    segments, offsets, weights = draw([2, 3], 4)
    torch.library.opcheck(
        torch.ops.hicl_fast.segment_pool.default, (segments.requires_grad_(), offsets, weights, backend)
    )
    compiled = torch.compile(lambda *a: HF.segment_pool(*a, backend=backend), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(segments, offsets, weights), HF.segment_pool(segments, offsets, weights))
