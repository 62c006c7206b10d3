"""Dissipation, weight and ratio of each row, in sweeps over blocks of similarities on any device."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from hicl_fast import functional as HF
from hicl_fast.ops.common.autograd import without_autocast
from hicl_fast.ops.common.constants import DISTANCE_FLOOR
from hicl_fast.ops.common.numbers import sum_type
from hicl_fast.ops.common.unit_rows import row_dot
from hicl_fast.ops.paradigm import torch as engine
from hicl_fast.ops.paradigm.engine import RowWeights, Views
from hicl_fast.ops.paradigm.objectives import MEASURES, angle, dissipation_of, ratio_of
from hicl_fast.ops.paradigm.settings import (
    HINGES,
    MODIFIABLE,
    Dissipation,
    Modification,
    Objective,
    PairStatistics,
    Ratio,
    Settings,
    Weight,
)


class GradientTerms(NamedTuple):
    """Of each row of u; detached."""

    dissipation: Tensor  # (N,)
    weight_entropy: Tensor  # (N,) nats, of the weights' magnitudes divided by their sum: 0 to log(N − 1)
    hardest_share: Tensor  # (N,) of the most similar negative in the magnitudes' sum
    ratio: Tensor  # (N,) pull over push; with the hardest negative, where it depends on the negative

    def means(self) -> dict[str, Tensor]:
        """Over rows, by name."""
        return {name: value.mean() for name, value in self._asdict().items()}


def gradient_terms(
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
) -> GradientTerms:
    r"""The parts of ``∂L_i/∂u_i = GD_i Σ_{j≠i} W_ij (v_j − R_ij v_i)`` (arXiv 2402.18281, eq. of the paradigm).

    The negatives of ``"mhe"``, ``"vicreg"`` and ``"barlow_twins"`` are of the row's own view, u_j in place of v_j; weights
    of the last two have the similarities' signs as they stand, and then so has the ratio. ``"barlow_twins"`` as it
    stands pulls by dimension: its ratio is that of the part along v_i. The dissipation of these and of ``"mhs"`` is 1
    without ``"gd"``.

    Takes two to four products and O(N·D) memory.

    Args:
        u: (N, D) one view, N ≥ 2; need not be normalised.
        v: (N, D) the other view.
        objective: ``"info_nce"``, ``"arccon"``, ``"mpt"``, ``"met"``, ``"mat"``, ``"custom"``, ``"mhe"``, ``"mhs"``,
            ``"vicreg"`` or ``"barlow_twins"``; the other arguments as in :func:`hicl_fast.functional.paradigm`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    settings = HF.paradigm_settings(
        objective, modified, margin, temperature, strength, dissipation=dissipation, weight=weight, ratio=ratio
    )
    HF.check_views(u, v, fewest=2)
    with torch.no_grad(), without_autocast(u.device.type):
        views = engine.views(u, v, sum_type(u, v))
        if objective in MODIFIABLE:
            return _of_modifiable(views, objective, settings)
        found = engine.statistics(views.u.rows, views.v.rows, temperature, columns=False)
        rows = PairStatistics(views.positive, found.hardest, found.nearest, found.lse)
        if settings.objective in HINGES or settings.weight == "hardest":
            entropy, share = _of_one_negative(rows.hardest)
        else:
            entropy, share = _of_weights(views.u.rows, views.v.rows, rows.nearest, _weights(rows, settings))
        return GradientTerms(_dissipation(rows, settings), entropy, share, _ratio(rows, settings))


def _dissipation(rows: PairStatistics, settings: Settings) -> Tensor:
    objective = settings.objective
    if objective == "custom":
        return dissipation_of(rows, settings)
    if objective in ("info_nce", "arccon"):
        positive = torch.cos(angle(rows.positive).value + settings.margin) if settings.margin else rows.positive
        return torch.sigmoid(rows.lse - positive / settings.temperature)
    measure = MEASURES[objective]
    gap = measure(rows.hardest).value - measure(rows.positive).value
    return (gap < settings.margin).to(gap.dtype)


def _ratio(rows: PairStatistics, settings: Settings) -> Tensor:
    objective = settings.objective
    if objective in ("custom", "info_nce"):
        return ratio_of(rows, settings)
    if objective == "arccon":
        positive = angle(rows.positive).value
        return torch.sin(positive + settings.margin) / torch.sin(positive)
    pull, push = (MEASURES[objective](s).slope for s in (rows.positive, rows.hardest))
    return torch.where(push == 0, 0.0, pull / push)  # a negative in the clamp is not pushed


