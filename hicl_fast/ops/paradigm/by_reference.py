"""The gradient paradigm as plain PyTorch, for derivatives that no backend has: second ones, forward mode, ``torch.func``.

It is the reference's equations with the reference's cost: the matrix of similarities is built.
"""

from __future__ import annotations

from torch import Tensor

from hicl_fast.ops.info_nce.reference import Statistics, normalise
from hicl_fast.ops.paradigm import reference
from hicl_fast.ops.paradigm.reference import pair_statistics
from hicl_fast.ops.paradigm.settings import Settings


def paradigm(u: Tensor, v: Tensor, settings: Settings) -> Statistics:
    loss = reference.paradigm(
        u,
        v,
        settings.objective,  # type: ignore[arg-type]
        modified=settings.modified,  # type: ignore[arg-type]
        margin=settings.margin,
        temperature=settings.temperature,
        strength=settings.strength,
        dissipation=settings.dissipation,
        weight=settings.weight,
        ratio=settings.ratio,
    )
    unit_u, unit_v = (normalise(x.detach().to(loss.dtype)) for x in (u, v))
    nearest_is_in_view = settings.objective in ("mhe", "vicreg", "barlow_twins") or "gd" in settings.modified
    hardest = pair_statistics(unit_u @ (unit_u if nearest_is_in_view else unit_v).T, 1.0).hardest
    return Statistics(loss, (unit_u * unit_v).sum(dim=1), hardest if settings.knows_hardest else loss.new_empty(0))
