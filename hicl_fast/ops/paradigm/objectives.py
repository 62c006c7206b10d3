"""Every objective of the gradient paradigm: its value, and its gradients with respect to the unit rows as sums of terms.

An objective is a function of :class:`Views`, the settings and a backend's engine, and a line in ``OBJECTIVES``. It asks
the engine for row statistics and weighted sums, and says which rows times which factors make up the gradients, which the
engine then adds up; what it does itself is O(N) as far as it can be. docs/paradigm.md shows how to add one.
``info_nce`` and ``arccon`` are the operator ``info_nce`` and not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hicl_fast._checks import describe
from hicl_fast.ops.common.constants import ANGLE_CLAMP, DISTANCE_FLOOR
from hicl_fast.ops.common.unit_rows import row_dot
from hicl_fast.ops.paradigm.engine import Engine, RowWeights, Term, Views
from hicl_fast.ops.paradigm.settings import DEFAULT_MARGIN, PairStatistics, Settings


class Result(NamedTuple):
    loss: Tensor  # ()
    u_terms: list[Term]  # whose sum is the gradient with respect to the unit rows of u
    v_terms: list[Term]
    hardest: Tensor  # (N,) the largest similarity with a negative; empty where the objective looks at none


Objective = Callable[[Views, Settings, Engine], Result]


# --- hinges: only a row's hardest negative counts --------------------------------------------------------------------


class Measured(NamedTuple):
    """What a hinge compares, and its derivative with respect to the similarity."""

    value: Tensor  # (N,)
    slope: Tensor  # (N,)


Measure = Callable[[Tensor], Measured]  # similarities (N,) ->


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


def hinge(measure: Measure) -> Objective:
    """``mean_i relu(measure(s_ii) − min_{j≠i} measure(s_ij) + m)``."""

    def objective(views: Views, settings: Settings, engine: Engine) -> Result:
        u, v = views.u.rows, views.v.rows
        found = engine.statistics(u, v, None, columns=False)
        near, far = measure(views.positive), measure(found.hardest)
        gap = near.value - far.value + settings.margin
        active = (gap > 0).to(gap.dtype) / len(gap)
        pull, push = active * near.slope, -active * far.slope
        u_terms = [Term(v, pull), Term(v, push, source=found.nearest)]
        v_terms = [Term(u, pull), Term(u, push, target=found.nearest)]
        return Result(torch.relu(gap).mean(), u_terms, v_terms, found.hardest)

    return objective


# --- a batch of one row ----------------------------------------------------------------------------------------------


def alone(views: Views, settings: Settings, engine: Engine) -> Result:
    """Of a row without negatives: what sums over them is 0, and so is a pair's weight that comes from them.

    Left are the pull of ``mhe`` and ``mhs``, where it is constant, and what ``vicreg`` and ``barlow_twins`` make of the pair.
    """
    objective, modified = settings.objective, settings.modified
    if objective in ("vicreg", "barlow_twins"):
        return OBJECTIVES[objective](views, settings, engine)
    pull = views.positive - views.positive  # 0, or NaN where the input was
    if objective == "mhe" and "w" not in modified:
        pull = pull + 2 * (_constant_ratio(settings) if "r" in modified else 1.0)
    elif objective == "mhs" and "r" not in modified:
        pull = pull + 2
    terms = [[Term(views.v.rows, -pull)], [Term(views.u.rows, -pull)]]
    hardest = _no_neighbour(views) if settings.knows_hardest else []
    return _held(settings, (pull * (1 - views.positive)).sum(), terms, hardest)


def _no_neighbour(views: Views) -> list[Tensor]:
    return [torch.full_like(views.positive, -torch.inf)] * 2


# --- the paradigm's equation with parts of one's own -----------------------------------------------------------------


def custom(views: Views, settings: Settings, engine: Engine) -> Result:
    """Both directions, each ``GD_i Σ_{j≠i} W_ij (y_j − R_i y_i)`` averaged over rows, the other side constant."""
    u, v = views.u.rows, views.v.rows
    loss, u_terms, hardest = _one_direction(u, v, views.positive, settings, engine)
    column_loss, v_terms, _ = _one_direction(v, u, views.positive, settings, engine)
    return Result(loss + column_loss, u_terms, v_terms, hardest)


def _one_direction(
    x: Tensor, y: Tensor, positive: Tensor, settings: Settings, engine: Engine
) -> tuple[Tensor, list[Term], Tensor]:
    push, total, known = _weighted_rows(x, y, positive, settings, engine)
    kept = dissipation_of(known, settings) / len(x)
    pull = total * ratio_of(known, settings)
    loss = (kept * (push.factor * row_dot(x, push.rows) - pull * positive)).sum()
    return loss, [push._replace(factor=kept * push.factor), Term(y, -kept * pull)], known.hardest


def _weighted_rows(
    x: Tensor, y: Tensor, positive: Tensor, settings: Settings, engine: Engine
) -> tuple[Term, Tensor, PairStatistics]:
    """``Σ_{j≠i} W_ij y_j``, ``Σ_{j≠i} W_ij`` (N,), and what the dissipation and the ratio may look at."""
    weight, tau = settings.weight, settings.temperature
    if weight == "softmax":
        found = engine.combine(x, y, y, "softmax", tau)
        known = PairStatistics(positive, found.hardest, found.nearest, found.log_total)
        total = torch.full_like(positive, 1 / tau)
        return Term(found.rows, total), total, known
    needs_lse = settings.dissipation == "softmax" or settings.has_callables
    statistics = engine.statistics(x, y, tau if needs_lse else None, columns=False)
    known = PairStatistics(positive, statistics.hardest, statistics.nearest, statistics.lse)
    one = torch.ones_like(positive)
    if callable(weight):
        rows, total = engine.combine_by(x, y, y, _of_rows(weight, known))
        return Term(rows, one), total, known
    if weight == "hardest":
        rows = y[statistics.nearest]
    elif weight == "uniform":
        rows = (y.sum(dim=0) - y).div_(len(y) - 1)
    else:
        rows = engine.combine(x, y, y, weight[0], float(weight[1])).rows
    return Term(rows, one), one, known


def _of_rows(weight: Callable[[Tensor, PairStatistics], Tensor], known: PairStatistics) -> RowWeights:
    def weights(s: Tensor, rows: slice) -> Tensor:
        return _shaped("weight", weight(s, PairStatistics(*(x[rows] for x in known))), s)

    return weights


def _shaped(name: str, value: Tensor, like: Tensor) -> Tensor:
    """What a user's function gave, which other shapes would turn into other numbers further on."""
    if not isinstance(value, Tensor) or value.shape != like.shape:
        came = describe(value)
        raise ValueError(f"{name}: expected a function that gives a tensor of shape {tuple(like.shape)}, got {came}")
    return value


