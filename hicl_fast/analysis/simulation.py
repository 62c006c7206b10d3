"""The numbers behind the paper's figures 2–5 and its Lemma 1, from angles drawn at random instead of a model's.

An anchor's angle to its positive is drawn from N(μ_pos, 0.05²), those to its 127 negatives from N(μ_neg, 0.1²), in
radians; a figure's point is a mean over draws (arXiv 2402.18281, figures 2–4).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hicl_fast.losses.paradigm import GradientParadigmLoss
from hicl_fast.ops.paradigm.settings import DEFAULT_MARGIN, Objective
from hicl_fast.reference import normalise

POSITIVE_SPREAD, NEGATIVE_SPREAD, BATCH = 0.05, 0.10, 128
TEMPERATURES = (0.3, 0.1, 0.05, 0.03, 0.01, 0.005)


@dataclass(frozen=True)
class Draws:
    """Standard normal draws, shared by all points of a figure."""

    positive: Tensor  # (S, 1)
    negative: Tensor  # (S, 127)

    @staticmethod
    def of(samples: int, seed: int) -> Draws:
        generator = torch.Generator().manual_seed(seed)
        shape = (samples, BATCH - 1)
        return Draws(torch.randn(samples, 1, generator=generator), torch.randn(*shape, generator=generator))


def dissipation(
    objective: Objective, positive_means: Tensor, negative_mean: float, draws: Draws, temperature: float = 0.05
) -> Tensor:
    """Figure 2: the mean dissipation of a contrastive objective at mean angles to the positive (P,): (P,)."""
    positive = positive_means[:, None] + POSITIVE_SPREAD * draws.positive.squeeze(1)  # (P, S)
    negative = negative_mean + NEGATIVE_SPREAD * draws.negative  # (S, 127)
    margin = DEFAULT_MARGIN[objective]
    if objective in ("info_nce", "arccon"):
        logit = torch.cos(positive + margin) / temperature
        return torch.sigmoid(torch.logsumexp(torch.cos(negative) / temperature, dim=1) - logit).mean(dim=1)
    if objective == "mpt":
        gap = torch.cos(positive) - torch.cos(negative).amax(dim=1)
    elif objective == "met":
        gap = chord(negative).amin(dim=1) - chord(positive)
    else:
        gap = negative.amin(dim=1) - positive
    return (gap < margin).float().mean(dim=1)


def chord(angle: Tensor) -> Tensor:
    """The distance of unit vectors at an angle."""
    return 2 * torch.sin(angle / 2).abs()


def hardest_share(negative_mean: float, temperature: float, draws: Draws) -> float:
    """Figure 3: the mean share of the hardest negative in the softmax over negatives."""
    logits = torch.cos(negative_mean + NEGATIVE_SPREAD * draws.negative) / temperature
    return float(torch.softmax(logits, dim=1).amax(dim=1).mean())


def ratio(objective: Objective, positive: Tensor, negative: Tensor) -> Tensor:
    """Figure 4: the ratio of ``arccon``, ``met`` or ``mat`` at angles to the positive and to the negative."""
    if objective == "arccon":
        return torch.sin(positive + DEFAULT_MARGIN["arccon"]) / torch.sin(positive) + 0 * negative
    if objective == "met":
        return chord(negative) / chord(positive)
    return torch.sin(negative) / torch.sin(positive)


def occurs(objective: Objective, positive: Tensor, negative: Tensor, temperature: float = 0.05) -> Tensor:
    """Whether training meets these angles: the positive is nearer, and the gradient is not dissipated."""
    margin = DEFAULT_MARGIN[objective]
    if objective == "arccon":
        gap = (torch.cos(negative) - torch.cos(positive + margin)) / temperature + math.log(BATCH - 1)
        active = torch.sigmoid(gap) >= 0.01
    else:
        measure = chord if objective == "met" else (lambda angle: angle)
        active = measure(negative) - measure(positive) < margin
    return active & (positive <= negative)


def trained_similarities(
    loss: GradientParadigmLoss,
    steps: Iterable[int],
    *,
    rows: int = 256,
    dim: int = 32,
    noise: float = 0.6,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Figure 5 without a model: free vectors, crowded together at first, trained under the loss on two noisy views.

    Returns the similarities with negatives (rows · (rows − 1),) and with positives (rows,) after the last of ``steps``.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    table = nn.Parameter(normal(rows, dim) + 1.5 * normal(1, dim))
    optimizer = torch.optim.Adam([table], lr=0.02)
    for _ in steps:
        optimizer.zero_grad()
        loss(*(table + noise * normal(rows, dim) for _ in range(2))).backward()
        optimizer.step()
    u, v = (normalise(table.detach() + noise * normal(rows, dim)) for _ in range(2))
    s = u @ v.T
    return s[~torch.eye(rows, dtype=torch.bool)], s.diagonal()


# --- Lemma 1 ---------------------------------------------------------------------------------------------------------


def smallest_ratio(positive: float, negative: float, dihedral: float, step: float = 1e-5) -> float:
    """The smallest r with which a step along ``r p − n``, back to unit length, brings the anchor nearer to p.

    By bisection on what a step does to the distance, in float64. ``positive`` and ``negative`` are the angles from the
    anchor to p and to n, ``dihedral`` the angle between the two planes through them and the anchor, all in radians.
    """
    anchor = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    p = torch.tensor([math.sin(positive), 0.0, math.cos(positive)], dtype=torch.float64)
    n = torch.tensor(
        [
            math.sin(negative) * math.cos(dihedral),
            math.sin(negative) * math.sin(dihedral),
            math.cos(negative),
        ],
        dtype=torch.float64,
    )
    before = float((anchor - p).norm())

    def nearer(r: float) -> bool:
        moved = anchor + step * (r * p - n)
        return float((moved / moved.norm() - p).norm()) < before

    low, high = -1e3, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if nearer(middle) else (middle, high)
    return high


def predicted_ratio(positive: float, negative: float, dihedral: float) -> float:
    """The same in the limit of small steps: ``cos α sin θ_n / sin θ_p``."""
    return math.cos(dihedral) * math.sin(negative) / math.sin(positive)
