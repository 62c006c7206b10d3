"""InfoNCE on cosine similarities, as the equations stand."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hicl_fast.ops.common.constants import ANGLE_CLAMP, NORM_FLOOR, Reduction, SameGroup


def info_nce(query: Tensor, key: Tensor, **options: Any) -> Tensor:
    """``loss_i = lse_i − ℓ_{i,t_i}`` with ``ℓ_ij = cos(query_i, key_j) / temperature``.

    What :func:`hicl_fast.functional.info_nce` checks and computes without the N×M matrix.

    Args:
        query: (N, D)
        key: (M, D)
        options: of :func:`info_nce_with_statistics`.
    """
    return info_nce_with_statistics(query, key, **options).loss


class Statistics(NamedTuple):
    """The loss, and what :func:`hicl_fast.functional.info_nce_with_statistics` gives beside it, detached."""

    loss: Tensor  # (), or (N,) with reduction="none"
    positive: Tensor  # (N,) similarity of each row's positive
    hardest: Tensor  # (N,) and of its hardest negative; −inf where there is none


def info_nce_with_statistics(
    query: Tensor,  # (N, D)
    key: Tensor,  # (M, D)
    *,
    target: Tensor | None = None,  # (N,) int64; (T,) with target_offsets
    query_group: Tensor | None = None,  # (N,) or (N, G) int64
    key_group: Tensor | None = None,  # (M,) or (M, G) int64
    target_offsets: Tensor | None = None,  # (N + 1,) int64
    symmetric: bool = False,
    reduction: Reduction = "mean",
    **options: Any,
) -> Statistics:
    """:func:`info_nce`, and each row's similarities with its positive and with its hardest negative.

    ``options`` are those of :func:`logits_of_rows`.
    """
    rows = _rows(query, key, target, query_group, key_group, target_offsets=target_offsets, **options)
    if symmetric:
        columns = _rows(key, query, target, key_group, query_group, **options)
        rows = rows._replace(loss=(rows.loss + columns.loss) / 2)
    if reduction == "none":
        return rows
    return rows._replace(loss=rows.loss.mean() if reduction == "mean" else rows.loss.sum())


def normalise(x: Tensor) -> Tensor:
    """Rows of (..., D) scaled to length 1; a zero row stays zero and gets gradient zero.

    A row whose squared length would overflow is divided by a power of two first, which changes no cosine.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    exponent = math.frexp(torch.finfo(x.dtype).max)[1] // 2
    is_long = largest >= 2.0 ** (exponent - 17)
    x = x * torch.where(is_long, largest.new_full((), 2.0 ** -(exponent + 16)), largest.new_ones(()))
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    is_zero = largest == 0  # its squares may vanish when it isn't
    unit = x / norm.masked_fill(is_zero, 1.0).clamp_min(NORM_FLOOR)
    return torch.where(is_zero, torch.zeros_like(x), unit)


class Logits(NamedTuple):
    """Of each row: its positive, and its other columns. T is N, but where rows have several targets."""

    negative: Tensor  # (N, C) of all columns but the positive, −inf where one is left out
    positive: Tensor  # (T,) with the margin
    similarity: Tensor  # (T,) the positive's
    competing: Tensor  # (N, C) similarities of the columns that are no positives and not left out; −inf for others
    mean_positive: Tensor  # (N,) the mean logit of all positives, where groups make several
    row: Tensor | None = None  # (T,) int64 the row of each target, where rows have several


