"""What people call InfoNCE and its row statistics with, checked, and put into a :class:`Problem`."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hicl_fast import _checks as check
from hicl_fast.ops.backends import registry
from hicl_fast.ops.common.arguments import check_matrices, check_rows
from hicl_fast.ops.common.numbers import scale_of
from hicl_fast.ops.info_nce.problem import Problem
from hicl_fast.ops.own_negatives.problem import Own


@dataclass(frozen=True, eq=False)
class Columns:
    """Vectors that queries are compared with, and what is to hold for them.

    Args:
        rows: (C, D) float64, float32, bfloat16 or float16.
        group: (C,) int64 group of each row, or (C, G): one for each of G relations. Given with ``query_group``.
        hardness: α ≥ 0: α · similarity, without gradient, is added to the logit of every row that is no positive, so that
            the more similar a negative is the more it weighs: e^(α·s) times as much (LLaVE, arXiv 2503.04812).
    """

    rows: Tensor
    group: Tensor | None = field(default=None, kw_only=True)
    hardness: float = field(default=0.0, kw_only=True)


@dataclass(frozen=True, eq=False)
class OwnNegatives:
    """Negatives that one query each is compared with, as many for each as there are: no padding, no N×H matrix.

    Args:
        rows: (H, D) floating point; get gradients.
        offsets: (N + 1,) int64, rising from 0 to H: query i has ``rows[offsets[i] : offsets[i + 1]]``, which may be none.
        group: (H,) int64 group of each row, or (H, G). Given with ``query_group``; one of the query's own group is left out.
        hardness: as in :class:`Columns` (EmbeddingGemma, arXiv 2509.20354: 5).
    """

    rows: Tensor
    offsets: Tensor
    group: Tensor | None = field(default=None, kw_only=True)
    hardness: float = field(default=0.0, kw_only=True)


class _Parts(NamedTuple):
    """A kind of column as it was given, taken apart."""

    rows: Tensor | None  # (C, D)
    group: Tensor | None  # (C,) or (C, G) int64
    hardness: float
    group_name: str  # as the caller knows it


_NOTHING = _Parts(None, None, 0.0, "")


def _parts(name: str, given: Tensor | Columns | None, group: Tensor | None = None) -> _Parts:
    if given is None:
        return _NOTHING
    if not isinstance(given, Columns):
        return _Parts(given, group, 0.0, f"{name}_group")
    if given.rows is None:
        raise TypeError(f"{name}.rows: expected a tensor, got None")
    if given.group is not None and group is not None:
        raise ValueError(f"{name}_group: expected None with a group in {name}, got {check.describe(group)}")
    check.non_negative_number(f"{name}.hardness", given.hardness)
    if group is None:
        return _Parts(given.rows, given.group, float(given.hardness), f"{name}.group")
    return _Parts(given.rows, group, float(given.hardness), f"{name}_group")


def columns_of(name: str, given: Tensor | Columns, group: Tensor | None = None) -> Columns:
    """An argument as Columns, with the group that came as an argument of its own."""
    if given is None:
        raise TypeError(f"{name}: expected a tensor or Columns, got None")
    parts = _parts(name, given, group)
    return Columns(parts.rows, group=parts.group, hardness=parts.hardness)  # type: ignore[arg-type]


def problem_of(
    query: Tensor,
    key: Tensor | Columns,
    *,
    target: Tensor | None = None,
    target_offsets: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    negatives: Tensor | Columns | None = None,
    own_negatives: Tensor | OwnNegatives | None = None,
    bank: Tensor | Columns | None = None,
    extra_logits: Tensor | None = None,
    limit: Tensor | None = None,
    query_group: Tensor | None = None,
    key_group: Tensor | None = None,
    bank_group: Tensor | None = None,
    margin: float = 0.0,
    symmetric: bool = False,
    same_group: str = "exclude",
    reduction: str = "mean",
    hard_negative_weight: float = 0.0,
    false_negative_margin: float | None = None,
    false_negative_ratio: float | None = None,
    in_batch: bool = True,
    precision: str | None = None,
    backend: str = "auto",
) -> Problem:
    """All arguments checked but the own negatives themselves, for which see :func:`own_of`."""
    keys, explicit, queue = (
        _parts("key", key, key_group),
        _parts("negatives", negatives),
        _parts("bank", bank, bank_group),
    )
    check_matrices(query, keys.rows, explicit.rows, queue.rows)  # type: ignore[arg-type]
    rows: Tensor = keys.rows  # type: ignore[assignment]
    targets = None
    if target_offsets is not None:
        targets, target = target, _first_targets(query, target, target_offsets)
    check_rows(query, rows, target, extra_logits)
    check_options(
        margin=margin,
        symmetric=symmetric,
        same_group=same_group,
        reduction=reduction,
        hard_negative_weight=hard_negative_weight,
        false_negative_margin=false_negative_margin,
        false_negative_ratio=false_negative_ratio,
        in_batch=in_batch,
        precision=precision,
        backend=backend,
    )
    if limit is not None:
        check.floating_vector("limit", limit, query.shape[0], "a number for each query", query)
    if bank_group is not None and bank is None:
        raise ValueError(f"bank_group: expected None without a bank, got {check.describe(bank_group)}")
    own = _own_parts(own_negatives, query)
    if not query_group is keys.group is explicit.group is queue.group is own.group is None:
        kinds = (keys, explicit, queue, own)
        groups = {one.group_name: (one.group, one.rows) for one in kinds if one.group is not None}
        _check_groups(query, query_group, groups, same_group)  # type: ignore[arg-type]
    if hard_negative_weight != 0.0:
        _check_weight(hard_negative_weight, query, explicit, same_group)
    if symmetric and (query.shape[0] != rows.shape[0] or target is not None):
        came = f"{query.shape[0]} queries and {rows.shape[0]} keys" if target is None else "a target"
        raise ValueError(f"symmetric: expected as many queries as keys and no target, got {came}")
    if targets is not None:
        groups_make_positives = same_group == "positive" and query_group is not None
        _check_one_positive(groups_make_positives, false_negative_margin, false_negative_ratio)
    if same_group == "positive":
        _check_hardness({"key": keys, "negatives": explicit, "bank": queue})
    return Problem(
        query=query,
        key=rows,
        scale=scale_of(temperature, query, rows, explicit.rows, queue.rows, extra_logits),
        target=target,
        negatives=explicit.rows,
        bank=None if queue.rows is None else queue.rows.detach(),
        extra_logits=extra_logits,
        query_group=by_relation(query_group),
        key_group=by_relation(keys.group),
        negatives_group=by_relation(explicit.group),
        bank_group=by_relation(queue.group),
        targets=targets,
        target_offsets=target_offsets,
        limit=None if limit is None else limit.detach(),
        false_negative_margin=_or_infinity(false_negative_margin),
        false_negative_ratio=_or_infinity(false_negative_ratio),
        key_hardness=keys.hardness,
        negatives_hardness=explicit.hardness,
        bank_hardness=queue.hardness,
        hard_negative_weight=float(hard_negative_weight),
        same_group=same_group,
        margin=float(margin),
        symmetric=symmetric,
        precision=precision or "default",
    )


def _first_targets(query: Tensor, targets: Tensor | None, offsets: Tensor) -> Tensor:  # (T,), (N + 1,) -> (N,)
    """The first of each row's targets."""
    if targets is None:
        raise ValueError("target: expected an int64 tensor, since target_offsets is given, got None")
    n = query.shape[0]
    check.index_vector("target_offsets", offsets, n + 1, "one more than queries", query)
    check.integers("target", targets, "(T,)", query)
    if targets.dim() != 1 or targets.shape[0] < n:
        raise ValueError(
            f"target: expected shape (T,), one for each of the {n} queries at least, got {check.describe(targets)}"
        )
    return targets[offsets[:-1].clamp(0, targets.shape[0] - 1)]


