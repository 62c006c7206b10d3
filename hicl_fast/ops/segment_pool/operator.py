"""``hicl_fast::segment_pool``: schema, fake kernel, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hicl_fast.ops.backends import registry
from hicl_fast.ops.common.autograd import first_derivatives, is_transformed, readable, runs_eagerly, without_autocast
from hicl_fast.ops.common.shapes import check_shapes
from hicl_fast.ops.segment_pool import by_reference

_library = torch.library.Library("hicl_fast", "FRAGMENT")
_library.define("segment_pool(Tensor segments, Tensor offsets, Tensor? weights, str backend) -> Tensor")
_library.define(
    "segment_pool_backward(Tensor segments, Tensor offsets, Tensor? weights, Tensor pooled_grad, bool[] wanted, "
    "str backend) -> (Tensor segments_grad, Tensor weights_grad)"
)


def apply(segments: Tensor, offsets: Tensor, weights: Tensor | None, backend: str) -> Tensor:  # (B, D)
    backend = registry.choose(backend, "segment_pool", segments.device.type, segments.dtype)
    if is_transformed(segments, weights):
        _check_values(segments, offsets, weights)
        return by_reference.segment_pool(segments, offsets, weights)
    if not runs_eagerly(segments, offsets, weights):
        return torch.ops.hicl_fast.segment_pool(segments, offsets, weights, backend)
    return _SegmentPool.apply(segments, offsets, weights, backend)


def _check_values(segments: Tensor, offsets: Tensor, weights: Tensor | None) -> None:
    """Offsets in host memory must cut the rows into non-empty sequences; a device is never waited for."""
    _check_weights(weights)
    if (values := readable(offsets)) is None or values.dim() != 1:  # or those of a batch of calls
        return
    offsets = values
    first, last, num_segments = int(offsets[0]), int(offsets[-1]), segments.shape[0]
    if first != 0:
        raise ValueError(f"offsets: expected to start at 0, got {first}")
    if last != num_segments:
        raise ValueError(f"offsets: expected to end at the number of segments, {num_segments}, got {last}")
    length = offsets.diff()
    if int(length.min()) < 1:
        at = int(length.argmin())
        begin, end = int(offsets[at]), int(offsets[at + 1])
        what = "is empty" if begin == end else "falls"
        raise ValueError(
            f"offsets: expected at least one segment in every sequence; sequence {at} {what}: got {begin}:{end}"
        )


def _check_weights(weights: Tensor | None) -> None:
    """A mean has no negative weights: with them the sum that it divides by can be anything, zero included."""
    if (values := readable(weights)) is None:
        return
    low, high = (float(bound) for bound in torch.aminmax(values))
    if not 0.0 <= low <= high < torch.inf:  # NaN is both bounds
        raise ValueError(f"weights: expected finite numbers of at least 0, got values from {low:g} to {high:g}")


def _run(segments: Tensor, offsets: Tensor, weights: Tensor | None, backend: str) -> Tensor:
    _check_values(segments, offsets, weights)
    with without_autocast(segments.device.type):
        return registry.implementation("segment_pool", backend).forward(segments, offsets, weights)


def _run_backward(
    segments: Tensor, offsets: Tensor, weights: Tensor | None, pooled_grad: Tensor, wanted: list[bool], backend: str
) -> tuple[Tensor, Tensor]:
    """Gradients in the inputs' types; an empty tensor where none was wanted."""
    with without_autocast(segments.device.type):
        return registry.implementation("segment_pool", backend).backward(
            segments, offsets, weights, pooled_grad, wanted
        )


def _run_registered(segments: Tensor, offsets: Tensor, weights: Tensor | None, backend: str) -> Tensor:
    check_shapes("segment_pool", segments=(segments, "SD"), offsets=(offsets, "O"), weights=(weights, "S"))
    return _run(segments, offsets, weights, backend)


def _run_backward_registered(
    segments: Tensor, offsets: Tensor, weights: Tensor | None, pooled_grad: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    check_shapes(
        "segment_pool_backward",
        segments=(segments, "SD"),
        offsets=(offsets[1:], "B"),
        weights=(weights, "S"),
        pooled_grad=(pooled_grad, "BD"),
    )
    _check_values(segments, offsets, weights)
    return _run_backward(segments, offsets, weights, pooled_grad, *rest)


_library.impl("segment_pool", _run_registered, "CompositeExplicitAutograd")
_library.impl("segment_pool_backward", _run_backward_registered, "CompositeExplicitAutograd")


@torch.library.register_fake("hicl_fast::segment_pool", lib=_library)
def _fake(segments: Tensor, offsets: Tensor, weights: Tensor | None, backend: str) -> Tensor:
    return segments.new_empty(offsets.shape[0] - 1, segments.shape[1])


@torch.library.register_fake("hicl_fast::segment_pool_backward", lib=_library)
def _fake_backward(
    segments: Tensor, offsets: Tensor, weights: Tensor | None, pooled_grad: Tensor, wanted: list[bool], backend: str
) -> tuple[Tensor, Tensor]:
    nothing = segments.new_empty(0)
    segments_grad = torch.empty_like(segments, memory_format=torch.contiguous_format) if wanted[0] else nothing
    weights_grad = torch.empty_like(weights) if weights is not None and wanted[1] else nothing.clone()
    return segments_grad, weights_grad


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    segments, offsets, weights, ctx.backend = inputs
    ctx.has_weights = weights is not None
    ctx.save_for_backward(segments, offsets, *([weights] if weights is not None else []))


def _backward(ctx: Any, pooled_grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
    segments, offsets, *rest = ctx.saved_tensors
    weights = rest[0] if ctx.has_weights else None
    wanted = [bool(ctx.needs_input_grad[0]), bool(ctx.needs_input_grad[2])]

    def compute() -> tuple[Tensor | None, Tensor | None]:
        eager = runs_eagerly(segments, offsets, weights)
        backward = _run_backward if eager else torch.ops.hicl_fast.segment_pool_backward
        segments_grad, weights_grad = backward(segments, offsets, weights, pooled_grad, wanted, ctx.backend)
        return segments_grad if wanted[0] else None, weights_grad if wanted[1] else None

    def value(segments: Tensor, weights: Tensor | None) -> Tensor:
        return by_reference.segment_pool(segments, offsets, weights)

    segments_grad, weights_grad = first_derivatives(compute, value, pooled_grad, (segments, weights))
    return segments_grad, None, weights_grad, None


torch.library.register_autograd("hicl_fast::segment_pool", _backward, setup_context=_setup, lib=_library)


class _SegmentPool(torch.autograd.Function):
    """``segment_pool`` without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        pooled = _run(*inputs)
        _setup(ctx, inputs, pooled)
        return pooled

    backward = staticmethod(_backward)
