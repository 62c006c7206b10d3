"""The gradient paradigm (arXiv 2402.18281) as its equations stand: N×N similarities, gradients by autograd.

``∂L_i/∂u_i = GD_i Σ_{j≠i} W_ij (v_j − R_ij v_i)``: dissipation, weight, ratio. :func:`paradigm` is every loss as a value
to differentiate, :func:`paradigm_terms` the three parts of those that are of this form.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor

from hicl_fast.ops.common.constants import ANGLE_CLAMP, DISTANCE_FLOOR, POWER_FLOOR
from hicl_fast.ops.info_nce.reference import info_nce, normalise
from hicl_fast.ops.paradigm.settings import (
    DEFAULT_MARGIN,
    HINGES,
    MODIFIABLE,
    Dissipation,
    Modification,
    Objective,
    PairStatistics,
    Ratio,
    Weight,
)


class Terms(NamedTuple):
    """The three parts of a gradient."""

    dissipation: Tensor  # (N,)
    weight: Tensor  # (N, N), zero on the diagonal
    ratio: Tensor  # (N,)


def paradigm(
    u: Tensor,  # (N, D)
    v: Tensor,  # (N, D)
    objective: Objective,
    *,
    modified: Collection[Modification] = (),
    margin: float | None = None,
    temperature: float = 0.05,
    strength: float = 1.0,
    dissipation: Dissipation = "softmax",
    weight: Weight = "softmax",
    ratio: Ratio = 1.0,
) -> Tensor:
    """The loss of two views; arguments as in :func:`hicl_fast.functional.paradigm`."""
    dtype = torch.promote_types(torch.promote_types(u.dtype, v.dtype), torch.float32)
    u, v = normalise(u.to(dtype)), normalise(v.to(dtype))
    margin = DEFAULT_MARGIN[objective] if margin is None else margin
    if objective in ("info_nce", "arccon"):
        return info_nce(u, v, temperature=temperature, margin=margin)
    if len(u) == 1 and objective in (*HINGES, "custom"):  # no negatives
        return (u - u).sum() + (v - v).sum()
    if objective in HINGES:
        return _hinge(u @ v.T, objective, margin).mean()
    if objective == "custom":
        options = {"temperature": temperature, "dissipation": dissipation, "weight": weight, "ratio": ratio}
        return _surrogate(u, v.detach(), **options) + _surrogate(v, u.detach(), **options)  # type: ignore[arg-type]

    if "gd" in modified:
        u, v = _hold_far_rows(u, margin), _hold_far_rows(v, margin)
    assert isinstance(ratio, (int, float))
    if objective == "mhe":
        return _mhe(u, v, modified, temperature, strength, ratio)
    if objective == "mhs":
        return _mhs(u, v, modified, strength, ratio)
    if objective == "vicreg":
        return _gradient_form(u, v, u, modified, temperature, strength, ratio, _vicreg_positive) + _gradient_form(
            v, u, v, modified, temperature, strength, ratio, _vicreg_positive
        )
    return _gradient_form(u, v, v, modified, temperature, strength, ratio, _barlow_positive) + _gradient_form(
        v, u, u, modified, temperature, strength, ratio, _barlow_positive
    )


def paradigm_terms(
    u: Tensor,  # (N, D)
    v: Tensor,  # (N, D)
    objective: Objective,
    *,
    modified: Collection[Modification] = (),
    margin: float | None = None,
    temperature: float = 0.05,
    strength: float = 1.0,
    dissipation: Dissipation = "softmax",
    weight: Weight = "softmax",
    ratio: Ratio = 1.0,
) -> Terms:
    """Dissipation, weight and ratio of each row of ``u``: against ``v``, and where :func:`negatives_of` says so against
    the rest of ``u``.

    They hold away from the clamps: |s| < 1 − 1e-7, and for MET squared distances above 1e-4. Barlow Twins as it stands
    pulls by dimension; its ratio then is that of the part along v_i.
    """
    margin = DEFAULT_MARGIN[objective] if margin is None else margin
    if objective in MODIFIABLE:
        assert isinstance(ratio, (int, float))
        return _modifiable_terms(normalise(u), normalise(v), objective, modified, margin, temperature, strength, ratio)
    s = normalise(u) @ normalise(v).T
    rows = pair_statistics(s, temperature)
    if objective == "custom":
        return _custom_terms(s, rows, temperature, dissipation, weight, ratio)
    if objective in ("info_nce", "arccon"):
        theta = _angle(rows.positive)
        adjusted = torch.cos(theta + margin) if margin else rows.positive
        pull = torch.sin(theta + margin) / torch.sin(theta) if margin else torch.ones_like(theta)
        return Terms(torch.sigmoid(rows.lse - adjusted / temperature), _weights(s, rows, temperature, "softmax"), pull)
    gap = _measure(rows.hardest, objective) - _measure(rows.positive, objective)
    pull, push = _slope(rows.positive, objective), _slope(rows.hardest, objective)
    at = _weights(s, rows, temperature, "hardest")
    return Terms((gap < margin).to(s.dtype), at * push[:, None], pull / push)


def paradigm_gradient(terms: Terms, v: Tensor, negatives: Tensor | None = None) -> Tensor:
    """The paradigm's equation, averaged over rows: ``∂ mean L / ∂û`` (N, D), up to a part along û.

    Of positives ``v`` (N, D) and of negatives (N, D), by default ``v`` too.
    """
    v = normalise(v)
    pull = terms.weight.sum(dim=1) * terms.ratio
    push = terms.weight @ (v if negatives is None else normalise(negatives))
    return terms.dissipation[:, None] * (push - pull[:, None] * v) / len(v)


def negatives_of(objective: Objective, u: Tensor, v: Tensor) -> Tensor:
    """What the rows of ``u`` are pushed away from: the other view, or for three of the last four the rest of their own."""
    return u if objective in ("mhe", "vicreg", "barlow_twins") else v


def pair_statistics(s: Tensor, temperature: float) -> PairStatistics:
    """Of similarities (N, N)."""
    s = s.detach()
    others = s.masked_fill(_diagonal(s), -torch.inf)
    hardest = others.amax(dim=1)
    index = _first(others, hardest)
    return PairStatistics(s.diagonal(), hardest, index, torch.logsumexp(others / temperature, dim=1))


def _diagonal(s: Tensor) -> Tensor:
    return torch.eye(len(s), dtype=torch.bool, device=s.device)


def _first(s: Tensor, value: Tensor) -> Tensor:  # (N, N), (N,) -> (N,) int64
    """The first column that holds the row's value, or NaN."""
    columns = torch.arange(s.shape[1], device=s.device)
    return torch.where((s == value[:, None]) | s.isnan(), columns, s.shape[1] - 1).amin(dim=1)


