"""InfoNCE over cosine similarities."""

from __future__ import annotations

from torch import Tensor

from hicl_fast import _checks as check
from hicl_fast.ops.common.arguments import check_k, check_pairs
from hicl_fast.ops.common.constants import Reduction, SameGroup
from hicl_fast.ops.info_nce import compose
from hicl_fast.ops.info_nce.arguments import (
    Columns,
    OwnNegatives,
    check_in_batch,
    check_own_negatives,
    own_of,
    problem_of,
)
from hicl_fast.ops.info_nce.problem import Mixing, Problem, Result


def info_nce(
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
    mixing: Mixing | None = None,
    limit: Tensor | None = None,  # (N,)
    false_negative_margin: float | None = None,
    false_negative_ratio: float | None = None,
    in_batch: bool = True,
    query_group: Tensor | None = None,  # (N,) or (N, G) int64
    key_group: Tensor | None = None,  # (M,) or (M, G) int64
    bank_group: Tensor | None = None,  # (B,) or (B, G) int64
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

    (SimCSE, arXiv 2104.08821, eq. 1 and 5.) The columns j are the M keys, the P explicit negatives, the B bank rows, the
    row's own negatives and the E extra logits. Inputs may be float64, float32, bfloat16 or float16, of mixed types and
    any strides. Sums are kept in float32 (float64 where an input is float64); gradients have their input's type. A zero
    row has similarity 0 to everything and gets gradient 0.

    Second derivatives (``create_graph=True``), forward mode and ``torch.func`` are right, and take the time and memory of
    plain PyTorch: they build the N×M matrix.

    Args:
        query: (N, D) rows to classify; need not be normalised.
        key: (M, D) candidates; need not be normalised. Keys, negatives and bank may each be :class:`Columns`, which have
            groups and hardness beside their rows.
        target: (N,) int64, the key that is row i's positive. Default: key i, which needs N ≤ M.
        target_offsets: (N + 1,) int64, rising from 0 to T, where rows have several positives: those of row i are the keys
            ``target[target_offsets[i] : target_offsets[i + 1]]``, one at least, and target is (T,). The row's loss is the mean
            over its positives p of ``log(1 + Σ_j e^(ℓ_ij) / e^(ℓ_ip))``, where j is none of its positives.
        temperature: τ > 0, a float or a 0-d tensor; a tensor gets its exact gradient.
        negatives: (P, D) explicit hard negatives, shared by all rows; get gradients.
        hard_negative_weight: added to the logit of row i's own negative ``negatives[i]`` (needs P = N).
        own_negatives: (N, K, D) K negatives for each query alone, or :class:`OwnNegatives`: as many for each as it has.
            They get gradients; limits hold for them. 6·H·D operations for H of them, and no more memory than their own.
        bank: (B, D) rows of earlier batches; negatives without gradient.
        extra_logits: (N, E) further columns per row that are logits already (similarity divided by τ); get gradients.
        mixing: ``Mixing(k, pairs, alpha)``: mixtures of each row's k hardest keys as further columns, as
            :func:`hard_negatives` and :func:`mixed_negative_logits` give them, in one pass where the backend has one
            (``cpp``; with ``reduction="none"`` none has). Not with ``symmetric``.
        limit: (N,) a column whose similarity to query i is above ``limit[i]`` is taken for a false negative and leaves
            the row's denominator; a constant. Positives never leave it. The comparison is on cosines, before scale and
            margin, and of keys, negatives, bank and own negatives alike; within the rounding of a product a column may fall
            either way. NaN is no limit. With ``symmetric`` it is that of key i among the queries too.
        false_negative_margin: m: a limit of the positive's similarity plus m (Qwen3-Embedding, arXiv 2506.05176: 0.1).
            Of several limits the lowest holds.
        false_negative_ratio: ρ > 0: a limit of ρ times the positive's similarity, where that is above 0 (NV-Retriever,
            arXiv 2407.15831: 0.95).
        in_batch: ``False``: the keys are positives alone, not the other queries' negatives, and nothing of the size N×M is
            computed: own negatives, negatives, bank and extra logits are what a positive is told from (NV-Embed's second
            stage, arXiv 2405.17428).
        query_group: (N,) int64 group of each query, or (N, G): one for each of G relations, as the query's text and the
            document's text; given together with groups of columns. A column is of the row's own group where one of the G is
            the same.
        key_group: (M,) or (M, G) int64 group of each key. Those of explicit negatives come in :class:`Columns`; what comes
            without groups is of nobody's.
        bank_group: (B,) or (B, G) int64 group of each bank row.
        same_group: what columns of the row's own group are: left out of its denominator (``"exclude"``), ordinary
            negatives (``"negative"``), or positives beside the target (``"positive"``, for one relation:
            ``lse_i`` minus the mean logit of all positives).
        margin: ArcCon's angle u ≥ 0 in radians: the target's logit becomes cos(θ + u)/τ, its cosine held within
            ±(1 − 10⁻⁷) first, where the angle has a derivative.
        symmetric: the mean of this loss and the same loss with query and key exchanged; needs N = M and no target.
        reduction: ``"mean"`` over rows, ``"sum"`` or ``"none"``.
        precision: of the matrix products; sums are float32 whatever it is, and no setting of PyTorch's is touched.
            ``None``: as PyTorch multiplies on the device, by the inputs' type on a GPU, in float32 on a CPU, both as
            ``torch.set_float32_matmul_precision`` and ``torch.backends.*.fp32_precision`` have it. ``"float32"``: every
            digit of float32 whatever those settings allow; where they allow less, a CPU computes in float64, at half the
            speed. ``"bf16"``: a GPU rounds float32 operands to bfloat16; a CPU multiplies as with ``None``, since there
            are no bfloat16 products for it here yet.
        backend: ``"auto"``, ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Returns:
        A float32 (float64) scalar, or (N,) with ``reduction="none"``. NaN or Inf in an input gives NaN, but
        for extra logits of −inf, which are columns that are left out.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        hicl_fast.BackendError: the backend asked for is not there or does not do this call.
    """
    check_own_negatives(hard_negative_weight, query, negatives)
    return info_nce_with_statistics(
        query,
        key,
        target=target,
        target_offsets=target_offsets,
        temperature=temperature,
        negatives=negatives,
        own_negatives=own_negatives,
        hard_negative_weight=hard_negative_weight,
        bank=bank,
        extra_logits=extra_logits,
        mixing=mixing,
        limit=limit,
        false_negative_margin=false_negative_margin,
        false_negative_ratio=false_negative_ratio,
        in_batch=in_batch,
        query_group=query_group,
        key_group=key_group,
        bank_group=bank_group,
        same_group=same_group,
        margin=margin,
        symmetric=symmetric,
        reduction=reduction,
        precision=precision,
        backend=backend,
    ).loss


def info_nce_with_statistics(
    query: Tensor,
    key: Tensor | Columns,
    *,
    target: Tensor | None = None,
    target_offsets: Tensor | None = None,
    temperature: float | Tensor = 0.05,
    negatives: Tensor | Columns | None = None,
    hard_negative_weight: float = 0.0,
    own_negatives: Tensor | OwnNegatives | None = None,
    bank: Tensor | Columns | None = None,
    extra_logits: Tensor | None = None,
    mixing: Mixing | None = None,
    limit: Tensor | None = None,
    false_negative_margin: float | None = None,
    false_negative_ratio: float | None = None,
    in_batch: bool = True,
    query_group: Tensor | None = None,
    key_group: Tensor | None = None,
    bank_group: Tensor | None = None,
    same_group: SameGroup = "exclude",
    margin: float = 0.0,
    symmetric: bool = False,
    reduction: Reduction = "mean",
    precision: str | None = None,
    backend: str = "auto",
) -> Result:
    """:func:`info_nce`, and what it finds on its way: ``(loss, positive, hardest, hard_negatives)``.

    ``positive`` and ``hardest`` are the detached similarities of each row's positive (N,), of several the mean, and of its
    hardest negative (N,), −inf for a row that has none among keys, explicit negatives and bank; ``hard_negatives`` are the
    keys (N, k) that ``mixing`` took, or ``None``.
    """
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
        symmetric=symmetric,
        reduction=reduction,
        precision=precision,
        backend=backend,
    )
    if mixing is not None:
        _check_mixing(mixing, problem, in_batch)
    own = own_of(problem, own_negatives)
    if not in_batch:
        check_in_batch(problem, own)
    return compose.apply(problem, reduction, backend, mixing, own, in_batch=in_batch)


def _check_mixing(mixing: Mixing, problem: Problem, in_batch: bool) -> None:
    if not isinstance(mixing, Mixing):
        raise TypeError(f"mixing: expected a Mixing or None, got {check.describe(mixing)}")
    if problem.symmetric:
        raise ValueError("mixing: expected None with symmetric=True, since a mixture has one direction")
    if not in_batch:
        raise ValueError("mixing: expected None with in_batch=False, since what it mixes are the batch's keys")
    if problem.has_limit:
        raise ValueError("mixing: expected None with a limit, above which its hardest keys would be")
    if problem.query_group is not None and problem.query_group.shape[1] > 1:
        raise ValueError("mixing: expected None with several relations, since its keys are chosen by one")
    if problem.targets is not None:
        raise ValueError("mixing: expected None with target_offsets, since it knows of one positive")
    check_k(mixing.k, problem.query, problem.key, 1 if problem.target is None else 0)
    check_pairs(problem.query, mixing.pairs)
    check.share("alpha", mixing.alpha)
