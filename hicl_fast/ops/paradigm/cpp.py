"""The gradient paradigm's passes through csrc/cpu/paradigm.cpp and paradigm_rows.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hicl_fast.ops.common.unit_rows import UnitRows
from hicl_fast.ops.paradigm.engine import Combination, Statistics, Term, Views
from hicl_fast.ops.paradigm.torch import combine_by  # a function of the user's is Python on every backend

__all__ = ["combine", "combine_by", "gradient", "statistics", "views"]


def views(u: Tensor, v: Tensor, dtype: torch.dtype) -> Views:
    unit_u, unit_v, u_factor, v_factor, positive = torch.ops.hicl_fast_cpp.paradigm_views(
        u.to(dtype).contiguous(), v.to(dtype).contiguous()
    )
    return Views(UnitRows(unit_u, u_factor), UnitRows(unit_v, v_factor), positive)


def gradient(unit: UnitRows, terms: Sequence[Term]) -> Tensor:
    rows, factors, sources, targets = zip(*terms, strict=True)
    return torch.ops.hicl_fast_cpp.paradigm_gradient(
        unit.rows,
        unit.factor,
        [x.contiguous() for x in rows],
        [x.to(unit.rows.dtype).contiguous() for x in factors],
        sources,
        targets,
    )


def statistics(x: Tensor, y: Tensor, temperature: float | None, columns: bool) -> Statistics:
    return Statistics(*torch.ops.hicl_fast_cpp.paradigm_statistics(x, y, temperature, columns))


def combine(x: Tensor, y: Tensor, t: Tensor, weight: str, parameter: float) -> Combination:
    return Combination(*torch.ops.hicl_fast_cpp.paradigm_combine(x, y, t, weight, parameter))