def dissipation_of(rows: PairStatistics, settings: Settings) -> Tensor:  # (N,)
    dissipation = settings.dissipation
    if callable(dissipation):
        return _shaped("dissipation", dissipation(rows), rows.positive)
    if dissipation is None:
        return torch.ones_like(rows.positive)
    if isinstance(dissipation, str):
        return torch.sigmoid(rows.lse - rows.positive / settings.temperature)
    return (rows.positive - rows.hardest < dissipation).to(rows.positive.dtype)


def ratio_of(rows: PairStatistics, settings: Settings) -> Tensor:  # (N,)
    ratio = settings.ratio
    if callable(ratio):
        return _shaped("ratio", ratio(rows), rows.positive)
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
    pushes, hardest = [], []
    for x in (views.u.rows, views.v.rows):
        found = engine.combine(x, x, x, "softmax", tau)
        uniformity = torch.logsumexp(found.log_total, dim=0) - math.log(2)  # each pair is in two rows
        share = (found.log_total - uniformity).exp() / tau
        loss = loss + settings.strength * uniformity
        pull = pull + (share if "w" in modified else 1 / n)
        pushes.append(Term(found.rows, settings.strength * share))
        hardest.append(found.hardest)
    if "r" in modified:
        pull = pull * _constant_ratio(settings)
    loss = loss + (pull * (1 - views.positive)).sum()
    return _pulled(views, settings, loss, pushes, pull, hardest)