def _angle(s: Tensor) -> Tensor:
    return torch.arccos(s.clamp(-1 + ANGLE_CLAMP, 1 - ANGLE_CLAMP))


def _measure(s: Tensor, objective: str) -> Tensor:
    """What a hinge compares, smaller for what is nearer: the similarity's negative, the distance or the angle."""
    if objective == "mpt":
        return -s
    if objective == "met":
        return (2 - 2 * s).clamp_min(DISTANCE_FLOOR).sqrt()
    if objective == "mat":
        return _angle(s)
    raise ValueError(f"objective: expected one of {', '.join(HINGES)}, got {objective!r}")


def _slope(s: Tensor, objective: str) -> Tensor:
    """How fast that falls with the similarity, away from the clamps."""
    if objective == "mpt":
        return torch.ones_like(s)
    value = _measure(s, objective)
    if objective == "met":
        return 1 / value
    if objective == "mat":
        return 1 / torch.sin(value)
    raise ValueError(f"objective: expected one of {', '.join(HINGES)}, got {objective!r}")


def _hinge(s: Tensor, objective: str, margin: float) -> Tensor:  # (N, N) -> (N,)
    index = pair_statistics(s, 1.0).nearest
    positive, hardest = (_measure(x, objective) for x in (s.diagonal(), s.gather(1, index[:, None]).squeeze(1)))
    return torch.relu(positive - hardest + margin)


# --- custom ----------------------------------------------------------------------------------------------------------


def _surrogate(
    x: Tensor, y: Tensor, *, temperature: float, dissipation: Dissipation, weight: Weight, ratio: Ratio
) -> Tensor:
    """``mean_i GD_i Σ_{j≠i} W_ij (s_ij − R_i s_ii)`` with GD, W and R held constant."""
    s = x @ y.T
    terms = _custom_terms(s.detach(), pair_statistics(s, temperature), temperature, dissipation, weight, ratio)
    inside = (terms.weight * (s - terms.ratio[:, None] * s.diagonal()[:, None])).sum(dim=1)
    return (terms.dissipation * inside).mean()