def _check_one_positive(
    groups_make_positives: bool, false_negative_margin: float | None, false_negative_ratio: float | None
) -> None:
    """That nothing asked for beside several targets is of a row's one positive."""
    limits = {"false_negative_margin": false_negative_margin, "false_negative_ratio": false_negative_ratio}
    for name, value in limits.items():
        if value is not None:
            raise ValueError(
                f"{name}: expected None with target_offsets, since a row's positives differ in similarity, got {value}; "
                "what a row's negatives may be similar at most can be given as limit"
            )
    if groups_make_positives:
        raise ValueError("target_offsets: expected None with same_group='positive', which names the positives itself")


def _own_parts(given: Tensor | OwnNegatives | None, query: Tensor) -> _Parts:
    if not isinstance(given, OwnNegatives):
        return _NOTHING
    check.rows_like("own_negatives.rows", given.rows, "(H, D)", query)
    return _Parts(given.rows, given.group, 0.0, "own_negatives.group")


def own_of(problem: Problem, given: Tensor | OwnNegatives | None) -> Own | None:
    """The own negatives, checked, without the rules that hold for all columns of a problem."""
    if given is None:
        return None
    query, n = problem.query, problem.query.shape[0]
    if isinstance(given, OwnNegatives):
        check.rows_like("own_negatives.rows", given.rows, "(H, D)", query)
        check.index_vector("own_negatives.offsets", given.offsets, n + 1, "one more than queries", query)
        check.non_negative_number("own_negatives.hardness", given.hardness)
        rows, offsets, group, hardness = given.rows, given.offsets, by_relation(given.group), float(given.hardness)
    else:
        check.floating_rows("own_negatives", given, f"({n}, K, {query.shape[1]})", query, or_else="OwnNegatives")
        rows, group, hardness = given.reshape(-1, query.shape[1]), None, 0.0
        offsets = torch.arange(n + 1, device=query.device) * given.shape[1]
    if group is not None and problem.same_group == "positive":
        raise ValueError("own_negatives.group: expected None with same_group='positive', which own negatives haven't")
    group = group if problem.same_group == "exclude" else None
    return Own(query, rows, offsets, problem.scale, group=group, hardness=hardness)


