"""What the integrations share about similarities: dot products as cosines, single pairs, the type of a loss."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hicl_fast.ops.common.numbers import sum_type
from hicl_fast.ops.common.unit_rows import shortened

Similarity = Literal["cosine", "dot"]

_HEADROOM = math.sqrt(2.0)  # the longest row's second side is as long as the row itself: its gradient stays at most 1
_SHORTEST = 1e-12  # stands in for the length of the longest row where all rows are zero


class Lifted(NamedTuple):
    """``query_i · key_j = factor · cos(query'_i, key'_j)``."""

    query: Tensor  # (N, D + 2)
    key: Tensor  # (M, D + 2)
    factor: Tensor  # () detached


def lift(query: Tensor, key: Tensor) -> Lifted:
    r"""Two more dimensions that make all queries of one length and all keys of another.

    .. math:: q' = (q, 0, \sqrt{Q^2 - \|q\|^2}), \quad k' = (k, \sqrt{K^2 - \|k\|^2}, 0), \quad
              q \cdot k = q' \cdot k' = Q K \cos(q', k')

    with Q = √2 max ‖q‖ and K = √2 max ‖k‖, which are constants: the right-hand side doesn't depend on them, so they
    need no gradient. (Neyshabur and Srebro, arXiv 1410.5518.)

    Args:
        query: (N, D) float64, float32, bfloat16 or float16.
        key: (M, D) the same.

    Returns:
        Queries and keys in float32 (float64 where an input is), since a rounded √ would change the length.
    """
    dtype = sum_type(query, key)
    query_sides, query_length = _sides(query, dtype)
    key_sides, key_length = _sides(key, dtype)
    none_query, none_key = torch.zeros_like(query_sides.rest), torch.zeros_like(key_sides.rest)
    return Lifted(
        torch.cat([query_sides.rows, none_query, query_sides.rest], dim=1),
        torch.cat([key_sides.rows, key_sides.rest, none_key], dim=1),
        query_length * key_length,
    )


class _Sides(NamedTuple):
    rows: Tensor  # (N, D)
    rest: Tensor  # (N, 1)


def _sides(rows: Tensor, dtype: torch.dtype) -> tuple[_Sides, Tensor]:
    rows = rows.to(dtype)
    largest = rows.detach().abs().amax().clamp_min(_SHORTEST)  # (): squares of what it divides stay in the range
    squared = (rows / largest).square().sum(dim=1, keepdim=True)  # (N, 1)
    length = squared.detach().max().sqrt().clamp_min(1.0) * _HEADROOM  # (); 1 but where all rows are zero
    return _Sides(rows, (length.square() - squared).sqrt() * largest), length * largest


def as_cosines(
    query: Tensor, key: Tensor, scale: float | Tensor, similarity: Similarity
) -> tuple[Tensor, Tensor, float | Tensor]:
    """Queries (N, ·), keys (M, ·) and the temperature with which cosine / temperature is scale · similarity."""
    scale = in_sum_type(scale, query, key)  # the operator takes the inverse of the temperature again
    if similarity == "cosine":
        return query, key, 1.0 / scale
    lifted = lift(query, key)
    return lifted.query, lifted.key, 1.0 / (scale * lifted.factor)


def is_one_number(scale: object) -> bool:
    """Whether a scale is a number or a tensor of one, which may be learned."""
    return not isinstance(scale, Tensor) or scale.numel() == 1


def in_sum_type(scale: float | Tensor, *rows: Tensor) -> float | Tensor:
    """A scale or temperature that is a tensor as a tensor () in the type of the rows' sums at least.

    What is done to it then rounds nothing that logits keep.
    """
    if not isinstance(scale, Tensor):
        return scale
    return scale.reshape(()).to(torch.promote_types(scale.dtype, sum_type(*rows)))


def pairwise(a: Tensor, b: Tensor, similarity: Similarity) -> Tensor:  # (N, D), (N, D) -> (N,)
    """Similarity of each row of ``a`` to the same row of ``b``, in the type of sums."""
    dtype = sum_type(a, b)
    a, b = a.to(dtype), b.to(dtype)
    if similarity == "cosine":
        a, b = unit(a), unit(b)
    return (a * b).sum(dim=1)


def unit(x: Tensor) -> Tensor:  # (N, D) -> (N, D)
    """``torch.nn.functional.normalize``, right for rows too whose squared length overflows."""
    return F.normalize(shortened(x)[0], dim=-1)


def loss_type(
    similarity: Callable[[Tensor, Tensor], Tensor], reduce: Callable[[Tensor], Tensor], *embeddings: Tensor
) -> torch.dtype:
    """The type that ``reduce(similarity(...))`` of the embeddings (N, D) has here and now, under autocast or not."""
    device = embeddings[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in embeddings))
    return _loss_type(similarity, reduce, dtype, device, autocast)


@functools.cache
def _loss_type(
    similarity: Callable[[Tensor, Tensor], Tensor],
    reduce: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    device: str,
    autocast: torch.dtype | None,
) -> torch.dtype:
    """By computing one: what is rounded to what differs between devices and releases."""
    one = torch.ones(1, 1, dtype=dtype, device=device)
    with torch.no_grad():
        return reduce(similarity(one, one)).dtype