def logits_of_rows(
    query: Tensor,  # (N, D)
    key: Tensor,  # (M, D)
    target: Tensor | None = None,  # (N,) int64; (T,) with target_offsets
    query_group: Tensor | None = None,  # (N,) or (N, G) int64
    key_group: Tensor | None = None,  # (M,) or (M, G) int64
    *,
    target_offsets: Tensor | None = None,  # (N + 1,) int64: row i has the targets from offset i to the next
    temperature: float | Tensor = 0.05,
    negatives: Tensor | None = None,  # (P, D)
    hard_negative_weight: float = 0.0,
    negatives_group: Tensor | None = None,  # (P,) or (P, G) int64
    negatives_hardness: float = 0.0,
    bank: Tensor | None = None,  # (B, D)
    bank_group: Tensor | None = None,  # (B,) or (B, G) int64
    bank_hardness: float = 0.0,
    own_negatives: Tensor | None = None,  # (H, D)
    own_offsets: Tensor | None = None,  # (N + 1,) int64
    own_group: Tensor | None = None,  # (H,) or (H, G) int64
    own_hardness: float = 0.0,
    extra_logits: Tensor | None = None,  # (N, E)
    key_hardness: float = 0.0,
    in_batch: bool = True,
    limit: Tensor | None = None,  # (N,)
    false_negative_margin: float = math.inf,
    false_negative_ratio: float = math.inf,
    same_group: SameGroup = "exclude",
    margin: float = 0.0,
) -> Logits:
    """Every column of every row, and the rules that leave some of them out or weigh them."""
    n, m = query.shape[0], key.shape[0]
    row = torch.arange(n, device=query.device)
    target = row if target is None else target
    if target_offsets is not None:
        row = torch.repeat_interleave(row, target_offsets.diff(), output_size=len(target))
    dtype = _sum_type(query, key, negatives, bank, own_negatives, extra_logits)
    unit_query = normalise(query.to(dtype))
    similarity = unit_query @ normalise(key.to(dtype)).T  # (N, M)
    positive = similarity[row, target]  # (T,)
    is_target = torch.zeros(n, m, dtype=torch.bool, device=query.device)
    is_target = is_target.index_put((row, target), torch.ones_like(target, dtype=torch.bool))
    positive_logit = _with_margin(positive, margin) / temperature
    key_logits = (similarity / temperature).index_put((row, target), positive_logit)

    limit = torch.full((n,), torch.inf) if limit is None else limit
    limit = limit.to(device=query.device, dtype=dtype)
    if target_offsets is None:  # what is more similar than the row's one positive
        limit = _limit(positive.detach(), limit, false_negative_margin, false_negative_ratio)
    denominator, competing, positives = [], [], []

    def add(
        similarity: Tensor, logits: Tensor, group: Tensor | None, special: Tensor, absent: bool | Tensor = False
    ) -> None:
        """A kind of column (N, C); ``special`` (N, C): the positive, which is added to the denominator last; ``absent``:
        columns that aren't the row's."""
        in_group = special
        if query_group is not None and group is not None and same_group != "negative":
            in_group = special | _of_one_group(query_group, group)
        above = similarity > limit[:, None]
        is_positive = in_group if same_group == "positive" else special
        left_out = special | ((above | in_group | absent) & ~is_positive)
        denominator.append(logits.masked_fill(left_out, -torch.inf))
        competing.append(similarity.masked_fill(left_out | in_group, -torch.inf))
        positives.append((logits, in_group))  # where groups make them

    def others(vectors: Tensor, group: Tensor | None, hardness: float, added: float | Tensor = 0.0) -> None:
        """A kind of column that has no special one."""
        similarity = unit_query @ normalise(vectors.to(dtype)).T  # (N, C)
        logits = similarity / temperature + hardness * similarity.detach() + added
        add(similarity, logits, group, torch.zeros_like(similarity, dtype=torch.bool))

    hardness = key_hardness * similarity.detach().masked_fill(is_target, 0.0)
    add(similarity, key_logits + hardness, key_group, is_target, not in_batch)
    if negatives is not None:
        own = hard_negative_weight * torch.eye(n, len(negatives), dtype=dtype, device=query.device)
        others(negatives, negatives_group, negatives_hardness, own)
    if bank is not None:
        others(bank.detach(), bank_group, bank_hardness)
    if own_negatives is not None and own_offsets is not None:
        similarity = unit_query @ normalise(own_negatives.to(dtype)).T  # (N, H)
        owner = torch.repeat_interleave(torch.arange(n, device=query.device), own_offsets.diff())
        absent = owner[None, :] != torch.arange(n, device=query.device)[:, None]
        logits = similarity / temperature + own_hardness * similarity.detach()
        add(similarity, logits, own_group, torch.zeros_like(absent), absent)
    if extra_logits is not None:
        extra_logits = extra_logits.to(dtype)
        denominator.append(extra_logits.masked_fill(extra_logits == torch.inf, torch.nan))

    mean_positive = positive_logit
    if same_group == "positive":
        logits, are_positive = (torch.cat(parts, dim=1) for parts in zip(*positives, strict=True))
        mean_positive = logits.masked_fill(~are_positive, 0.0).sum(dim=1) / are_positive.sum(dim=1)
    return Logits(
        torch.cat(denominator, dim=1),
        positive_logit,
        positive,
        torch.cat(competing, dim=1),
        mean_positive,
        None if target_offsets is None else row,
    )


