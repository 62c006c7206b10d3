"""The losses and poolings as functions: arguments are checked here, the mathematics is in the backends."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from hicl_fast import _checks as check
from hicl_fast.ops import info_nce as _info_nce_op
from hicl_fast.ops import segment_pool as _segment_pool_op
from hicl_fast.ops.problem import Problem
from hicl_fast.reference.info_nce import Reduction, SameGroup

__all__ = ["info_nce", "info_nce_with_statistics", "segment_pool"]


def info_nce(
    query: Tensor,  # (N, D)
    key: Tensor,  # (M, D)
    *,
    target: Tensor | None = None,  # (N,) int64
    temperature: float | Tensor = 0.05,
    negatives: Tensor | None = None,  # (P, D)
    hard_negative_weight: float = 0.0,
    bank: Tensor | None = None,  # (B, D)
    extra_logits: Tensor | None = None,  # (N, E)
    query_group: Tensor | None = None,  # (N,) int64
    key_group: Tensor | None = None,  # (M,) int64
    same_group: SameGroup = "exclude",
    margin: float = 0.0,
    symmetric: bool = False,
    reduction: Reduction = "mean",
    precision: str | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Temperature-scaled softmax cross entropy over cosine similarities, without the N×M matrix.

    .. math:: \mathrm{loss}_i = \log \sum_j e^{\ell_{ij}} - \ell_{i t_i}, \qquad
              \ell_{ij} = \frac{1}{\tau} \frac{q_i \cdot k_j}{\|q_i\| \|k_j\|}

    (SimCSE, arXiv 2104.08821, eq. 1 and 5.) The columns j are the M keys, the P explicit negatives, the B bank rows
    and the E extra logits. Inputs may be float64, float32, bfloat16 or float16, of mixed types and any strides. Sums
    are kept in float32 (float64 where an input is float64); gradients have their input's type. A zero row has
    similarity 0 to everything and gets gradient 0.

    Args:
        query: (N, D) rows to classify; need not be normalised.
        key: (M, D) candidates; need not be normalised.
        target: (N,) int64, the key that is row i's positive. Default: key i, which needs N ≤ M.
        temperature: τ > 0, a float or a 0-d tensor; a tensor gets its exact gradient.
        negatives: (P, D) explicit hard negatives, shared by all rows; get gradients.
        hard_negative_weight: added to the logit of row i's own negative ``negatives[i]`` (needs P = N).
        bank: (B, D) rows of earlier batches; negatives without gradient.
        extra_logits: (N, E) further columns per row that are logits already (similarity divided by τ); get gradients.
        query_group: (N,) int64 group of each query, given together with ``key_group``.
        key_group: (M,) int64 group of each key.
        same_group: what keys of the row's own group are: left out of its denominator (``"exclude"``), ordinary
            negatives (``"negative"``), or positives beside the target (``"positive"``:
            ``lse_i`` minus the mean logit of all positives).
        margin: ArcCon's angle u ≥ 0 in radians: the target's logit becomes cos(θ + u)/τ.
        symmetric: the mean of this loss and the same loss with query and key exchanged; needs N = M and no target.
        reduction: ``"mean"`` over rows, ``"sum"`` or ``"none"``.
        precision: of the matrix products. ``None`` follows the input type and
            ``torch.set_float32_matmul_precision``; ``"float32"``; ``"bf16"`` rounds the operands to bfloat16 and
            accumulates in float32 where the processor has such products.
        backend: ``"auto"``, ``"torch"``, ``"cpp"`` or ``"triton"``.

    Returns:
        A float32 (float64) scalar, or (N,) with ``reduction="none"``. NaN or Inf in an input gives NaN.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        hicl_fast.BackendError: the backend asked for is not there or does not do this call.
    """
    return info_nce_with_statistics(
        query,
        key,
        target=target,
        temperature=temperature,
        negatives=negatives,
        hard_negative_weight=hard_negative_weight,
        bank=bank,
        extra_logits=extra_logits,
        query_group=query_group,
        key_group=key_group,
        same_group=same_group,
        margin=margin,
        symmetric=symmetric,
        reduction=reduction,
        precision=precision,
        backend=backend,
    )[0]