def mhs(views: Views, settings: Settings, engine: Engine) -> Result:
    """Distance to the nearest negative, the other side constant; the weight is that negative alone, so ``w`` is idle."""
    u, v, n = views.u.rows, views.v.rows, len(views.positive)
    found = engine.statistics(u, v, None, columns=True)
    pull, nearest = torch.zeros_like(views.positive), views.positive.new_zeros(())
    pushes = []
    for y, hardest, index in ((v, found.hardest, found.nearest), (u, found.column_hardest, found.column_index)):
        squared = 2 - 2 * hardest
        d = (squared.clamp_min(0.0) + DISTANCE_FLOOR).sqrt()
        nearest = nearest - d.mean()
        pull = pull + (_constant_ratio(settings) / d if "r" in settings.modified else 1.0)
        push = torch.where(squared >= 0, settings.strength / (n * d), 0.0)
        pushes.append(Term(y, push, source=index))
    pull = pull / n
    loss = settings.strength * nearest + (pull * (1 - views.positive)).sum()
    neighbours = _nearest_in_view(views, engine) if "gd" in settings.modified else [found.hardest]
    return _pulled(views, settings, loss, pushes, pull, neighbours)


def vicreg(views: Views, settings: Settings, engine: Engine) -> Result:
    """In gradient form; its weights are similarities of the view itself."""
    u, v = views.u.rows, views.v.rows
    return _gradient_form(views, settings, engine, ((u, u), (v, v)), _aligned)


def barlow_twins(views: Views, settings: Settings, engine: Engine) -> Result:
    """In gradient form; its weights are similarities of the other view."""
    u, v = views.u.rows, views.v.rows
    if u.shape[1] < len(u) and not {"w", "r"} & set(settings.modified):
        return _one_matrix(views, settings, engine)
    return _gradient_form(views, settings, engine, ((u, v), (v, u)), _decorrelated)


Pairs = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]  # (x, z) of u and of v, each (N, D)


class Push(NamedTuple):
    """Of weights w_ij that are functions of z_i·z_j and constant."""

    value: Tensor  # () Σ_ij w_ij x_i·x_j
    term: Term  # Σ_j w_ij x_j, but for what is along x_i
    total: Tensor  # (N,) Σ_{j≠i} w_ij; empty where it wasn't asked for
    hardest: Tensor  # (N,) the largest z_i·z_j off the diagonal; empty where it isn't known


class Positive(NamedTuple):
    """``Σ_i x_i·rows_i``, and the rows for x = u and x = v."""

    value: Tensor  # ()
    rows: tuple[Tensor, Tensor]  # (N, D)


def _aligned(views: Views, strength: float) -> Positive:
    return Positive(views.positive.sum(), (views.v.rows, views.u.rows))


def _decorrelated(views: Views, strength: float) -> Positive:
    """A dimension counts for ``1 − (1 − λ) C_dd``."""
    u, v = views.u.rows, views.v.rows
    correlation = torch.linalg.vecdot(u, v, dim=0) / len(u)
    share = 1 - (1 - strength) * correlation
    return Positive(len(u) * (share * correlation).sum(), (v * share, u * share))


def _one_matrix(views: Views, settings: Settings, engine: Engine) -> Result:
    """Barlow Twins as it stands: positive and weights of both views are in one (D, D) matrix and its transpose."""
    u, v, strength, n = views.u.rows, views.v.rows, settings.strength, len(views.positive)
    correlation = (v.T @ u).div_(n)
    own = correlation.diagonal()
    share = 1 - (1 - strength) * own
    loss = 4 * (strength * correlation.square().sum() - (share * own).sum())
    matrix = correlation.mul_(strength).sub_(torch.diag(share))
    factor = views.positive.new_full((n,), 2 / n)
    terms = [[Term(v @ matrix, factor)], [Term(u @ matrix.T, factor)]]
    hardest = _nearest_in_view(views, engine) if "gd" in settings.modified else []
    return _held(settings, loss, terms, hardest)


def _gradient_form(
    views: Views,
    settings: Settings,
    engine: Engine,
    pairs: Pairs,
    positive: Callable[[Views, float], Positive],
) -> Result:
    """``Σ_i [λ Σ_j w_ij x_i·x_j − (2/N) positive_i]`` for both (x, z), where w are functions of z_i·z_j and constant.

    The diagonal of w takes part in the value; its gradient is along x_i and vanishes in the normalisation.
    """
    modified, strength = settings.modified, settings.strength
    if "w" in modified:
        pushes = [_softmax_push(x, z, settings.temperature, engine) for x, z in pairs]
    else:
        pushes = _linear_pushes(pairs, "r" in modified)
    loss = strength * (pushes[0].value + pushes[1].value)
    terms = [push.term._replace(factor=strength * push.term.factor) for push in pushes]
    hardest = [push.hardest for push in pushes if "w" in modified]
    if "gd" in modified and not hardest:
        hardest = _nearest_in_view(views, engine)
    elif pairs[0][0] is not pairs[0][1]:
        hardest.reverse()  # they came with z
    if "r" in modified:
        pull = strength * _constant_ratio(settings) * (pushes[0].total + pushes[1].total)
        return _pulled(views, settings, loss - (pull * views.positive).sum(), terms, pull, hardest)
    scale = 2 / len(views.positive)
    value, others = positive(views, strength)
    pull = torch.full_like(views.positive, -scale)
    gradients = [[push, Term(other, pull)] for push, other in zip(terms, others, strict=True)]
    return _held(settings, loss - 2 * scale * value, gradients, hardest)


