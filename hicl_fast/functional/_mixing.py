"""HNCSE: the hardest negatives of a row, and mixtures of them."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from hicl_fast import _checks as check
from hicl_fast.functional._arguments import (
    check_groups,
    check_index,
    check_k,
    check_matrices,
    check_pairs,
    check_positive_mixing_options,
    check_rows,
    scale,
)
from hicl_fast.ops import hard_negatives as _hard_negatives_op
from hicl_fast.ops import mixed_negatives as _mixed_negatives_op
from hicl_fast.ops import positive_mixing as _positive_mixing_op


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
    check_matrices(query, key, None, None)
    check.flag("exclude_target", exclude_target)
    if not exclude_target and target is not None:
        raise ValueError(f"target: expected None where exclude_target is False, got {check.describe(target)}")
    if exclude_target:
        check_rows(query, key, target, None, query_group, key_group)
    else:
        check_groups(query, key, query_group, key_group)
    check_k(k, query, key, int(exclude_target and target is None))
    return _hard_negatives_op.apply(query, key, k, target, query_group, key_group, exclude_target, backend)


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
    check_index(query, index)
    check_pairs(query, pairs)
    check.share("alpha", alpha)
    return _mixed_negatives_op.apply(query, bank, index, pairs, float(alpha), scale(temperature, query, bank), backend)


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
    check_positive_mixing_options(threshold, weights)
    return _positive_mixing_op.apply(query, positive, negative, float(threshold), weights)
