"""Every objective of the gradient paradigm: its value and its gradients with respect to the unit rows.

An objective is a function of :class:`Views`, the settings and a backend's engine, and a line in ``OBJECTIVES``. It asks
the engine for row statistics and weighted sums; what it does itself is O(N·D). docs/paradigm.md shows how to add one.
``info_nce`` and ``arccon`` are the operator ``info_nce`` and not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hicl_fast.ops.paradigm_engine import Engine, RowWeights, UnitRows, row_dot
from hicl_fast.ops.paradigm_settings import Settings
from hicl_fast.ops.problem import ANGLE_CLAMP
from hicl_fast.reference.paradigm import DEFAULT_MARGIN, DISTANCE_FLOOR, PairStatistics


@dataclass(frozen=True)
class Views:
    """The two views, normalised."""

    u: UnitRows  # (N, D)
    v: UnitRows  # (N, D)
    positive: Tensor  # (N,) u_i·v_i

    @staticmethod
    def of(u: Tensor, v: Tensor, dtype: torch.dtype) -> Views:
        first, second = UnitRows.of(u, dtype), UnitRows.of(v, dtype)
        return Views(first, second, row_dot(first.rows, second.rows))


class Result(NamedTuple):
    loss: Tensor  # ()
    u_grad: Tensor  # (N, D) with respect to the unit rows; memory of its own
    v_grad: Tensor  # (N, D)
    hardest: Tensor  # (N,) the largest similarity with a negative; empty where the objective looks at none


Objective = Callable[[Views, Settings, Engine], Result]


# --- hinges: only a row's hardest negative counts --------------------------------------------------------------------


class Measured(NamedTuple):
    """What a hinge compares, and its derivative with respect to the similarity."""

    value: Tensor  # (N,)
    slope: Tensor  # (N,)


def similarity(s: Tensor) -> Measured:
    return Measured(-s, torch.full_like(s, -1.0))  # smaller is nearer, as with the other two


def distance(s: Tensor) -> Measured:
    squared = 2 - 2 * s
    d = squared.clamp_min(DISTANCE_FLOOR).sqrt()
    return Measured(d, torch.where(squared >= DISTANCE_FLOOR, -1 / d, 0.0))


def angle(s: Tensor) -> Measured:
    low, high = -1 + ANGLE_CLAMP, 1 - ANGLE_CLAMP
    theta = torch.arccos(s.clamp(low, high))
    return Measured(theta, torch.where((s >= low) & (s <= high), -1 / torch.sin(theta), 0.0))


def hinge(measure: Callable[[Tensor], Measured]) -> Objective:
    """``mean_i relu(measure(s_ii) − min_{j≠i} measure(s_ij) + m)``."""

    def objective(views: Views, settings: Settings, engine: Engine) -> Result:
        u, v = views.u.rows, views.v.rows
        found = engine.statistics(u, v, None, columns=False)
        near, far = measure(views.positive), measure(found.hardest)
        gap = near.value - far.value + settings.margin
        active = (gap > 0).to(gap.dtype) / len(gap)
        pull, push = (active * near.slope)[:, None], (active * far.slope).neg_()[:, None]
        u_grad = (v * pull).addcmul_(v[found.nearest], push)
        v_grad = (u * pull).index_add_(0, found.nearest, u * push)
        return Result(torch.relu(gap).mean(), u_grad, v_grad, found.hardest)

    return objective


# --- the paradigm's equation with parts of one's own -----------------------------------------------------------------


def custom(views: Views, settings: Settings, engine: Engine) -> Result:
    """Both directions, each ``GD_i Σ_{j≠i} W_ij (y_j − R_i y_i)`` averaged over rows, the other side constant."""
    u, v = views.u.rows, views.v.rows
    loss, u_grad, hardest = _one_direction(u, v, views.positive, settings, engine)
    column_loss, v_grad, _ = _one_direction(v, u, views.positive, settings, engine)
    return Result(loss + column_loss, u_grad, v_grad, hardest)


def _one_direction(
    x: Tensor, y: Tensor, positive: Tensor, settings: Settings, engine: Engine
) -> tuple[Tensor, Tensor, Tensor]:
    rows, total, known = _weighted_rows(x, y, positive, settings, engine)
    kept = dissipation_of(known, settings) / len(x)
    ratio = ratio_of(known, settings)
    loss = (kept * (row_dot(x, rows) - total * ratio * positive)).sum()
    gradient = rows.addcmul_(y, (total * ratio)[:, None], value=-1).mul_(kept[:, None])
    return loss, gradient, known.hardest


def _weighted_rows(
    x: Tensor, y: Tensor, positive: Tensor, settings: Settings, engine: Engine
) -> tuple[Tensor, Tensor, PairStatistics]:
    """``Σ_{j≠i} W_ij y_j`` (N, D), ``Σ_{j≠i} W_ij`` (N,), and what the dissipation and the ratio may look at."""
    weight, tau = settings.weight, settings.temperature
    if weight == "softmax":
        found = engine.combine(x, y, y, "softmax", tau)
        known = PairStatistics(positive, found.hardest, found.nearest, found.log_total)
        return found.rows.div_(tau), torch.full_like(positive, 1 / tau), known
    needs_lse = settings.dissipation == "softmax" or settings.has_callables
    statistics = engine.statistics(x, y, tau if needs_lse else None, columns=False)
    known = PairStatistics(positive, statistics.hardest, statistics.nearest, statistics.lse)
    if callable(weight):
        return *engine.combine_by(x, y, y, _of_rows(weight, known)), known
    if weight == "hardest":
        rows = y[statistics.nearest]
    elif weight == "uniform":
        rows = (y.sum(dim=0) - y).div_(len(y) - 1)
    else:
        rows = engine.combine(x, y, y, "power", float(weight[1])).rows
    return rows, torch.ones_like(positive), known


def _of_rows(weight: Callable[[Tensor, PairStatistics], Tensor], known: PairStatistics) -> RowWeights:
    return lambda s, rows: weight(s, PairStatistics(*(x[rows] for x in known)))


def dissipation_of(rows: PairStatistics, settings: Settings) -> Tensor:  # (N,)
    dissipation = settings.dissipation
    if callable(dissipation):
        return dissipation(rows)
    if dissipation is None:
        return torch.ones_like(rows.positive)
    if isinstance(dissipation, str):
        return torch.sigmoid(rows.lse - rows.positive / settings.temperature)
    return (rows.positive - rows.hardest < dissipation).to(rows.positive.dtype)


def ratio_of(rows: PairStatistics, settings: Settings) -> Tensor:  # (N,)
    ratio = settings.ratio
    if callable(ratio):
        return ratio(rows)
    if isinstance(ratio, (int, float)):
        return torch.full_like(rows.positive, ratio)
    if ratio == "met":
        return distance(rows.hardest).value / distance(rows.positive).value
    theta, sine = angle(rows.positive).value, torch.sin(angle(rows.positive).value)
    if ratio == "mat":
        return torch.sin(angle(rows.hardest).value) / sine
    return torch.sin(theta + DEFAULT_MARGIN["arccon"]) / sine


# --- not contrastive -------------------------------------------------------------------------------------------------


def mhe(views: Views, settings: Settings, engine: Engine) -> Result:
    """``λ (U(u) + U(v)) + Σ_i pull_i (1 − s_ii)``, ``U(u) = log Σ_{i<j} e^(u_i·u_j / τ)``."""
    modified, n = settings.modified, len(views.positive)
    tau = settings.temperature if "w" in modified else 1.0
    loss = views.positive.new_zeros(())
    pull = torch.zeros_like(views.positive)
    gradients, hardest = [], []
    for x in (views.u.rows, views.v.rows):
        found = engine.combine(x, x, x, "softmax", tau)
        uniformity = torch.logsumexp(found.log_total, dim=0) - math.log(2)  # each pair is in two rows
        share = (found.log_total - uniformity).exp() / tau
        loss = loss + settings.strength * uniformity
        pull = pull + (share if "w" in modified else 1 / n)
        gradients.append(found.rows.mul_(settings.strength * share[:, None]))
        hardest.append(found.hardest)
    if "r" in modified:
        pull = pull * _constant_ratio(settings)
    loss = loss + (pull * (1 - views.positive)).sum()
    return _pulled(views, settings, loss, gradients, pull, hardest)


def mhs(views: Views, settings: Settings, engine: Engine) -> Result:
    """Distance to the nearest negative, the other side constant; the weight is that negative alone, so ``w`` is idle."""
    u, v, n = views.u.rows, views.v.rows, len(views.positive)
    found = engine.statistics(u, v, None, columns=True)
    pull, nearest = torch.zeros_like(views.positive), views.positive.new_zeros(())
    gradients = []
    for y, hardest, index in ((v, found.hardest, found.nearest), (u, found.column_hardest, found.column_index)):
        squared = 2 - 2 * hardest
        d = (squared.clamp_min(0.0) + DISTANCE_FLOOR).sqrt()
        nearest = nearest - d.mean()
        pull = pull + (_constant_ratio(settings) / d if "r" in settings.modified else 1.0)
        push = torch.where(squared >= 0, settings.strength / (n * d), 0.0)
        gradients.append(y[index] * push[:, None])
    pull = pull / n
    loss = settings.strength * nearest + (pull * (1 - views.positive)).sum()
    if "gd" in settings.modified:
        neighbours = [engine.statistics(x, x, None, columns=False).hardest for x in (u, v)]
    else:
        neighbours = [found.hardest]
    return _pulled(views, settings, loss, gradients, pull, neighbours)


def vicreg(views: Views, settings: Settings, engine: Engine) -> Result:
    """In gradient form; its weights are similarities of the view itself."""
    u, v = views.u.rows, views.v.rows
    return _gradient_form(views, settings, engine, ((u, u), (v, v)), _same_pull)


def barlow_twins(views: Views, settings: Settings, engine: Engine) -> Result:
    """In gradient form; its weights are similarities of the other view."""
    u, v = views.u.rows, views.v.rows
    return _gradient_form(views, settings, engine, ((u, v), (v, u)), _decorrelated_pull)


def _same_pull(views: Views, strength: float) -> Tensor | float:
    return 1.0


def _decorrelated_pull(views: Views, strength: float) -> Tensor:  # (D,)
    correlation = torch.linalg.vecdot(views.u.rows, views.v.rows, dim=0) / len(views.positive)
    return 1 - (1 - strength) * correlation


def _gradient_form(
    views: Views,
    settings: Settings,
    engine: Engine,
    pairs: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    dimension_pull: Callable[[Views, float], Tensor | float],
) -> Result:
    """``Σ_i [pos_i + λ Σ_j w_ij x_i·x_j]`` for both (x, z), where w are functions of z_i·z_j and constant.

    The diagonal of w takes part in the value; its gradient is along x_i and vanishes in the normalisation.
    """
    modified, strength, n = settings.modified, settings.strength, len(views.positive)
    loss, pull = views.positive.new_zeros(()), torch.zeros_like(views.positive)
    gradients, hardest = [], []
    for x, z in pairs:
        if "w" in modified:
            found = engine.combine(z, z, x, "softmax", settings.temperature)
            log_sum = torch.logsumexp(found.log_total, dim=0)
            total = (found.log_total - log_sum).exp()  # (N,) Σ_{j≠i} w_ij
            own = (row_dot(z, z) / settings.temperature - log_sum).exp()
            push = found.rows.mul_(strength * total[:, None])
            loss = loss + row_dot(x, push).sum() + strength * (own * row_dot(x, x)).sum()
            hardest.append(found.hardest)
        else:
            total = (2 / n**2) * (z @ z.sum(dim=0) - row_dot(z, z))
            push = _linear_combination(z, x).mul_(2 * strength / n**2)
            loss = loss + row_dot(x, push).sum()
        pull = pull + strength * _constant_ratio(settings) * total
        gradients.append(push)
    if "gd" in modified and not hardest:
        hardest = [engine.statistics(x, x, None, columns=False).hardest for x in (views.u.rows, views.v.rows)]
    elif "gd" in modified and pairs[0][0] is not pairs[0][1]:
        hardest.reverse()  # they came with z
    if "r" in modified:
        return _pulled(views, settings, loss - (pull * views.positive).sum(), gradients, pull, hardest)
    by_dimension = dimension_pull(views, strength)
    scale = 2 / n
    loss = loss - 2 * scale * (row_dot(views.u.rows * by_dimension, views.v.rows)).sum()
    for gradient, other in zip(gradients, (views.v.rows, views.u.rows), strict=True):
        gradient.sub_(other * (scale * by_dimension))
    return _held(views, settings, loss, gradients, hardest)


def _linear_combination(z: Tensor, x: Tensor) -> Tensor:
    """``Σ_j (z_i·z_j) x_j`` through whichever of D×D and N×N is smaller."""
    n, d = x.shape
    return z @ (z.T @ x) if d < n else (z @ z.T) @ x


def _constant_ratio(settings: Settings) -> float:
    assert isinstance(settings.ratio, (int, float))
    return float(settings.ratio)


def _pulled(
    views: Views, settings: Settings, loss: Tensor, gradients: list[Tensor], pull: Tensor, hardest: list[Tensor]
) -> Result:
    """Adds the gradient of ``−Σ_i pull_i s_ii``, pull constant."""
    for gradient, other in zip(gradients, (views.v.rows, views.u.rows), strict=True):
        gradient.addcmul_(other, pull[:, None], value=-1)
    return _held(views, settings, loss, gradients, hardest)


def _held(views: Views, settings: Settings, loss: Tensor, gradients: list[Tensor], hardest: list[Tensor]) -> Result:
    """The modified dissipation: a row whose nearest neighbour in its own view is far gets no gradient."""
    if "gd" in settings.modified:
        for gradient, nearest in zip(gradients, hardest, strict=True):
            gradient.masked_fill_((1 - nearest >= settings.margin)[:, None], 0.0)
    return Result(loss, gradients[0], gradients[1], hardest[0] if hardest else views.positive.new_empty(0))


OBJECTIVES: dict[str, Objective] = {
    "mpt": hinge(similarity),
    "met": hinge(distance),
    "mat": hinge(angle),
    "custom": custom,
    "mhe": mhe,
    "mhs": mhs,
    "vicreg": vicreg,
    "barlow_twins": barlow_twins,
}
