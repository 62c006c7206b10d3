"""InfoNCE on cosine similarities, as the equations stand."""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
from torch import Tensor

NORM_FLOOR = 1e-12  # x̂ = x / max(‖x‖, NORM_FLOOR)
ANGLE_CLAMP = 1e-7  # θ = arccos(clamp(s, −1 + ANGLE_CLAMP, 1 − ANGLE_CLAMP))

SameGroup = Literal["exclude", "negative", "positive"]
Reduction = Literal["mean", "sum", "none"]


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
    same_group: SameGroup = "exclude",
    margin: float = 0.0,
    symmetric: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """``loss_i = lse_i − ℓ_{i,t_i}`` with ``ℓ_ij = cos(query_i, key_j) / temperature``.

    The arguments are those of :func:`hicl_fast.functional.info_nce`, which checks them and computes the same
    without the N×M matrix.
    """
    row_losses = functools.partial(
        _row_losses,
        negatives=negatives,
        hard_negative_weight=hard_negative_weight,
        bank=bank,
        extra_logits=extra_logits,
        temperature=temperature,
        same_group=same_group,
        margin=margin,
    )
    rows = row_losses(query, key, target, query_group, key_group)
    if symmetric:
        rows = (rows + row_losses(key, query, target, key_group, query_group)) / 2
    if reduction == "none":
        return rows
    return rows.mean() if reduction == "mean" else rows.sum()


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


def _row_losses(
    query: Tensor,
    key: Tensor,
    target: Tensor | None,
    query_group: Tensor | None,
    key_group: Tensor | None,
    *,
    negatives: Tensor | None,
    hard_negative_weight: float,
    bank: Tensor | None,
    extra_logits: Tensor | None,
    temperature: float | Tensor,
    same_group: SameGroup,
    margin: float,
) -> Tensor:  # (N,)
    n, m = query.shape[0], key.shape[0]
    row = torch.arange(n, device=query.device)
    target = row if target is None else target
    dtype = _sum_type(query, key, negatives, bank, extra_logits)
    unit_query, unit_key = normalise(query.to(dtype)), normalise(key.to(dtype))

    key_logits = _with_margin(unit_query @ unit_key.T, row, target, margin) / temperature  # (N, M)
    positive = key_logits[row, target]  # (N,)

    is_target = torch.zeros(n, m, dtype=torch.bool, device=query.device)
    is_target[row, target] = True
    in_group = is_target
    if query_group is not None and key_group is not None:
        in_group = in_group | (query_group[:, None] == key_group[None, :])
    left_out = in_group if same_group == "exclude" else is_target
    denominator = [key_logits.masked_fill(left_out, -torch.inf)]  # everything but the positive, which is added last

    if negatives is not None:
        logits = unit_query @ normalise(negatives.to(dtype)).T / temperature  # (N, P)
        own = torch.zeros_like(logits)
        own.fill_diagonal_(hard_negative_weight)
        denominator.append(logits + own)
    if bank is not None:
        denominator.append(unit_query @ normalise(bank.detach().to(dtype)).T / temperature)
    if extra_logits is not None:
        extra_logits = extra_logits.to(dtype)
        denominator.append(extra_logits.masked_fill(extra_logits == torch.inf, torch.nan))

    loss = _log1p_ratio(torch.cat(denominator, dim=1), positive)
    if same_group == "positive":
        mean_positive = (key_logits * in_group).sum(dim=1) / in_group.sum(dim=1)
        loss = loss + positive - mean_positive
    return loss


def _with_margin(similarity: Tensor, row: Tensor, target: Tensor, margin: float) -> Tensor:
    """The positive's similarity becomes ``cos(θ + margin)``."""
    if margin == 0.0:
        return similarity
    theta = torch.arccos(similarity[row, target].clamp(-1 + ANGLE_CLAMP, 1 - ANGLE_CLAMP))
    return similarity.index_put((row, target), torch.cos(theta + margin))


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
