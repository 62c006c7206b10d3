"""Checks that several of the functions share, and what they make of an argument."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hicl_fast import _checks as check
from hicl_fast.backend import registry
from hicl_fast.ops.problem import host_number, sum_type

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
    check_groups(query, key, query_group, key_group)


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


def check_info_nce_options(
    *,
    hard_negative_weight: float,
    same_group: str,
    margin: float,
    symmetric: bool,
    reduction: str,
    precision: str | None,
    backend: str,
) -> None:
    """The options of InfoNCE that say nothing of tensors: the function's, and those a module keeps for it."""
    check.real_number("hard_negative_weight", hard_negative_weight)
    check.one_of("same_group", same_group, ("exclude", "negative", "positive"))
    check.angle("margin", margin)
    check.flag("symmetric", symmetric)
    check.one_of("reduction", reduction, ("mean", "sum", "none"))
    check.one_of("precision", precision, (None, "float32", "bf16"))
    registry.check_name(backend)


def check_positive_mixing_options(threshold: float, weights: tuple[float, float] | Literal["search"]) -> None:
    check.non_negative_number("threshold", threshold)
    if isinstance(weights, str) and weights == "search":
        return
    is_pair = isinstance(weights, (tuple, list)) and len(weights) == 2
    if not (is_pair and all(check.is_number(weight) and check.is_finite(weight) for weight in weights)):
        raise ValueError(f"weights: expected a pair of finite numbers or 'search', got {check.describe(weights)}")


def scale(temperature: float | Tensor, query: Tensor, *others: Tensor | None) -> Tensor:
    """1 / temperature as a 0-d tensor; a number stays in host memory, so that no device is waited for to read it.

    A tensor's is in the type of the sums over query and others at least; its gradient comes in the tensor's own.
    """
    if isinstance(temperature, Tensor):
        if temperature.dim() != 0 or not temperature.is_floating_point():
            raise ValueError(f"temperature: expected a number or a 0-d tensor, got {check.describe(temperature)}")
        if temperature.device != query.device and temperature.device.type != "cpu":
            raise ValueError(
                f"temperature: expected a tensor on {query.device} or cpu, got {check.describe(temperature)}"
            )
        return temperature.to(torch.promote_types(temperature.dtype, sum_type(query, *others))).reciprocal()
    check.positive_number("temperature", temperature)
    return host_number(1.0 / temperature)
