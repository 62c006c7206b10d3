"""Mixtures of a row's hard negatives (HNCSE)."""

from __future__ import annotations

from torch import Tensor

from hicl_fast import _checks as check
from hicl_fast.ops.common.arguments import check_index, check_pairs
from hicl_fast.ops.common.numbers import scale_of
from hicl_fast.ops.mixed_negatives import operator


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
    return operator.apply(query, bank, index, pairs, float(alpha), scale_of(temperature, query, bank), backend)
