"""Row statistics of cosine similarities, differentiable."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hicl_fast import _checks as check
from hicl_fast.ops.common.constants import SameGroup
from hicl_fast.ops.info_nce.arguments import (
    Columns,
    OwnNegatives,
    check_in_batch,
    check_own_negatives,
    own_of,
    problem_of,
)
from hicl_fast.ops.log_sum_exp import operator


class RowLogits(NamedTuple):
    """What a row's softmax comes to, (N,) float32 (float64) each, both with gradients."""

    negative: Tensor  # (N,) log-sum-exp over the row's columns without its positive; −inf where there is none
    positive: Tensor  # (N,) its positive's logit; (T,) with target_offsets


def log_sum_exp(
    query: Tensor,  # (N, D)
    key: Tensor | Columns,  # (M, D)
    *,
    target: Tensor | None = None,  # (N,) int64
    target_offsets: Tensor | None = None,  # (N + 1,) int64
    temperature: float | Tensor = 0.05,
    negatives: Tensor | Columns | None = None,  # (P, D)
    hard_negative_weight: float = 0.0,
    own_negatives: Tensor | OwnNegatives | None = None,  # (N, K, D)
    bank: Tensor | Columns | None = None,  # (B, D)
    extra_logits: Tensor | None = None,  # (N, E)
    limit: Tensor | None = None,  # (N,)
    false_negative_margin: float | None = None,
    false_negative_ratio: float | None = None,
    in_batch: bool = True,
    query_group: Tensor | None = None,  # (N,) or (N, G) int64
    key_group: Tensor | None = None,  # (M,) or (M, G) int64
    bank_group: Tensor | None = None,  # (B,) or (B, G) int64
    same_group: SameGroup = "exclude",
    margin: float = 0.0,
    precision: str | None = None,
    backend: str = "auto",
) -> RowLogits:
    r"""Each row's log-sum-exp over its negatives, and its positive's logit: what row losses are written with.

    .. math:: \mathrm{negative}_i = \log \sum_{j \ne t_i} e^{\ell_{ij}}, \qquad \mathrm{positive}_i = \ell_{i t_i}, \qquad
              \ell_{ij} = \frac{1}{\tau} \frac{q_i \cdot k_j}{\|q_i\| \|k_j\|}

    The columns j and the rules that leave some of them out are those of :func:`info_nce`, which is
    ``softplus(negative - positive)``. The positive is never inside the sum, so what is made of the two keeps the digits of a
    small loss. No N×M matrix is built, forward or backward: O(N·D) memory, 2·N·M·D operations forward and 6·N·M·D backward.

    ``log_sum_exp(x, x)`` leaves out a row's own column: the block of queries among queries. A row that has no negative has
    −∞, with gradient 0.

    Example:
        Four blocks in one softmax (GTE, arXiv 2308.03281), and the decoupled loss (arXiv 2110.06848):

        >>> qd, dq = HF.log_sum_exp(q, d, temperature=0.01), HF.log_sum_exp(d, q, temperature=0.01)
        >>> qq, dd = HF.log_sum_exp(q, q, temperature=0.01), HF.log_sum_exp(d, d, temperature=0.01)
        >>> blocks = torch.stack([qd.negative, dq.negative, qq.negative, dd.negative])
        >>> gte = F.softplus(blocks.logsumexp(0) - qd.positive).mean()
        >>> decoupled = (qd.negative - qd.positive).mean()

    Args:
        query: (N, D) rows; need not be normalised.
        key: (M, D) candidates, or :class:`Columns`.
        target: (N,) int64, the key that is row i's positive. Default: key i, which needs N ≤ M.
        target_offsets: (N + 1,) int64, rising from 0 to T, where rows have several positives: those of row i are the keys
            ``target[target_offsets[i] : target_offsets[i + 1]]``, one at least; target is (T,), and so is ``positive``. None of
            a row's positives is in its ``negative``.
        temperature: τ > 0, a float or a 0-d tensor; a tensor gets its exact gradient.
        negatives: (P, D) explicit hard negatives, shared by all rows, or :class:`Columns`; get gradients.
        hard_negative_weight: added to the logit of row i's own negative ``negatives[i]`` (needs P = N).
        own_negatives: (N, K, D) K negatives for each query alone, or :class:`OwnNegatives`: as many for each as it has.
            They get gradients; limits hold for them. 6·H·D operations for H of them, and no more memory than their own.
        bank: (B, D) rows of earlier batches, or :class:`Columns`; negatives without gradient.
        extra_logits: (N, E) further columns per row that are logits already; get gradients.
        limit: (N,) a column of row i that is more similar than ``limit[i]`` is left out; a constant.
        false_negative_margin: a limit of the positive's similarity plus this.
        false_negative_ratio: a limit of this times the positive's similarity, where that is above 0.
        in_batch: ``False``: the keys are positives alone, not the other queries' negatives, and nothing of the size N×M is
            computed: own negatives, negatives, bank and extra logits are what a positive is told from (NV-Embed's second
            stage, arXiv 2405.17428).
        query_group: (N,) int64 group of each query, or (N, G), one for each of G relations.
        key_group: (M,) or (M, G) int64 group of each key.
        bank_group: (B,) or (B, G) int64 group of each bank row.
        same_group: columns of the row's own group are left out (``"exclude"``) or ordinary negatives (``"negative"``). A row
            has one positive here: ``"positive"`` is :func:`info_nce`'s alone.
        margin: ArcCon's angle u ≥ 0 in radians: the positive's logit is cos(θ + u)/τ, its cosine held within ±(1 − 10⁻⁷) first.
        precision: of the matrix products, as in :func:`info_nce`.
        backend: ``"auto"``, ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``RowLogits(negative, positive)``, (N,) float32 (float64 where an input is float64) each; with ``target_offsets``
        ``positive`` is (T,).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        hicl_fast.BackendError: the backend asked for is not there or does not do this call.
    """
    check_own_negatives(hard_negative_weight, query, negatives)
    check.one_of("same_group", same_group, ("exclude", "negative"))
    problem = problem_of(
        query,
        key,
        target=target,
        target_offsets=target_offsets,
        temperature=temperature,
        negatives=negatives,
        own_negatives=own_negatives,
        bank=bank,
        extra_logits=extra_logits,
        limit=limit,
        query_group=query_group,
        key_group=key_group,
        bank_group=bank_group,
        hard_negative_weight=hard_negative_weight,
        false_negative_margin=false_negative_margin,
        false_negative_ratio=false_negative_ratio,
        in_batch=in_batch,
        same_group=same_group,
        margin=margin,
        symmetric=False,
        reduction="none",
        precision=precision,
        backend=backend,
    )
    own = own_of(problem, own_negatives)
    if not in_batch:
        check_in_batch(problem, own)
    return RowLogits(*operator.apply(problem, backend, own, in_batch=in_batch)[:2])
