"""The losses and poolings as functions: arguments are checked here, the mathematics is in the backends."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from hicl_fast import _checks as check
from hicl_fast.ops import hard_negatives as _hard_negatives_op
from hicl_fast.ops import info_nce as _info_nce_op
from hicl_fast.ops import mixed_negatives as _mixed_negatives_op
from hicl_fast.ops import paradigm as _paradigm_op
from hicl_fast.ops import positive_mixing as _positive_mixing_op
from hicl_fast.ops import segment_pool as _segment_pool_op
from hicl_fast.ops.info_nce import Result
from hicl_fast.ops.paradigm_settings import Settings
from hicl_fast.ops.problem import Mixing, Problem
from hicl_fast.pairs import random_pairs
from hicl_fast.reference.info_nce import Reduction, SameGroup
from hicl_fast.reference.paradigm import (
    DEFAULT_MARGIN,
    MODIFIABLE,
    OBJECTIVES,
    Dissipation,
    Modification,
    Objective,
    Ratio,
    Weight,
)

__all__ = [
    "Mixing",
    "hard_negatives",
    "info_nce",
    "info_nce_with_statistics",
    "mixed_negative_logits",
    "paradigm",
    "paradigm_with_statistics",
    "positive_mixing",
    "random_pairs",
    "segment_pool",
]


_MOST_NEGATIVES = 128  # of a row, in hard_negatives


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
    mixing: Mixing | None = None,
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
        mixing: ``Mixing(k, pairs, alpha)``: mixtures of each row's k hardest keys as further columns, as
            :func:`hard_negatives` and :func:`mixed_negative_logits` give them, in one pass where the backend has one
            (``cpp``; with ``reduction="none"`` none has). Not with ``symmetric``.
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
        backend: ``"auto"``, ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

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
        mixing=mixing,
        query_group=query_group,
        key_group=key_group,
        same_group=same_group,
        margin=margin,
        symmetric=symmetric,
        reduction=reduction,
        precision=precision,
        backend=backend,
    ).loss


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
    mixing: Mixing | None = None,
    query_group: Tensor | None = None,
    key_group: Tensor | None = None,
    same_group: SameGroup = "exclude",
    margin: float = 0.0,
    symmetric: bool = False,
    reduction: Reduction = "mean",
    precision: str | None = None,
    backend: str = "auto",
) -> Result:
    """:func:`info_nce`, and what it finds on its way: ``(loss, positive, hardest, hard_negatives)``.

    ``positive`` and ``hardest`` are the detached similarities of each row's positive (N,) and of its hardest negative
    (N,), −inf for a row that has none among keys, explicit negatives and bank; ``hard_negatives`` are the keys (N, k)
    that ``mixing`` took, or ``None``.
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
    if mixing is not None:
        _check_mixing(mixing, query, key, target, symmetric)

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
    return _info_nce_op.apply(problem, reduction, backend, mixing)


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
        backend: ``"auto"``, ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

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


