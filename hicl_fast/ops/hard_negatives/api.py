"""The hardest negatives of each row (HNCSE)."""

from __future__ import annotations

from torch import Tensor

from hicl_fast import _checks as check
from hicl_fast.ops.common.arguments import check_groups, check_k, check_matrices, check_rows
from hicl_fast.ops.hard_negatives import operator


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
        check_rows(query, key, target, None)
    check_groups(query, key, query_group, key_group)
    check_k(k, query, key, int(exclude_target and target is None))
    return operator.apply(query, key, k, target, query_group, key_group, exclude_target, backend)
