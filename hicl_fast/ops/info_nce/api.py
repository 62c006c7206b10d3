"""InfoNCE over cosine similarities."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from hicl_fast import _checks as check
from hicl_fast.ops.backends import registry
from hicl_fast.ops.common.arguments import check_k, check_matrices, check_pairs, check_rows
from hicl_fast.ops.common.constants import Reduction, SameGroup
from hicl_fast.ops.common.numbers import scale_of
from hicl_fast.ops.info_nce import compose
from hicl_fast.ops.info_nce.problem import Mixing, Problem, Result


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
    bank_group: Tensor | None = None,  # (B,) int64
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

    Second derivatives (``create_graph=True``), forward mode and ``torch.func`` are right, and take the time and memory of
    plain PyTorch: they build the N×M matrix.

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
        bank_group: (B,) int64 group of each bank row, where ``query_group`` is given; default: nobody's. The bank is then
            scored as further keys are, at the price of a copy of it and of gradients that nobody takes.
        same_group: what keys and bank rows of the row's own group are: left out of its denominator (``"exclude"``), ordinary
            negatives (``"negative"``), or positives beside the target (``"positive"``:
            ``lse_i`` minus the mean logit of all positives).
        margin: ArcCon's angle u ≥ 0 in radians: the target's logit becomes cos(θ + u)/τ.
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
    bank_group: Tensor | None = None,
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
    check_matrices(query, key, negatives, bank)
    check_rows(query, key, target, extra_logits, query_group, key_group)
    if bank_group is not None:
        _check_bank_group(bank_group, query, bank, query_group)
    check_options(
        hard_negative_weight=hard_negative_weight,
        same_group=same_group,
        margin=margin,
        symmetric=symmetric,
        reduction=reduction,
        precision=precision,
        backend=backend,
    )
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
        scale=scale_of(temperature, query, key, negatives, bank, extra_logits),
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
    return compose.apply(problem, reduction, backend, mixing, bank_group)


def _check_bank_group(bank_group: Tensor, query: Tensor, bank: Tensor | None, query_group: Tensor | None) -> None:
    if bank is None or query_group is None:
        missing = "a bank" if bank is None else "groups of queries and keys"
        raise ValueError(f"bank_group: expected None without {missing}, got {check.describe(bank_group)}")
    check.index_vector("bank_group", bank_group, bank.shape[0], "a group for each bank row", query)


def _check_mixing(mixing: Mixing, query: Tensor, key: Tensor, target: Tensor | None, symmetric: bool) -> None:
    if not isinstance(mixing, Mixing):
        raise TypeError(f"mixing: expected a Mixing or None, got {check.describe(mixing)}")
    if symmetric:
        raise ValueError("mixing: expected None with symmetric=True, since a mixture has one direction")
    check_k(mixing.k, query, key, 1 if target is None else 0)
    check_pairs(query, mixing.pairs)
    check.share("alpha", mixing.alpha)


def check_options(
    *,
    margin: float,
    symmetric: bool,
    same_group: str,
    reduction: str,
    hard_negative_weight: float,
    precision: str | None,
    backend: str,
) -> dict[str, Any]:
    """The options of InfoNCE that say nothing of tensors, checked: the function's, and those a module keeps for it."""
    check.real_number("hard_negative_weight", hard_negative_weight)
    check.one_of("same_group", same_group, ("exclude", "negative", "positive"))
    check.angle("margin", margin)
    check.flag("symmetric", symmetric)
    check.one_of("reduction", reduction, ("mean", "sum", "none"))
    check.one_of("precision", precision, (None, "float32", "bf16"))
    registry.check_name(backend)
    return {
        "margin": margin,
        "symmetric": symmetric,
        "same_group": same_group,
        "reduction": reduction,
        "hard_negative_weight": hard_negative_weight,
        "precision": precision,
        "backend": backend,
    }


OPTIONS = tuple(inspect.signature(check_options).parameters)
