"""Dissipation, weight and ratio of each row, in two sweeps over blocks of similarities on any device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hicl_fast import functional as HF
from hicl_fast.backend import chunked_paradigm as engine
from hicl_fast.ops.autograd import without_autocast
from hicl_fast.ops.paradigm_engine import RowWeights
from hicl_fast.ops.paradigm_objectives import Views, angle, dissipation_of, distance, ratio_of
from hicl_fast.ops.paradigm_settings import Settings
from hicl_fast.ops.problem import sum_type
from hicl_fast.reference.paradigm import MODIFIABLE, POWER_FLOOR, Dissipation, Objective, PairStatistics, Ratio, Weight


class GradientTerms(NamedTuple):
    """Of each row of u against v; detached."""

    dissipation: Tensor  # (N,)
    weight_entropy: Tensor  # (N,) nats, of the weights divided by their sum: 0 to log(N − 1)
    hardest_share: Tensor  # (N,) of the most similar negative in the weights' sum
    ratio: Tensor  # (N,) with the hardest negative, where it depends on the negative

    def means(self) -> dict[str, Tensor]:
        """Over rows, by name."""
        return {name: value.mean() for name, value in self._asdict().items()}


def gradient_terms(
    u: Tensor,  # (N, D)
    v: Tensor,  # (N, D)
    objective: Objective,
    *,
    margin: float | None = None,
    temperature: float = 0.05,
    dissipation: Dissipation = "softmax",
    weight: Weight = "softmax",
    ratio: Ratio = 1.0,
) -> GradientTerms:
    r"""The parts of ``∂L_i/∂u_i = GD_i Σ_{j≠i} W_ij (v_j − R_ij v_i)`` (arXiv 2402.18281, eq. of the paradigm).

    Takes two products and O(N·D) memory.

    Args:
        u: (N, D) one view, N ≥ 2; need not be normalised.
        v: (N, D) the other view.
        objective: ``"info_nce"``, ``"arccon"``, ``"mpt"``, ``"met"``, ``"mat"`` or ``"custom"``; the other arguments
            as in :func:`hicl_fast.functional.paradigm`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if objective in MODIFIABLE:
        raise ValueError(
            f"objective: expected a contrastive one or 'custom', got {objective!r}, whose weights have signs"
        )
    settings = HF.paradigm_settings(
        objective, (), margin, temperature, 1.0, dissipation=dissipation, weight=weight, ratio=ratio
    )
    HF.check_views(u, v)
    with torch.no_grad(), without_autocast(u.device.type):
        views = Views.of(u, v, sum_type(u, v))
        found = engine.statistics(views.u.rows, views.v.rows, temperature, columns=False)
        rows = PairStatistics(views.positive, found.hardest, found.nearest, found.lse)
        return GradientTerms(
            _dissipation(rows, settings), *_entropy_and_share(views, rows, settings), _ratio(rows, settings)
        )


def _dissipation(rows: PairStatistics, settings: Settings) -> Tensor:
    objective = settings.objective
    if objective == "custom":
        return dissipation_of(rows, settings)
    if objective in ("info_nce", "arccon"):
        positive = torch.cos(angle(rows.positive).value + settings.margin) if settings.margin else rows.positive
        return torch.sigmoid(rows.lse - positive / settings.temperature)
    if objective == "mpt":
        gap = rows.positive - rows.hardest
    else:
        measure = distance if objective == "met" else angle
        gap = measure(rows.hardest).value - measure(rows.positive).value
    return (gap < settings.margin).to(gap.dtype)


def _ratio(rows: PairStatistics, settings: Settings) -> Tensor:
    objective = settings.objective
    if objective == "custom" or objective in ("info_nce", "mpt"):
        return ratio_of(rows, settings)
    positive = angle(rows.positive).value
    if objective == "arccon":
        return torch.sin(positive + settings.margin) / torch.sin(positive)
    if objective == "met":
        return distance(rows.hardest).value / distance(rows.positive).value
    return torch.sin(angle(rows.hardest).value) / torch.sin(positive)


def _entropy_and_share(views: Views, rows: PairStatistics, settings: Settings) -> tuple[Tensor, Tensor]:
    """Weights' entropy and the hardest negative's share; both are known without a product for weights of one kind."""
    n, weight = len(rows.positive), settings.weight
    if settings.objective in ("mpt", "met", "mat") or weight == "hardest":
        return torch.zeros_like(rows.hardest), torch.ones_like(rows.hardest)
    entropy, share = torch.empty_like(rows.hardest), torch.empty_like(rows.hardest)
    weights = _weights(rows, settings)

    def measured(s: Tensor, at: slice) -> Tensor:
        w = weights(s, at).clone()
        w.diagonal(at.start).fill_(0.0)
        w = w / w.sum(dim=1, keepdim=True)
        entropy[at] = torch.special.entr(w).sum(dim=1)
        share[at] = w.gather(1, rows.nearest[at, None]).squeeze(1)
        return w

    engine.combine_by(views.u.rows, views.v.rows, rows.hardest.new_zeros(n, 1), measured)
    return entropy, share


def _weights(rows: PairStatistics, settings: Settings) -> RowWeights:
    weight = settings.weight
    if callable(weight):
        return lambda s, at: weight(s, PairStatistics(*(x[at] for x in rows)))
    if weight == "uniform":
        return lambda s, at: torch.ones_like(s)
    if isinstance(weight, tuple):
        power = float(weight[1])
        return lambda s, at: s.clamp_min(POWER_FLOOR).pow(power)
    return lambda s, at: torch.exp(s / settings.temperature - rows.lse[at, None])