def _custom_terms(
    s: Tensor, rows: PairStatistics, temperature: float, dissipation: Dissipation, weight: Weight, ratio: Ratio
) -> Terms:
    if callable(dissipation):
        kept = dissipation(rows)
    elif dissipation is None:
        kept = torch.ones_like(rows.positive)
    elif dissipation == "softmax":
        kept = torch.sigmoid(rows.lse - rows.positive / temperature)
    else:
        kept = (rows.positive - rows.hardest < dissipation).to(s.dtype)
    return Terms(kept, _weights(s, rows, temperature, weight), _ratio(rows, ratio))


def _weights(s: Tensor, rows: PairStatistics, temperature: float, weight: Weight) -> Tensor:
    own = _diagonal(s)
    if callable(weight):
        return weight(s, rows).masked_fill(own, 0.0)
    if weight == "softmax":
        return torch.softmax((s / temperature).masked_fill(own, -torch.inf), dim=1) / temperature
    if weight == "hardest":
        return torch.zeros_like(s).scatter(1, rows.nearest[:, None], 1.0)
    if weight == "uniform":
        unnormalised = torch.ones_like(s)
    elif weight[0] == "power":
        unnormalised = s.clamp_min(POWER_FLOOR).pow(weight[1])
    else:
        raise ValueError(f"weight: expected the equation of {weight[0]!r}, got none")
    unnormalised = unnormalised.masked_fill(own, 0.0)
    return unnormalised / unnormalised.sum(dim=1, keepdim=True)


def _ratio(rows: PairStatistics, ratio: Ratio) -> Tensor:
    if callable(ratio):
        return ratio(rows)
    if isinstance(ratio, (int, float)):
        return torch.full_like(rows.positive, ratio)
    positive, hardest = _angle(rows.positive), _angle(rows.hardest)
    if ratio == "arccon":
        return torch.sin(positive + DEFAULT_MARGIN["arccon"]) / torch.sin(positive)
    if ratio == "mat":
        return torch.sin(hardest) / torch.sin(positive)
    return _measure(rows.hardest, "met") / _measure(rows.positive, "met")


# --- not contrastive -------------------------------------------------------------------------------------------------


def _hold_far_rows(x: Tensor, margin: float) -> Tensor:
    """Rows whose nearest neighbour in their own view is margin or more away are constants."""
    moves = 1 - pair_statistics(x @ x.T, 1.0).hardest < margin
    return torch.where(moves[:, None], x, x.detach())


def _distance_of_pairs(u: Tensor, v: Tensor) -> Tensor:
    return 2 - 2 * (u * v).sum(dim=1)


def _mhe(u: Tensor, v: Tensor, modified: Collection[str], temperature: float, strength: float, ratio: float) -> Tensor:
    pull: Tensor | float = 0.0
    uniformity: Tensor | float = 0.0
    for x in (u, v):
        if len(x) == 1:  # no pairs, and no weights that come from them
            pull = pull + (0.0 if "w" in modified else 1.0)
            continue
        s = x @ x.T / (temperature if "w" in modified else 1.0)
        once = torch.ones(s.shape, dtype=torch.bool, device=s.device).tril(-1)
        among_pairs = torch.logsumexp(s.masked_fill(~once, -torch.inf).flatten(), dim=0)
        uniformity = uniformity + among_pairs
        if "w" in modified:
            row_lse = torch.logsumexp(s.masked_fill(_diagonal(s), -torch.inf), dim=1)
            pull = pull + ((row_lse - among_pairs).exp() / temperature).detach()
        else:
            pull = pull + 1 / len(u)
    pull = pull * (ratio if "r" in modified else 1.0)
    return strength * uniformity + (pull * _distance_of_pairs(u, v) / 2).sum()


