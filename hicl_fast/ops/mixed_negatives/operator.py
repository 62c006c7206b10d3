"""``hicl_fast::mixed_negatives``: schema, fake kernel, autograd.

The operator gives cosines; the temperature is a factor behind it, whose gradient is autograd's business. Beside the
cosines it leaves 1 / ‖g‖ of each mixture, so that the backward pass needs no product of two vectors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hicl_fast.ops.backends import features, registry
from hicl_fast.ops.common.autograd import first_derivatives, is_transformed, readable, runs_eagerly, without_autocast
from hicl_fast.ops.common.numbers import check_scale, sum_type
from hicl_fast.ops.common.shapes import check_shapes
from hicl_fast.ops.mixed_negatives import by_reference

_INPUTS = "Tensor query, Tensor bank, Tensor index, Tensor pairs, float alpha"

_library = torch.library.Library("hicl_fast", "FRAGMENT")
_library.define(f"mixed_negatives({_INPUTS}, str backend) -> (Tensor cosine, Tensor inverse_norm)")
_library.define(
    f"mixed_negatives_backward({_INPUTS}, Tensor cosine, Tensor inverse_norm, Tensor cosine_grad, bool[] wanted, "
    "str backend) -> (Tensor query_grad, Tensor bank_grad)"
)


def apply(
    query: Tensor,  # (N, D)
    bank: Tensor,  # (B, D)
    index: Tensor,  # (N, k) int64
    pairs: Tensor,  # (N, m, 2) int64
    alpha: float,
    scale: Tensor,  # () 1 / temperature
    backend: str,
) -> Tensor:  # (N, m)
    asked = features.of_mixing(query, bank, index)
    backend = registry.choose(backend, "mixed_negatives", query.device.type, sum_type(query, bank), asked)
    if is_transformed(query, bank, scale):
        check_scale(scale)
        _check_places(index, pairs, bank.shape[0])
        cosine = by_reference.mixed_negatives(query, bank, index, pairs, alpha)
    elif runs_eagerly(query, bank, index, pairs, scale):
        check_scale(scale)
        cosine, _ = _MixedNegatives.apply(query, bank, index, pairs, alpha, backend)
    else:
        cosine, _ = torch.ops.hicl_fast.mixed_negatives(query, bank, index, pairs, alpha, backend)
    return cosine * scale.to(cosine.dtype)


def check_indices(name: str, value: Tensor, end: int, what: str) -> None:
    """Indices out of range would read other memory; checked where they are in host memory."""
    if (values := readable(value)) is None:
        return
    low, high = (int(bound) for bound in torch.aminmax(values))
    if low < 0 or high >= end:
        raise ValueError(f"{name}: expected {what}, 0 to {end - 1}, got values from {low} to {high}")


def _check_places(index: Tensor, pairs: Tensor, num_rows: int) -> None:
    check_indices("index", index, num_rows, "rows of bank")
    check_indices("pairs", pairs, index.shape[1], "columns of index")


def _run(
    query: Tensor, bank: Tensor, index: Tensor, pairs: Tensor, alpha: float, backend: str
) -> tuple[Tensor, Tensor]:  # (N, m) each
    _check_places(index, pairs, bank.shape[0])
    with without_autocast(query.device.type):
        return registry.implementation("mixed_negatives", backend).forward(query, bank, index, pairs, alpha)


def _run_backward(
    query: Tensor,
    bank: Tensor,
    index: Tensor,
    pairs: Tensor,
    alpha: float,
    cosine: Tensor,
    inverse_norm: Tensor,
    cosine_grad: Tensor,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients in the inputs' types; an empty tensor where none was wanted."""
    with without_autocast(query.device.type):
        return registry.implementation("mixed_negatives", backend).backward(
            query, bank, index, pairs, alpha, cosine, inverse_norm, cosine_grad, wanted
        )


def _check(query: Tensor, bank: Tensor, index: Tensor, pairs: Tensor, **found: Tensor) -> None:
    """``found``: what the forward pass left, and its gradient, (N, m) each."""
    inputs = {"query": (query, "ND"), "bank": (bank, "BD"), "index": (index, "Nk"), "pairs": (pairs, "Nm2")}
    check_shapes("mixed_negatives", **inputs, **{name: (x, "Nm") for name, x in found.items()})


def _run_registered(query: Tensor, bank: Tensor, index: Tensor, pairs: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _check(query, bank, index, pairs)
    return _run(query, bank, index, pairs, *rest)


def _run_backward_registered(
    query: Tensor,
    bank: Tensor,
    index: Tensor,
    pairs: Tensor,
    alpha: float,
    cosine: Tensor,
    inverse_norm: Tensor,
    cosine_grad: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    _check(query, bank, index, pairs, cosine=cosine, inverse_norm=inverse_norm, cosine_grad=cosine_grad)
    check_indices("index", index, bank.shape[0], "rows of bank")
    check_indices("pairs", pairs, index.shape[1], "columns of index")
    return _run_backward(query, bank, index, pairs, alpha, cosine, inverse_norm, cosine_grad, *rest)


_library.impl("mixed_negatives", _run_registered, "CompositeExplicitAutograd")
_library.impl("mixed_negatives_backward", _run_backward_registered, "CompositeExplicitAutograd")


@torch.library.register_fake("hicl_fast::mixed_negatives", lib=_library)
def _fake(
    query: Tensor, bank: Tensor, index: Tensor, pairs: Tensor, alpha: float, backend: str
) -> tuple[Tensor, Tensor]:
    cosine = query.new_empty(pairs.shape[0], pairs.shape[1], dtype=sum_type(query, bank))
    return cosine, torch.empty_like(cosine)


@torch.library.register_fake("hicl_fast::mixed_negatives_backward", lib=_library)
def _fake_backward(
    query: Tensor,
    bank: Tensor,
    index: Tensor,
    pairs: Tensor,
    alpha: float,
    cosine: Tensor,
    inverse_norm: Tensor,
    cosine_grad: Tensor,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    query_grad, bank_grad = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if want else x.new_empty(0)
        for x, want in zip((query, bank), wanted, strict=True)
    )
    return query_grad, bank_grad


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, bank, index, pairs, ctx.alpha, ctx.backend = inputs
    ctx.save_for_backward(query, bank, index, pairs, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, cosine_grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    query, bank, index, pairs, cosine, inverse_norm = ctx.saved_tensors
    wanted = [bool(ctx.needs_input_grad[0]), bool(ctx.needs_input_grad[1])]

    def compute() -> tuple[Tensor | None, Tensor | None]:
        eager = runs_eagerly(query, bank, index, pairs)
        backward = _run_backward if eager else torch.ops.hicl_fast.mixed_negatives_backward
        query_grad, bank_grad = backward(
            query, bank, index, pairs, ctx.alpha, cosine, inverse_norm, cosine_grad, wanted, ctx.backend
        )
        return query_grad if wanted[0] else None, bank_grad if wanted[1] else None

    def value(query: Tensor, bank: Tensor) -> Tensor:
        return by_reference.mixed_negatives(query, bank, index, pairs, ctx.alpha)

    query_grad, bank_grad = first_derivatives(compute, value, cosine_grad, (query, bank))
    return query_grad, bank_grad, None, None, None, None


torch.library.register_autograd("hicl_fast::mixed_negatives", _backward, setup_context=_setup, lib=_library)


class _MixedNegatives(torch.autograd.Function):
    """``mixed_negatives`` without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _run(*inputs)
        _setup(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)
