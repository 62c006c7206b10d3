"""Checks of arguments that several of the operators share."""

from __future__ import annotations

from torch import Tensor

from hicl_fast import _checks as check

MOST_NEGATIVES = 128  # of a row, that are looked for


def check_matrices(query: Tensor, key: Tensor, negatives: Tensor | None, bank: Tensor | None) -> None:
    check.floating_matrix("query", query, "(N, D)")
    if query.shape[0] == 0 or query.shape[1] == 0:
        raise ValueError(f"query: expected at least one row and one dimension, got {check.describe(query)}")
    check.rows_like("key", key, "(M, D)", query)
    if negatives is not None:
        check.rows_like("negatives", negatives, "(P, D)", query)
    if bank is not None:
        check.rows_like("bank", bank, "(B, D)", query)


def check_rows(
    query: Tensor,
    key: Tensor,
    target: Tensor | None,
    extra_logits: Tensor | None,
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


def check_groups(query: Tensor, key: Tensor, query_group: Tensor | None, key_group: Tensor | None) -> None:
    if (query_group is None) != (key_group is None):
        missing = "query_group" if query_group is None else "key_group"
        raise ValueError(f"{missing}: expected an int64 tensor, since the other side's groups are given, got None")
    if query_group is not None and key_group is not None:
        check.index_vector("query_group", query_group, query.shape[0], "a group for each query", query)
        check.index_vector("key_group", key_group, key.shape[0], "a group for each key", query)


def check_k(k: int, query: Tensor, key: Tensor, num_positives: int) -> None:
    """``num_positives``: keys that row 0 certainly has as its positive."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: expected an integer, got {check.describe(k)}")
    most = min(MOST_NEGATIVES, key.shape[0] - num_positives)
    if not 1 <= k <= most:
        came = f"{query.shape[0]} queries and {key.shape[0]} keys, of which row 0 has {most} candidates"
        raise ValueError(
            f"k: expected 1 to {most}, got {check.shown(k)}" + (f", with {came}" if most < MOST_NEGATIVES else "")
        )


def check_index(query: Tensor, index: Tensor) -> None:
    shape = f"({query.shape[0]}, k)"
    check.integers("index", index, shape, query)
    if index.dim() != 2 or index.shape[0] != query.shape[0] or index.shape[1] == 0:
        raise ValueError(f"index: expected shape {shape} with k ≥ 1, a row for each query, got {check.describe(index)}")


def check_pairs(query: Tensor, pairs: Tensor) -> None:
    shape = f"({query.shape[0]}, m, 2)"
    check.integers("pairs", pairs, shape, query)
    if pairs.dim() != 3 or pairs.shape[0] != query.shape[0] or pairs.shape[2] != 2:
        raise ValueError(f"pairs: expected shape {shape}, a row for each query, got {check.describe(pairs)}")