def info_nce_with_statistics(
    query: Tensor,
    key: Tensor,
    *,
    target: Tensor | None = None,
    temperature: float | Tensor = 0.05,
    negatives: Tensor | None = None,
    hard_negative_weight: float = 0.0,
    bank: Tensor | None = None,
    extra_logits: Tensor | None = None,
    query_group: Tensor | None = None,
    key_group: Tensor | None = None,
    same_group: SameGroup = "exclude",
    margin: float = 0.0,
    symmetric: bool = False,
    reduction: Reduction = "mean",
    precision: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`info_nce`, and the detached similarities of each row's positive (N,) and of its hardest negative (N,).

    The second is −inf for a row that has no negative among keys, explicit negatives and bank.
    """
    _check_matrices(query, key, negatives, bank)
    _check_rows(query, key, target, extra_logits, query_group, key_group)
    check.one_of("same_group", same_group, ("exclude", "negative", "positive"))
    check.one_of("reduction", reduction, ("mean", "sum", "none"))
    check.one_of("precision", precision, (None, "float32", "bf16"))  # type: ignore[arg-type]
    if not (isinstance(margin, (int, float)) and 0.0 <= margin < math.pi):
        raise ValueError(f"margin: expected an angle in radians, at least 0 and below π, got {margin!r}")
    if hard_negative_weight != 0.0 and (negatives is None or negatives.shape[0] != query.shape[0]):
        came = "no negatives" if negatives is None else f"{negatives.shape[0]} negatives"
        raise ValueError(
            f"hard_negative_weight: expected one negative for each of the {query.shape[0]} queries, got {came}"
        )
    if symmetric and (query.shape[0] != key.shape[0] or target is not None):
        came = f"{query.shape[0]} queries and {key.shape[0]} keys" if target is None else "a target"
        raise ValueError(f"symmetric: expected as many queries as keys and no target, got {came}")

    problem = Problem(
        query=query,
        key=key,
        scale=_scale(temperature, query),
        target=target,
        negatives=negatives,
        bank=None if bank is None else bank.detach(),
        extra_logits=extra_logits,
        query_group=query_group,
        key_group=key_group,
        hard_negative_weight=float(hard_negative_weight),
        same_group=same_group,
        margin=float(margin),
        symmetric=symmetric,
        precision=precision or "default",
    )
    return _info_nce_op.apply(problem, reduction, backend)


def segment_pool(
    segments: Tensor,  # (S, D)
    offsets: Tensor,  # (B + 1,) int64
    weights: Tensor | None = None,  # (S,)
    *,
    backend: str = "auto",
) -> Tensor:
    r"""Weighted mean of the segments of each sequence: HiCL's aggregation (arXiv 2310.09720).

    .. math:: H_b = \sum_j w_{bj} h_{bj} \Big/ \sum_j w_{bj}

    Args:
        segments: (S, D) float64, float32, bfloat16 or float16; sequence b owns rows ``offsets[b]:offsets[b + 1]``.
        offsets: (B + 1,) int64 on the segments' device: starts at 0, rises, ends at S. Values are checked where they
            are in host memory; a GPU is not waited for.
        weights: (S,) for example the number of tokens of each segment, integer or floating point; gets a gradient if
            it asks for one. Default: all ones. A sequence whose weights sum to zero gets a zero row.
        backend: ``"auto"``, ``"torch"``, ``"cpp"`` or ``"triton"``.

    Returns:
        (B, D) in the type of ``segments``; sums are kept in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        hicl_fast.BackendError: the backend asked for is not there or does not do this call.
    """
    check.floating_matrix("segments", segments, "(S, D)")
    if not isinstance(offsets, Tensor) or offsets.dtype != torch.int64:
        raise TypeError(f"offsets: expected an int64 tensor of shape (B + 1,), got {check.describe(offsets)}")
    if offsets.dim() != 1 or offsets.shape[0] < 2:
        raise ValueError(f"offsets: expected shape (B + 1,) with B ≥ 1, got {check.describe(offsets)}")
    check.same_device("offsets", offsets, segments)
    if weights is not None:
        if not isinstance(weights, Tensor):
            raise TypeError(
                f"weights: expected a tensor of shape ({segments.shape[0]},), got {check.describe(weights)}"
            )
        if weights.shape != segments.shape[:1]:
            raise ValueError(
                f"weights: expected shape ({segments.shape[0]},), one for each segment, got {check.describe(weights)}"
            )
        check.same_device("weights", weights, segments)
    return _segment_pool_op.apply(segments, offsets, weights, backend)


def _check_matrices(query: Tensor, key: Tensor, negatives: Tensor | None, bank: Tensor | None) -> None:
    check.floating_matrix("query", query, "(N, D)")
    if query.shape[0] == 0 or query.shape[1] == 0:
        raise ValueError(f"query: expected at least one row and one dimension, got {check.describe(query)}")
    for name, value, shape in (("key", key, "(M, D)"), ("negatives", negatives, "(P, D)"), ("bank", bank, "(B, D)")):
        if value is not None:
            check.floating_matrix(name, value, shape, like=query)
            check.row_length(name, value, query.shape[1])


def _check_rows(
    query: Tensor,
    key: Tensor,
    target: Tensor | None,
    extra_logits: Tensor | None,
    query_group: Tensor | None,
    key_group: Tensor | None,
) -> None:
    n, m = query.shape[0], key.shape[0]
    if target is not None:
        check.index_vector("target", target, n, "a key for each query", query)
    elif n > m:
        raise ValueError(f"key: expected at least {n} rows, one for each query, or a target; got {check.describe(key)}")
    if extra_logits is not None:
        check.floating_matrix("extra_logits", extra_logits, "(N, E)", like=query)
        if extra_logits.shape[0] != n:
            raise ValueError(f"extra_logits: expected {n} rows, one for each query, got {check.describe(extra_logits)}")
    if (query_group is None) != (key_group is None):
        missing = "query_group" if query_group is None else "key_group"
        raise ValueError(f"{missing}: expected an int64 tensor, since the other side's groups are given, got None")
    if query_group is not None and key_group is not None:
        check.index_vector("query_group", query_group, n, "a group for each query", query)
        check.index_vector("key_group", key_group, m, "a group for each key", query)


def _scale(temperature: float | Tensor, query: Tensor) -> Tensor:
    """1 / temperature as a 0-d tensor; a number stays in host memory, so that no device is waited for to read it."""
    if isinstance(temperature, Tensor):
        if temperature.dim() != 0 or not temperature.is_floating_point():
            raise ValueError(f"temperature: expected a number or a 0-d tensor, got {check.describe(temperature)}")
        if temperature.device != query.device and temperature.device.type != "cpu":
            raise ValueError(
                f"temperature: expected a tensor on {query.device} or cpu, got {check.describe(temperature)}"
            )
        return temperature.to(torch.promote_types(temperature.dtype, torch.float32)).reciprocal()
    check.positive_number("temperature", temperature)
    return _constant(1.0 / temperature)


@functools.lru_cache(maxsize=64)
def _constant(value: float) -> Tensor:
    """Kept, since making a tensor of a number takes longer than everything else that is checked here."""
    return torch.tensor(value, dtype=torch.float64)