def mixed_negative_logits(
    query: Tensor,  # (N, D)
    bank: Tensor,  # (B, D)
    index: Tensor,  # (N, k) int64
    pairs: Tensor,  # (N, m, 2) int64
    *,
    alpha: float = 0.5,
    temperature: float | Tensor = 0.05,
    backend: str = "auto",
) -> Tensor:
    r"""Logits of hard negatives mixed two by two: HNCSE's hard-negative mixing (arXiv 2411.12156).

    .. math:: \ell_{ip} = \frac{1}{\tau} \frac{q_i \cdot g_{ip}}{\|q_i\| \|g_{ip}\|}, \qquad
              g_{ip} = \alpha\, n_{i a_p} + (1 - \alpha)\, n_{i b_p}, \qquad n_{ic} = \mathrm{bank}_{\mathrm{index}_{ic}}

    The n are mixed as they come, unnormalised. Only the row's k similarities and its k×k Gram matrix are computed:
    q·g = α q·n_a + (1 − α) q·n_b and ‖g‖² = α² ‖n_a‖² + (1 − α)² ‖n_b‖² + 2 α (1 − α) n_a·n_b. Inputs may be float64,
    float32, bfloat16 or float16, of mixed types and any strides; sums are kept in float32 (float64 where query or bank
    is). A mixture that vanishes, shorter than 1e-12 or with a ‖g‖² that is lost in the rounding of the three terms, as
    that of opposite vectors is, has logit 0 and gets gradient 0; so has a zero query.

    Args:
        query: (N, D) rows; need not be normalised.
        bank: (B, D) vectors that the negatives are taken from.
        index: (N, k) int64, the rows of ``bank`` that are row i's negatives, as :func:`hard_negatives` gives them.
            Values are checked where they are in host memory; a GPU is not waited for.
        pairs: (N, m, 2) int64, which of its k negatives are mixed, for example of :func:`random_pairs`: values from 0
            to k − 1, checked as those of ``index``.
        alpha: α, the first negative's share, 0 to 1.
        temperature: τ > 0, a float or a 0-d tensor; a tensor gets its exact gradient.
        backend: ``"auto"``, ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Returns:
        (N, m) float32 (float64), for :func:`info_nce`'s ``extra_logits``. Gradients reach query, bank and temperature;
        the same input gives the same bits.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        hicl_fast.BackendError: the backend asked for is not there or does not do this call.
    """
    check.floating_matrix("query", query, "(N, D)")
    check.floating_matrix("bank", bank, "(B, D)", like=query)
    check.row_length("bank", bank, query.shape[1])
    if query.numel() == 0:
        raise ValueError(f"query: expected at least one row and one dimension, got {check.describe(query)}")
    _check_index(query, index)
    _check_pairs(query, pairs)
    _check_alpha(alpha)
    return _mixed_negatives_op.apply(query, bank, index, pairs, float(alpha), _scale(temperature, query), backend)


def positive_mixing(
    query: Tensor,  # (N, D)
    positive: Tensor,  # (N, D)
    negative: Tensor,  # (N, D)
    *,
    threshold: float = 0.1,
    weights: tuple[float, float] | Literal["search"] = (1.0, 0.1),
) -> Tensor:
    r"""Each row's positive mixed with its hardest negative: HNCSE's positive mixing (arXiv 2411.12156).

    With d1 = cos(query, positive) and d2 = cos(query, negative), row by row,

    .. math:: p' = \begin{cases}
              w_1 p + w_2 n & d_1 > d_2 \text{ and } (d_1 - d_2) / d_1 \le \mathrm{threshold} \\
              \frac{d_1}{d_1 + d_2} p + \frac{d_2}{d_1 + d_2} n & d_1 \le d_2 \text{ and } d_1 + d_2 > 10^{-6} \\
              p & \text{otherwise, and wherever } d_1 \le 0 \end{cases}

    on the vectors as they come, unnormalised. The weights are constants: gradients flow to p and n through the last
    operation alone, and none to query.

    ``weights="search"`` takes the one pair (w1, w2) of the grid over [0, 2]², step 0.1, with which the rows of the
    first case have the lowest mean rank of their positive, and among those the largest mean margin
    cos(q, p') − d2. The rank is p's place among p' and the row's *original* negatives (other rows' mixtures don't
    enter): 1 + the number of negatives at least as similar as p'. Since (1, 0) gives rank 1 in every such row, the
    lowest mean rank is 1, and reached where p' is more similar than the hardest negative in every row: that negative
    is all the search needs. Weights that are multiples of each other give the same cosines; the multiple whose larger
    weight is nearest to 1 is taken.

    Args:
        query: (N, D) float64, float32, bfloat16 or float16.
        positive: (N, D) row i's positive.
        negative: (N, D) row i's hardest negative.
        threshold: of (d1 − d2) / d1, at least 0; no unit.
        weights: (w1, w2) or ``"search"``.

    Returns:
        (N, D) p', in the type of ``positive``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check.floating_matrix("query", query, "(N, D)")
    for name, value in (("positive", positive), ("negative", negative)):
        check.floating_matrix(name, value, "(N, D)", like=query)
        if value.shape != query.shape:
            raise ValueError(f"{name}: expected shape {tuple(query.shape)}, as query has, got {check.describe(value)}")
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold: expected a number, got {check.describe(threshold)}")
    if not threshold >= 0:
        raise ValueError(f"threshold: expected a number of at least 0, got {threshold!r}")
    if weights != "search":
        is_pair = isinstance(weights, (tuple, list)) and len(weights) == 2
        if not (is_pair and all(isinstance(w, (int, float)) and math.isfinite(w) for w in weights)):
            raise ValueError(f"weights: expected a pair of finite numbers or 'search', got {check.describe(weights)}")
    return _positive_mixing_op.apply(query, positive, negative, float(threshold), weights)


def _check_mixing(mixing: Mixing, query: Tensor, key: Tensor, target: Tensor | None, symmetric: bool) -> None:
    if symmetric:
        raise ValueError("mixing: expected None with symmetric=True, since a mixture has one direction")
    _check_k(mixing.k, query, key, 1 if target is None else 0)
    _check_pairs(query, mixing.pairs)
    _check_alpha(mixing.alpha)


def _check_alpha(alpha: float) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"alpha: expected a number, got {check.describe(alpha)}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha: expected a number from 0 to 1, got {alpha!r}")


def _check_k(k: int, query: Tensor, key: Tensor, num_positives: int) -> None:
    """``num_positives``: keys that row 0 certainly has as its positive."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: expected an integer, got {check.describe(k)}")
    most = min(_MOST_NEGATIVES, key.shape[0] - num_positives)
    if not 1 <= k <= most:
        came = f"{query.shape[0]} queries and {key.shape[0]} keys, of which row 0 has {most} candidates"
        raise ValueError(f"k: expected 1 to {most}, got {k}" + (f", with {came}" if most < _MOST_NEGATIVES else ""))