def _mhs(u: Tensor, v: Tensor, modified: Collection[str], strength: float, ratio: float) -> Tensor:
    pull: Tensor | float = 0.0
    nearest: Tensor | float = 0.0
    for x, y in ((u, v.detach()), (v, u.detach())):
        if len(x) == 1:  # no neighbour, as one that is infinitely far
            pull = pull + (0.0 if "r" in modified else 1.0)
            continue
        s = x @ y.T
        hardest = s.gather(1, pair_statistics(s, 1.0).nearest[:, None]).squeeze(1)
        distance = ((2 - 2 * hardest).clamp_min(0.0) + DISTANCE_FLOOR).sqrt()
        nearest = nearest - distance.mean()
        pull = pull + (ratio / distance.detach() if "r" in modified else 1.0)
    return strength * nearest + (pull * _distance_of_pairs(u, v) / 2).mean()


def _gradient_form(
    x: Tensor,
    y: Tensor,
    z: Tensor,  # whose similarities are the weights: x of VICReg, y of Barlow Twins
    modified: Collection[str],
    temperature: float,
    strength: float,
    ratio: float,
    positive_part: Callable[[Tensor, Tensor, float], Tensor],
) -> Tensor:
    n, s = len(x), (z @ z.T).detach()
    own = _diagonal(s)
    if n == 1 and "w" in modified:
        weight = torch.zeros_like(s)  # a share of a sum over no pairs
    elif "w" in modified:
        weight = (s / temperature - torch.logsumexp((s / temperature).masked_fill(own, -torch.inf).flatten(), 0)).exp()
    else:
        weight = 2 * s / n**2
    if "r" in modified:
        positive = -strength * ratio * weight.masked_fill(own, 0.0).sum(dim=1) * (x * y).sum(dim=1)
    else:
        positive = positive_part(x, y.detach(), strength)
    return (positive + strength * (weight * (x @ x.detach().T)).sum(dim=1)).sum()


def _modifiable_terms(
    u: Tensor,
    v: Tensor,
    objective: str,
    modified: Collection[str],
    margin: float,
    temperature: float,
    strength: float,
    ratio: float,
) -> Terms:
    """Of unit rows; the loss is a mean over rows, so weight and pull are N times their parts in the sum."""
    n, own = len(u), _diagonal(u @ u.T)
    weights, pull = [], torch.zeros_like(u[:, 0])  # of u against its negatives, and of v
    for x, y in ((u, v), (v, u)):
        z = y if objective == "barlow_twins" else x
        s = (x @ y.T if objective == "mhs" else z @ z.T).masked_fill(own, -torch.inf)
        scaled = s / (temperature if "w" in modified else 1.0)
        if objective == "mhs":
            w = torch.zeros_like(s).scatter(1, pair_statistics(s, 1.0).nearest[:, None], 1 / n)
            w = w / (2 - 2 * s.amax(dim=1, keepdim=True) + DISTANCE_FLOOR).sqrt()
        elif objective == "mhe":
            w = (scaled - torch.logsumexp(scaled[own.logical_not().tril()], dim=0)).exp()
            w = w / (temperature if "w" in modified else 1.0)
        elif "w" in modified:
            w = (scaled - torch.logsumexp(scaled.flatten(), dim=0)).exp()
        else:
            w = 2 * s.masked_fill(own, 0.0) / n**2
        weights.append(strength * w)
        if objective == "mhe":
            pull = pull + (w.sum(dim=1) if "w" in modified else 1 / n) * (ratio if "r" in modified else 1.0)
        elif objective == "mhs":
            pull = pull + (ratio * w.sum(dim=1) if "r" in modified else 1 / n)
        elif "r" in modified:
            pull = pull + strength * ratio * w.sum(dim=1)
    if objective in ("vicreg", "barlow_twins") and "r" not in modified:
        by_dimension = (
            1 - (1 - strength) * (u * v).mean(dim=0) if objective == "barlow_twins" else torch.ones_like(u[0])
        )
        pull = pull + 2 / n * (by_dimension * v**2).sum(dim=1) / (v**2).sum(dim=1)
    moves = 1 - pair_statistics(u @ u.T, 1.0).hardest < margin if "gd" in modified else torch.ones_like(pull)
    return Terms(moves.to(u.dtype), n * weights[0], pull / weights[0].sum(dim=1))


def _vicreg_positive(x: Tensor, y: Tensor, strength: float) -> Tensor:
    return -2 / len(x) * (x * y).sum(dim=1)


def _barlow_positive(x: Tensor, y: Tensor, strength: float) -> Tensor:
    correlation = (x.detach() * y).mean(dim=0)  # (D,) the diagonal of C
    return -2 / len(x) * (x * y) @ (1 - (1 - strength) * correlation)