def _softmax_push(x: Tensor, z: Tensor, temperature: float, engine: Engine) -> Push:
    """``w_ij = e^(z_i·z_j / τ) / Σ_{a≠b} e^(z_a·z_b / τ)``; of one row 0, its diagonal too."""
    if len(x) == 1:
        nothing = torch.zeros_like(x[:, 0])
        return Push(nothing.sum(), Term(x, nothing), nothing, nothing - torch.inf)
    found = engine.combine(z, z, x, "softmax", temperature)
    log_sum = torch.logsumexp(found.log_total, dim=0)
    total = (found.log_total - log_sum).exp()
    own = (row_dot(z, z) / temperature - log_sum).exp()
    value = (total * row_dot(x, found.rows)).sum() + (own * row_dot(x, x)).sum()
    return Push(value, Term(found.rows, total), total, found.hardest)


def _linear_pushes(pairs: Pairs, wants_total: bool) -> list[Push]:
    """``w_ij = 2 z_i·z_j / N²`` through whichever of D×D and N×N is smaller."""
    (first, z), (second, other_z) = pairs
    n, d = first.shape
    scale, nothing = 2 / n**2, first.new_empty(0)
    if d < n:
        across = z.T @ first  # (D, D)
        shares = (across, across.T if z is second else other_z.T @ second)
        found = [(z @ share, share.square().sum()) for (_, z), share in zip(pairs, shares, strict=True)]
    else:
        rows = [(z @ z.T) @ x for x, z in pairs]
        found = [(push, row_dot(x, push).sum()) for (x, _), push in zip(pairs, rows, strict=True)]
    totals = [scale * (z @ z.sum(dim=0) - row_dot(z, z)) if wants_total else nothing for _, z in pairs]
    factor = first.new_full((n,), scale)
    return [
        Push(scale * value, Term(push, factor), total, nothing)
        for (push, value), total in zip(found, totals, strict=True)
    ]


def _constant_ratio(settings: Settings) -> float:
    assert isinstance(settings.ratio, (int, float))
    return float(settings.ratio)


def _pulled(
    views: Views, settings: Settings, loss: Tensor, pushes: list[Term], pull: Tensor, hardest: list[Tensor]
) -> Result:
    """Adds the gradient of ``−Σ_i pull_i s_ii``, pull constant."""
    terms = [[push, Term(other, -pull)] for push, other in zip(pushes, (views.v.rows, views.u.rows), strict=True)]
    return _held(settings, loss, terms, hardest)


def _nearest_in_view(views: Views, engine: Engine) -> list[Tensor]:
    if len(views.positive) == 1:
        return _no_neighbour(views)
    return [engine.statistics(x, x, None, columns=False).hardest for x in (views.u.rows, views.v.rows)]


def _held(settings: Settings, loss: Tensor, gradients: list[list[Term]], hardest: list[Tensor]) -> Result:
    """The modified dissipation: a row whose nearest neighbour in its own view is far gets no gradient."""
    if "gd" in settings.modified:
        gradients = [
            [term._replace(factor=term.factor.masked_fill(1 - nearest >= settings.margin, 0.0)) for term in terms]
            for terms, nearest in zip(gradients, hardest, strict=True)
        ]
    return Result(loss, gradients[0], gradients[1], hardest[0] if hardest else loss.new_empty(0))


MEASURES: dict[str, Measure] = {"mpt": similarity, "met": distance, "mat": angle}

OBJECTIVES: dict[str, Objective] = {
    **{name: hinge(measure) for name, measure in MEASURES.items()},
    "custom": custom,
    "mhe": mhe,
    "mhs": mhs,
    "vicreg": vicreg,
    "barlow_twins": barlow_twins,
}