def _check_index(query: Tensor, index: Tensor) -> None:
    shape = f"({query.shape[0]}, k)"
    check.integers("index", index, shape, query)
    if index.dim() != 2 or index.shape[0] != query.shape[0] or index.shape[1] == 0:
        raise ValueError(f"index: expected shape {shape} with k ≥ 1, a row for each query, got {check.describe(index)}")


def _check_pairs(query: Tensor, pairs: Tensor) -> None:
    shape = f"({query.shape[0]}, m, 2)"
    check.integers("pairs", pairs, shape, query)
    if pairs.dim() != 3 or pairs.shape[0] != query.shape[0] or pairs.shape[2] != 2:
        raise ValueError(f"pairs: expected shape {shape}, a row for each query, got {check.describe(pairs)}")


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
    _check_groups(query, key, query_group, key_group)


def _check_groups(query: Tensor, key: Tensor, query_group: Tensor | None, key_group: Tensor | None) -> None:
    if (query_group is None) != (key_group is None):
        missing = "query_group" if query_group is None else "key_group"
        raise ValueError(f"{missing}: expected an int64 tensor, since the other side's groups are given, got None")
    if query_group is not None and key_group is not None:
        check.index_vector("query_group", query_group, query.shape[0], "a group for each query", query)
        check.index_vector("key_group", key_group, key.shape[0], "a group for each key", query)


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