def largest(similarity: Tensor) -> Tensor:  # (N, C) -> (N,)
    return similarity.detach().amax(dim=1)


def _rows(*tensors: Tensor | None, **options: Any) -> Statistics:
    logits = logits_of_rows(*tensors, **options)  # type: ignore[arg-type]
    similarity = logits.similarity.detach()
    if (row := logits.row) is None:
        loss = _log1p_ratio(log_sum(logits.negative), logits.positive) + (logits.positive - logits.mean_positive)
    else:
        loss = _log1p_ratio(log_sum(logits.negative)[row], logits.positive)
        loss, similarity = (_mean_by_row(x, row, len(logits.negative)) for x in (loss, similarity))
    return Statistics(loss, similarity, largest(logits.competing))


def _mean_by_row(x: Tensor, row: Tensor, num_rows: int) -> Tensor:  # (T,), (T,) int64 -> (N,)
    nothing = x.new_zeros(num_rows)
    return nothing.index_add(0, row, x) / nothing.index_add(0, row, torch.ones_like(x))


def _limit(positive: Tensor, limit: Tensor, margin: float, ratio: float) -> Tensor:
    """What a row's columns may be similar at most, by its positive's similarity. (N,) -> (N,)."""
    found = torch.minimum(limit, positive + margin)
    return torch.where(positive > 0, torch.minimum(found, positive.abs() * ratio), found)


def _of_one_group(query_group: Tensor, group: Tensor) -> Tensor:  # (N,), (C,) or (N, G), (C, G) -> (N, C)
    """Whether one of row's and column's ids is the same."""
    rows, columns = (x if x.dim() == 2 else x[:, None] for x in (query_group, group))
    return (rows[:, None] == columns[None]).any(dim=2)


def _with_margin(positive: Tensor, margin: float) -> Tensor:
    """The positive's similarity becomes ``cos(θ + margin)``. (N,) -> (N,)."""
    if margin == 0.0:
        return positive
    return torch.cos(torch.arccos(positive.clamp(-1 + ANGLE_CLAMP, 1 - ANGLE_CLAMP)) + margin)


def log_sum(logits: Tensor) -> Tensor:  # (N, C) -> (N,)
    """``log Σ_j exp(logits_ij)``, −inf with gradient 0 where all of a row's are −inf."""
    has_any = (logits != -torch.inf).any(dim=1)
    total = torch.logsumexp(torch.where(has_any[:, None], logits, 0.0), dim=1)
    return torch.where(has_any, total, -torch.inf)


def _log1p_ratio(log_z: Tensor, positive: Tensor) -> Tensor:
    """``log(1 + exp(log_z − positive))``, which keeps the digits of a small loss. (N,), (N,) -> (N,)."""
    has_negative = log_z != -torch.inf
    loss = torch.logaddexp(torch.where(has_negative, log_z, 0.0) - positive, torch.zeros_like(positive))
    return torch.where(has_negative, loss, positive - positive)  # the difference is 0, or NaN where the input was


def _sum_type(*inputs: Tensor | None) -> torch.dtype:
    """The type sums are kept in: float32, or float64 where an input is."""
    is_double = any(x is not None and x.dtype == torch.float64 for x in inputs)
    return torch.float64 if is_double else torch.float32
