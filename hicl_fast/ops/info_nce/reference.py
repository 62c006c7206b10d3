"""InfoNCE on cosine similarities, as the equations stand."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from hicl_fast.ops.common.constants import ANGLE_CLAMP, NORM_FLOOR, Reduction, SameGroup


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
    query_group: Tensor | None = None,  # (N,) int64
    key_group: Tensor | None = None,  # (M,) int64
    bank_group: Tensor | None = None,  # (B,) int64
    same_group: SameGroup = "exclude",
    margin: float = 0.0,
    symmetric: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """``loss_i = lse_i − ℓ_{i,t_i}`` with ``ℓ_ij = cos(query_i, key_j) / temperature``.

    The arguments are those of :func:`hicl_fast.functional.info_nce`, which checks them and computes the same
    without the N×M matrix.
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
        query_group=query_group,
        key_group=key_group,
        bank_group=bank_group,
        same_group=same_group,
        margin=margin,
        symmetric=symmetric,
        reduction=reduction,
    ).loss


class Statistics(NamedTuple):
    """The loss, and what :func:`hicl_fast.functional.info_nce_with_statistics` gives beside it, detached."""

    loss: Tensor  # (), or (N,) with reduction="none"
    positive: Tensor  # (N,) similarity of each row's positive
    hardest: Tensor  # (N,) and of its hardest negative; −inf where there is none


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
    query_group: Tensor | None = None,
    key_group: Tensor | None = None,
    bank_group: Tensor | None = None,
    same_group: SameGroup = "exclude",
    margin: float = 0.0,
    symmetric: bool = False,
    reduction: Reduction = "mean",
) -> Statistics:
    """:func:`info_nce`, and each row's similarities with its positive and with its hardest negative."""
    of_rows = functools.partial(
        _rows,
        negatives=negatives,
        hard_negative_weight=hard_negative_weight,
        bank=bank,
        bank_group=bank_group,
        extra_logits=extra_logits,
        temperature=temperature,
        same_group=same_group,
        margin=margin,
    )
    rows = of_rows(query, key, target, query_group, key_group)
    if symmetric:
        columns = of_rows(key, query, target, key_group, query_group)
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


def _rows(
    query: Tensor,
    key: Tensor,
    target: Tensor | None,
    query_group: Tensor | None,
    key_group: Tensor | None,
    *,
    negatives: Tensor | None,
    hard_negative_weight: float,
    bank: Tensor | None,
    bank_group: Tensor | None,
    extra_logits: Tensor | None,
    temperature: float | Tensor,
    same_group: SameGroup,
    margin: float,
) -> Statistics:
    n, m = query.shape[0], key.shape[0]
    target = torch.arange(n, device=query.device) if target is None else target
    dtype = _sum_type(query, key, negatives, bank, extra_logits)
    unit_query = normalise(query.to(dtype))
    similarity = unit_query @ normalise(key.to(dtype)).T  # (N, M)
    positive = similarity.gather(1, target[:, None]).squeeze(1)  # (N,)
    is_target = target[:, None] == torch.arange(m, device=query.device)  # (N, M)
    key_logits = torch.where(is_target, _with_margin(positive, margin)[:, None], similarity) / temperature
    positive_logit = key_logits.gather(1, target[:, None]).squeeze(1)

    in_group = is_target
    if query_group is not None and key_group is not None:
        in_group = in_group | (query_group[:, None] == key_group[None, :])
    left_out = in_group if same_group == "exclude" else is_target
    denominator = [key_logits.masked_fill(left_out, -torch.inf)]  # everything but the positive, which is added last
    competing = [similarity.masked_fill(is_target if same_group == "negative" else in_group, -torch.inf)]

    if negatives is not None:
        competing.append(unit_query @ normalise(negatives.to(dtype)).T)  # (N, P)
        logits = competing[-1] / temperature
        if hard_negative_weight != 0.0:
            logits = logits + hard_negative_weight * torch.eye(n, dtype=dtype, device=query.device)
        denominator.append(logits)
    positives = [(key_logits, in_group)]  # where groups make them
    if bank is not None:
        similarity = unit_query @ normalise(bank.detach().to(dtype)).T  # (N, B)
        in_group = torch.zeros_like(similarity, dtype=torch.bool)
        if bank_group is not None and query_group is not None:
            in_group = query_group[:, None] == bank_group[None, :]
        logits = similarity / temperature
        competing.append(similarity if same_group == "negative" else similarity.masked_fill(in_group, -torch.inf))
        denominator.append(logits.masked_fill(in_group, -torch.inf) if same_group == "exclude" else logits)
        positives.append((logits, in_group))
    if extra_logits is not None:
        extra_logits = extra_logits.to(dtype)
        denominator.append(extra_logits.masked_fill(extra_logits == torch.inf, torch.nan))

    loss = _log1p_ratio(torch.cat(denominator, dim=1), positive_logit)
    if same_group == "positive":
        total = sum((logits * is_positive).sum(dim=1) for logits, is_positive in positives)
        mean_positive = total / sum(is_positive.sum(dim=1) for _, is_positive in positives)
        loss = loss + positive_logit - mean_positive
    return Statistics(loss, positive.detach(), torch.cat(competing, dim=1).detach().amax(dim=1))


def _with_margin(positive: Tensor, margin: float) -> Tensor:
    """The positive's similarity becomes ``cos(θ + margin)``. (N,) -> (N,)."""
    if margin == 0.0:
        return positive
    return torch.cos(torch.arccos(positive.clamp(-1 + ANGLE_CLAMP, 1 - ANGLE_CLAMP)) + margin)


def _log1p_ratio(negative: Tensor, positive: Tensor) -> Tensor:
    """``log(1 + Σ_j exp(negative_ij) / exp(positive_i))``, which keeps the digits of a small loss. (N, C), (N,) -> (N,)."""
    has_negative = (negative != -torch.inf).any(dim=1)
    log_z = torch.logsumexp(torch.where(has_negative[:, None], negative, 0.0), dim=1)
    loss = torch.logaddexp(log_z - positive, torch.zeros_like(positive))
    return torch.where(has_negative, loss, positive - positive)  # the difference is 0, or NaN where the input was


def _sum_type(*inputs: Tensor | None) -> torch.dtype:
    """The type sums are kept in: float32, or float64 where an input is."""
    is_double = any(x is not None and x.dtype == torch.float64 for x in inputs)
    return torch.float64 if is_double else torch.float32