def hard_negatives(
    query: Tensor,  # (N, D)
    key: Tensor,  # (M, D)
    k: int,
    *,
    target: Tensor | None = None,  # (N,) int64
    query_group: Tensor | None = None,  # (N,) int64
    key_group: Tensor | None = None,  # (M,) int64
    exclude_target: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # (N, k), (N, k) int64
    r"""The k keys that are most similar to each query, beside its positive and its group, without the N×M matrix.

    .. math:: \operatorname{top\,k}_{\;j \ne t_i,\; g_j \ne g_i} \; \frac{q_i \cdot k_j}{\|q_i\| \|k_j\|}

    (Hard negatives as in HNCSE, arXiv 2411.12156.) Keys are gone through in chunks: beside inputs and results, memory
    grows neither with N nor with M. Inputs may be float64, float32, bfloat16 or float16, of mixed types and any
    strides. The results have no gradient.

    Args:
        query: (N, D) rows; need not be normalised. A zero row has similarity 0 to everything.
        key: (M, D) candidates; need not be normalised.
        k: how many, 1 to 128.
        target: (N,) int64, the key that is row i's positive and so no candidate; −1 for a row that has none among the
            keys. Default: key i, which needs N ≤ M. Values are checked where they are in host memory.
        query_group: (N,) int64 group of each query, given together with ``key_group``; keys of the row's own group are
            no candidates.
        key_group: (M,) int64 group of each key.
        exclude_target: ``False`` where no query's positive is among the keys: every key is a candidate, and N may
            exceed M. Goes without ``target``.
        backend: ``"auto"``, ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Returns:
        The similarities, (N, k) float32 (float64 where an input is), and the keys' indices, (N, k) int64: larger
        similarities first, equal ones by lower index. A NaN in an input makes similarities NaN, which come before all
        others. On a GPU, which is not waited for, a row with fewer than k candidates has similarity −inf and index −1
        in the places that are left over.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; in host memory also for a row with
            fewer than k candidates.
        hicl_fast.BackendError: the backend asked for is not there or does not do this call.
    """
    _check_matrices(query, key, None, None)
    if not isinstance(exclude_target, bool):
        raise TypeError(f"exclude_target: expected True or False, got {check.describe(exclude_target)}")
    if not exclude_target and target is not None:
        raise ValueError(f"target: expected None where exclude_target is False, got {check.describe(target)}")
    if exclude_target:
        _check_rows(query, key, target, None, query_group, key_group)
    else:
        _check_groups(query, key, query_group, key_group)
    _check_k(k, query, key, int(exclude_target and target is None))
    return _hard_negatives_op.apply(query, key, k, target, query_group, key_group, exclude_target, backend)


def paradigm(
    u: Tensor,  # (N, D)
    v: Tensor,  # (N, D)
    objective: Objective,
    *,
    modified: Collection[Modification] = (),
    margin: float | None = None,
    temperature: float = 0.05,
    strength: float = 1.0,
    dissipation: Dissipation = "softmax",
    weight: Weight = "softmax",
    ratio: Ratio = 1.0,
    backend: str = "auto",
) -> Tensor:
    r"""A loss of the gradient paradigm (arXiv 2402.18281) between two views, without the N×N matrix.

    .. math:: \frac{\partial L_i}{\partial u_i} =
              \mathrm{GD}_i \sum_{j \ne i} W_{ij} \, (v_j - R_{ij} \, v_i)

    with u and v normalised: gradient dissipation, weight and ratio. docs/paradigm.md has each objective's equation.
    Inputs may be float64, float32, bfloat16 or float16, of mixed types and any strides; sums are kept in float32
    (float64). A zero row has similarity 0 to everything and gets gradient 0.

    Args:
        u: (N, D) one view, N ≥ 2; need not be normalised.
        v: (N, D) the other; row i is u_i's positive, all others its negatives.
        objective: ``"info_nce"``, ``"arccon"``, ``"mpt"``, ``"met"``, ``"mat"``; ``"custom"``: the equation with
            ``dissipation``, ``weight`` and ``ratio``, in both directions, each with the other view constant; or a loss
            that is not contrastive: ``"mhe"`` (alignment and uniformity), ``"mhs"``, ``"vicreg"``, ``"barlow_twins"``.
        modified: of those last four, what is replaced by the paper's: any of ``"gd"``, ``"w"``, ``"r"``. The weight of
            ``"mhs"`` is its nearest negative already, so ``"w"`` changes nothing there.
        margin: ArcCon's angle u and MAT's m in radians, MET's m as a distance, else m as a similarity: of the hinge, or
            of the modified dissipation. Default: the paper's.
        temperature: τ > 0, of every softmax.
        strength: λ > 0, of what drives the rows apart in the last four.
        dissipation: of ``"custom"``: ``"softmax"``; a margin m, for 1[s_ii − max s_ij < m]; ``None``, for 1; or a
            function of :class:`hicl_fast.reference.paradigm.PairStatistics` that gives (N,).
        weight: of ``"custom"``: ``"softmax"`` (over negatives, times 1/τ), ``"uniform"``, ``"hardest"``,
            ``("power", p)`` (max(s, 1e-4)^p, normalised over negatives), or a function of some rows' similarities
            (R, N) and their statistics that gives (R, N); what it gives on the diagonal is ignored.
        ratio: of ``"custom"`` and of the modification ``"r"``: a number. Of ``"custom"`` also ``"arccon"``, ``"met"``,
            ``"mat"`` (those losses' ratios, with the hardest negative), or a function of the statistics that gives (N,).
        backend: ``"auto"``, ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"`` (the first two objectives alone).

    Returns:
        A float32 (float64) scalar. NaN or Inf in an input gives NaN.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        hicl_fast.BackendError: the backend asked for is not there or does not do this call.
    """
    return paradigm_with_statistics(
        u,
        v,
        objective,
        modified=modified,
        margin=margin,
        temperature=temperature,
        strength=strength,
        dissipation=dissipation,
        weight=weight,
        ratio=ratio,
        backend=backend,
    ).loss


def paradigm_with_statistics(
    u: Tensor,
    v: Tensor,
    objective: Objective,
    *,
    modified: Collection[Modification] = (),
    margin: float | None = None,
    temperature: float = 0.05,
    strength: float = 1.0,
    dissipation: Dissipation = "softmax",
    weight: Weight = "softmax",
    ratio: Ratio = 1.0,
    backend: str = "auto",
) -> Result:
    """:func:`paradigm`, and the detached similarities of each row's positive (N,) and of its hardest negative.

    The second is (N,), for ``"mhe"``, ``"vicreg"`` and ``"barlow_twins"`` (and ``"mhs"`` with ``"gd"``) of the
    nearest neighbour in u_i's own view; it is empty for the last two as they stand, which look at no single pair.
    """
    settings = paradigm_settings(
        objective, modified, margin, temperature, strength, dissipation=dissipation, weight=weight, ratio=ratio
    )
    check_views(u, v)
    return _paradigm_op.apply(u, v, settings, backend)


def check_views(u: Tensor, v: Tensor) -> None:
    """Two views of a batch of at least two rows."""
    check.floating_matrix("u", u, "(N, D)")
    check.floating_matrix("v", v, "(N, D)", like=u)
    if u.shape[0] < 2 or u.shape[1] == 0:
        raise ValueError(f"u: expected at least two rows and one dimension, got {check.describe(u)}")
    if v.shape != u.shape:
        raise ValueError(f"v: expected shape {tuple(u.shape)}, as u has, got {check.describe(v)}")


def paradigm_settings(
    objective: Objective,
    modified: Collection[Modification],
    margin: float | None,
    temperature: float,
    strength: float,
    *,
    dissipation: Dissipation,
    weight: Weight,
    ratio: Ratio,
) -> Settings:
    """The arguments of :func:`paradigm` that are not tensors, checked."""
    check.one_of("objective", objective, OBJECTIVES)
    if isinstance(modified, str):
        raise TypeError(f"modified: expected a collection of names, got {check.describe(modified)}")
    for name in modified:
        check.one_of("modified", name, ("gd", "w", "r"))
    if modified and objective not in MODIFIABLE:
        raise ValueError(
            f"modified: expected none with {objective!r}; only {', '.join(MODIFIABLE)} have modified forms"
        )
    margin = DEFAULT_MARGIN[objective] if margin is None else margin
    check.real_number("margin", margin)
    if objective == "info_nce" and margin != 0.0:
        raise ValueError(f"margin: expected none with 'info_nce', got {margin!r}; 'arccon' has one")
    if objective == "arccon" and not 0.0 <= margin < math.pi:
        raise ValueError(f"margin: expected an angle in radians, at least 0 and below π, got {margin!r}")
    check.positive_number("temperature", temperature)
    check.positive_number("strength", strength)
    if objective == "custom":
        _check_parts(dissipation, weight, ratio)
    else:
        for part, value in (("dissipation", dissipation), ("weight", weight)):
            if value != "softmax":
                raise ValueError(f"{part}: expected the default with {objective!r}; only 'custom' has its own")
        check.real_number("ratio", ratio)
    if ratio != 1.0 and objective != "custom" and "r" not in modified:
        raise ValueError(f"ratio: expected 1.0 without 'custom' or the modification 'r', got {ratio!r}")
    chosen = tuple(name for name in ("gd", "w", "r") if name in modified)
    return Settings(objective, chosen, float(margin), float(temperature), float(strength), dissipation, weight, ratio)


def _check_parts(dissipation: Dissipation, weight: Weight, ratio: Ratio) -> None:
    if isinstance(dissipation, str):
        check.one_of("dissipation", dissipation, ("softmax",))
    elif dissipation is not None and not callable(dissipation):
        check.real_number("dissipation", dissipation)
    if isinstance(weight, (tuple, list)):
        if len(weight) != 2 or weight[0] != "power":
            raise ValueError(f"weight: expected ('power', p), got {check.describe(weight)}")
        check.real_number("weight", weight[1])
    elif not callable(weight):
        check.one_of("weight", weight, ("softmax", "uniform", "hardest"))
    if isinstance(ratio, str):
        check.one_of("ratio", ratio, ("arccon", "met", "mat"))
    elif not callable(ratio):
        check.real_number("ratio", ratio)