def _weights(rows: PairStatistics, settings: Settings) -> RowWeights:
    weight = settings.weight
    if callable(weight):
        return lambda s, at: weight(s, PairStatistics(*(x[at] for x in rows)))
    if weight == "uniform":
        return lambda s, at: torch.ones_like(s)
    if weight == "softmax":
        return _softmax(rows.lse, settings.temperature)
    assert isinstance(weight, (tuple, list))
    name, parameter = weight
    return lambda s, at: engine.WEIGHTS[name](s.clone(), rows.hardest[at], float(parameter))[0]


def _softmax(lse: Tensor, temperature: float) -> RowWeights:
    return lambda s, at: torch.exp(s / temperature - lse[at, None])


def _of_one_negative(like: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(like), torch.ones_like(like)


def _of_weights(x: Tensor, y: Tensor, nearest: Tensor, weights: RowWeights) -> tuple[Tensor, Tensor]:
    """The entropy of weights that are functions of x_i·y_j, and each row's share of column ``nearest`` (N,)."""
    entropy, share = x.new_empty(len(x)), x.new_empty(len(x))

    def measured(s: Tensor, at: slice) -> Tensor:
        w = weights(s, at).abs()
        w.diagonal(at.start).fill_(0.0)
        w = w / w.sum(dim=1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        entropy[at] = torch.special.entr(w).sum(dim=1)
        share[at] = w.gather(1, nearest[at, None]).squeeze(1)
        return w

    engine.combine_by(x, y, x.new_zeros(len(x), 1), measured)
    return entropy, share


# --- the losses that are not contrastive ------------------------------------------------------------------------------


def _of_modifiable(views: Views, objective: Objective, settings: Settings) -> GradientTerms:
    u, v, modified = views.u.rows, views.v.rows, settings.modified
    tau = settings.temperature if "w" in modified else 1.0
    if objective == "mhs":
        found = engine.statistics(u, v, None, columns=True)
        pushes = [_nearest_push(hardest) for hardest in (found.hardest, found.column_hardest)]
        entropy, share = _of_one_negative(found.hardest)
    else:
        found, other = (engine.statistics(x, x, tau, columns=False) for x in (u, v))
        z, of_z = (v, other) if objective == "barlow_twins" else (u, found)  # whose similarities the weights are
        if objective == "mhe" or "w" in modified:
            weights = _softmax(of_z.lse, tau)
            total = 2 / tau if objective == "mhe" else 1.0  # the uniformity counts a pair once, in both its rows
            pushes = [total * torch.softmax(x.lse, dim=0) for x in (of_z, other if of_z is found else found)]
        else:
            weights = _similarity
            pushes = [_linear_push(x) for x in (z, v if z is u else u)]
        entropy, share = _of_weights(z, z, found.nearest, weights)
    kept = torch.ones_like(views.positive)
    if "gd" in modified:
        nearest = engine.statistics(u, u, None, columns=False) if objective == "mhs" else found
        kept = (1 - nearest.hardest < settings.margin).to(kept.dtype)
    ratio = _pull(views, objective, settings, pushes[0] + pushes[1]) / (settings.strength * pushes[0])
    return GradientTerms(kept, entropy, share, ratio)


def _similarity(s: Tensor, at: slice) -> Tensor:
    return s


def _nearest_push(hardest: Tensor) -> Tensor:
    """``W_i / λ`` of the nearest negative, one over its distance."""
    return ((2 - 2 * hardest).clamp_min(0.0) + DISTANCE_FLOOR).rsqrt() / len(hardest)


def _linear_push(z: Tensor) -> Tensor:
    """``Σ_{j≠i} W_ij / λ`` with ``W_ij = 2 λ z_i·z_j / N²``."""
    return 2 / len(z) ** 2 * (z @ z.sum(dim=0) - row_dot(z, z))


def _pull(views: Views, objective: Objective, settings: Settings, both: Tensor) -> Tensor:
    """(N,) what u_i is pulled to v_i with; of both views' pushes (N,)."""
    assert isinstance(settings.ratio, (int, float))
    plain = torch.full_like(both, 2 / len(both))
    if objective == "mhe":
        return settings.ratio * (both if "w" in settings.modified else plain)
    if "r" in settings.modified:
        return settings.ratio * both * (1.0 if objective == "mhs" else settings.strength)
    if objective == "barlow_twins":
        u, v = views.u.rows, views.v.rows
        by_dimension = 1 - (1 - settings.strength) * torch.linalg.vecdot(u, v, dim=0) / len(u)
        return plain * (v.square() @ by_dimension) / row_dot(v, v)
    return plain
