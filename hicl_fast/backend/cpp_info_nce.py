"""InfoNCE through csrc/cpu/info_nce.cpp."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hicl_fast.ops.problem import Gradients, Mixing, Problem, RowStatistics, Wanted

MIXES_WHILE_SWEEPING = True  # `forward` takes a Mixing
_SAME_GROUP = {"exclude": 0, "negative": 1, "positive": 2}


def forward(
    problem: Problem, row_weight: float, wanted: Wanted, mixing: Mixing | None = None
) -> tuple[RowStatistics, Gradients]:
    return _run(problem, row_weight, None, wanted, mixing)


def backward(
    problem: Problem, negative_lse: Tensor, column_lse: Tensor, loss_grad: Tensor, wanted: Wanted
) -> Gradients:
    """Sweeps again: with a block's whole rows in cache their statistics cost next to nothing."""
    return _run(problem, 1.0, loss_grad, wanted)[1]


def _run(
    problem: Problem, row_weight: float, loss_grad: Tensor | None, wanted: Wanted, mixing: Mixing | None = None
) -> tuple[RowStatistics, Gradients]:
    dtype = problem.dtype

    def ready(x: Tensor | None) -> Tensor | None:
        if x is None or (x.dtype == dtype and x.is_contiguous()):
            return x
        return x.detach().to(dtype).contiguous()

    def index(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.contiguous()

    # Below autograd: its fallback for operators that have no gradient costs as much as the rest of a small call.
    with _precision(problem), torch._C._AutoDispatchBelowAutograd():
        loss, negative_lse, column_lse, positive, hardest, total, *gradients, hard_negatives = _operator()(
            ready(problem.query),
            ready(problem.key),
            index(problem.target),
            ready(problem.negatives),
            ready(problem.bank),
            ready(problem.extra_logits),
            index(problem.query_group),
            index(problem.key_group),
            ready(loss_grad),
            row_weight,
            float(problem.scale),
            problem.hard_negative_weight,
            _SAME_GROUP[problem.same_group],
            problem.margin,
            problem.symmetric,
            *((None, 0, 0.0) if mixing is None else (mixing.pairs.contiguous(), mixing.k, mixing.alpha)),
            sum(1 << bit for bit, is_wanted in enumerate(wanted) if is_wanted),
        )
    statistics = RowStatistics(loss, negative_lse, column_lse, positive, hardest, hard_negatives, total)
    return statistics, Gradients(*gradients)


@functools.cache
def _operator() -> Callable[..., tuple[Tensor, ...]]:
    return torch.ops.hicl_fast_cpp.info_nce.default


def _precision(problem: Problem) -> contextlib.AbstractContextManager[None]:
    """How oneDNN may multiply float32 matrices during the call; nothing is touched where the default will do."""
    asked = problem.precision
    if asked == "default":
        inputs = (problem.query, problem.key)
        if not (all(x.dtype == torch.bfloat16 for x in inputs) and _has_bf16_products()):
            return contextlib.nullcontext()
        asked = "bf16"
    return _fp32_products({"bf16": "bf16", "float32": "ieee"}[asked])


@contextlib.contextmanager
def _fp32_products(precision: str) -> Iterator[None]:
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = precision
    try:
        yield
    finally:
        settings.fp32_precision = before


@functools.cache
def _has_bf16_products() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