def check_in_batch(problem: Problem, own: Own | None) -> None:
    """That without the other queries' keys there is something to tell a positive from."""
    if all(x is None for x in (own, problem.negatives, problem.bank, problem.extra_logits)):
        raise ValueError(
            "in_batch: expected True without own negatives, negatives, extra logits or a bank (a loss's queue, in training), "
            "since nothing is left to tell a positive from"
        )
    if problem.same_group == "positive" and problem.query_group is not None:
        raise ValueError("in_batch: expected True with same_group='positive', whose positives are other keys")


def check_options(
    *,
    margin: float,
    symmetric: bool,
    same_group: str,
    reduction: str,
    hard_negative_weight: float,
    false_negative_margin: float | None,
    false_negative_ratio: float | None,
    in_batch: bool,
    precision: str | None,
    backend: str,
) -> dict[str, Any]:
    """The options of InfoNCE that say nothing of tensors, checked: the function's, and those a module keeps for it."""
    check.real_number("hard_negative_weight", hard_negative_weight)
    check.one_of("same_group", same_group, ("exclude", "negative", "positive"))
    check.angle("margin", margin)
    check.flag("symmetric", symmetric)
    check.one_of("reduction", reduction, ("mean", "sum", "none"))
    check_limits(false_negative_margin, false_negative_ratio)
    check.flag("in_batch", in_batch)
    check.one_of("precision", precision, (None, "float32", "bf16"))
    registry.check_name(backend)
    return {
        "margin": margin,
        "symmetric": symmetric,
        "same_group": same_group,
        "reduction": reduction,
        "hard_negative_weight": hard_negative_weight,
        "false_negative_margin": false_negative_margin,
        "false_negative_ratio": false_negative_ratio,
        "in_batch": in_batch,
        "precision": precision,
        "backend": backend,
    }


OPTIONS = tuple(inspect.signature(check_options).parameters)


def check_limits(false_negative_margin: float | None, false_negative_ratio: float | None) -> None:
    if false_negative_margin is not None:
        check.real_number("false_negative_margin", false_negative_margin)
    if false_negative_ratio is not None:
        check.positive_number("false_negative_ratio", false_negative_ratio)


def _or_infinity(number: float | None) -> float:
    return math.inf if number is None else float(number)


def check_own_negatives(hard_negative_weight: float, query: Tensor, negatives: Tensor | Columns | None) -> None:
    """That there are as many negatives as queries: of more, the first would be taken without a word for the rows' own."""
    if not check.is_number(hard_negative_weight) or hard_negative_weight == 0.0 or negatives is None:
        return
    rows = negatives.rows if isinstance(negatives, Columns) else negatives
    if all(isinstance(x, Tensor) and x.dim() == 2 for x in (query, rows)) and len(rows) != len(query):
        raise ValueError(
            f"hard_negative_weight: expected one negative for each of the {query.shape[0]} queries, "
            f"got {rows.shape[0]} negatives"
        )


def by_relation(group: Tensor | None) -> Tensor | None:  # (C,) or (C, G) -> (C, G)
    return group.unsqueeze(1) if group is not None and group.dim() == 1 else group  # faster than [:, None]


def _check_groups(
    query: Tensor, query_group: Tensor | None, groups: dict[str, tuple[Tensor, Tensor]], same_group: str
) -> None:
    """Each with an id for each row, all of one number of relations. By name: groups (C,) or (C, G), and rows (C, D)."""
    if query_group is None:
        name = next(iter(groups))
        raise ValueError(f"query_group: expected an int64 tensor, since {name} is given, got None")
    check.ids("query_group", query_group, query.shape[0], "a group for each query", query)
    if not groups:
        raise ValueError("key_group: expected an int64 tensor, since the other side's groups are given, got None")
    relations = query_group.shape[1] if query_group.dim() == 2 else 1
    for name, (group, rows) in groups.items():
        check.ids(name, group, rows.shape[0], "a group for each of its rows", query)
        if (came := group.shape[1] if group.dim() == 2 else 1) != relations:
            raise ValueError(
                f"{name}: expected {relations} relation{'s' * (relations > 1)}, as query_group has, got {came}"
            )
    if same_group == "positive" and relations > 1:
        raise ValueError(f"query_group: expected one relation with same_group='positive', got {relations}")


def _check_weight(weight: float, query: Tensor, explicit: _Parts, same_group: str) -> None:
    if explicit.rows is None or explicit.rows.shape[0] < query.shape[0]:
        came = "no negatives" if explicit.rows is None else f"{explicit.rows.shape[0]} negatives"
        raise ValueError(
            f"hard_negative_weight: expected one negative for each of the {query.shape[0]} queries, got {came}"
        )
    if explicit.group is not None and same_group == "positive":
        raise ValueError(
            f"hard_negative_weight: expected 0 where groups make positives of explicit negatives, got {weight}"
        )


def _check_hardness(kinds: dict[str, _Parts]) -> None:
    for name, one in kinds.items():
        if one.hardness and one.group is not None:
            raise ValueError(
                f"{name}.hardness: expected 0 with same_group='positive', since it is of negatives alone, "
                f"got {one.hardness}"
            )
