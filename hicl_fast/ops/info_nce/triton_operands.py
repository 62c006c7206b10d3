"""An InfoNCE problem made ready for the kernels: one type of operand, inverse norms, columns with their rules."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from hicl_fast.kernels import launch
from hicl_fast.kernels.launch import Columns, Rows
from hicl_fast.ops.common.constants import ANGLE_CLAMP, NORM_FLOOR
from hicl_fast.ops.common.numbers import scale_on
from hicl_fast.ops.common.precision import float32_products
from hicl_fast.ops.common.row_kernels import row_kernels
from hicl_fast.ops.info_nce.problem import Problem

# Triton's interpreter multiplies bfloat16 as if its bits were integers; the tests mend it, and say so here.
INTERPRETER_KNOWS_BF16 = False

_GROUPS = {"exclude": launch.EXCLUDED, "negative": launch.ORDINARY, "positive": launch.POSITIVES}


class Operands:
    """The problem's tensors as the kernels take them."""

    def __init__(self, problem: Problem, *, for_query_gradient: bool) -> None:
        device = problem.query.device
        self.problem = problem
        self.dtype, self.precision = operand_type(problem)
        self.row_kernels = row_kernels(device)
        self.scale = scale_on(problem.scale, device, torch.float32).reshape(1)
        self.query, _ = self._ready(problem.query, wants_unit=False)
        self.num_rows = problem.query.shape[0]
        rows = torch.arange(self.num_rows, device=device)
        self.target = rows if problem.target is None else problem.target.contiguous()
        self.columns: list[Columns] = []
        self.units: list[Tensor | None] = []  # the columns' unit rows, where the query's gradient is wanted
        self._add_keys(problem, for_query_gradient)
        own = rows if problem.hard_negative_weight else None
        self._add(problem.negatives, for_query_gradient, own, problem.hard_negative_weight)
        self._add(problem.bank, for_query_gradient)

        self.positive = self.row_kernels.positive_similarity(self.query, self.columns[0].vectors, self.target)  # (N,)
        self.with_margin, self.margin_slope = _with_margin(self.positive, problem.margin)

    def _add_keys(self, problem: Problem, wants_unit: bool) -> None:
        vectors, unit = self._ready(problem.key, wants_unit)
        groups, query_group, key_group = launch.ORDINARY, None, None
        if problem.query_group is not None and problem.key_group is not None:
            groups = _GROUPS[problem.same_group]
            query_group, key_group = problem.query_group.contiguous(), problem.key_group.contiguous()
        self.columns.append(Columns(vectors, launch.POSITIVE, self.target, 0.0, groups, query_group, key_group))
        self.units.append(unit)

    def _add(self, x: Tensor | None, wants_unit: bool, own: Tensor | None = None, own_bias: float = 0.0) -> None:
        """Columns beyond the keys; row i's own is column i, if anyone's."""
        if x is None:
            return
        vectors, unit = self._ready(x, wants_unit)
        special = launch.NOTHING if own is None else launch.OWN_NEGATIVE
        self.columns.append(Columns(vectors, special, own, own_bias, launch.ORDINARY, None, None))
        self.units.append(unit)

    def _ready(self, x: Tensor, wants_unit: bool) -> tuple[Rows, Tensor | None]:
        operand = x.detach().to(self.dtype).contiguous()
        unit = torch.empty_like(operand) if wants_unit else None
        return self.row_kernels.normalise(operand, NORM_FLOOR, unit), unit

    @functools.cached_property
    def positive_logit(self) -> Tensor:  # (N,)
        return self.with_margin * self.scale

    @property
    def has_several_positives(self) -> bool:
        return self.columns[0].groups == launch.POSITIVES

    @functools.cached_property
    def num_positives(self) -> Tensor:
        """Keys of the row's group and its target, (N,): by sorting, not by comparing all with all."""
        query_group, key_group = self.columns[0].query_group, self.columns[0].key_group
        if not self.has_several_positives or query_group is None or key_group is None:
            return torch.ones_like(self.positive)
        ordered = key_group.sort().values
        last = torch.searchsorted(ordered, query_group, right=True)
        count = last - torch.searchsorted(ordered, query_group)
        return (count + (key_group[self.target.clamp(0, len(key_group) - 1)] != query_group)).to(torch.float32)

    @functools.cached_property
    def rows_by_target(self) -> tuple[Tensor, Tensor] | None:
        """Rows (N,) ordered by target, and where each key's begin (M + 1,); None where row i's target is key i.

        A key then gathers from its rows in a fixed order; adding them up as they come would not be deterministic.
        """
        if self.problem.target is None:
            return None
        ordered = self.target.sort(stable=True)
        keys = torch.arange(self.columns[0].count + 1, device=self.target.device)
        return ordered.indices, torch.searchsorted(ordered.values, keys)


def operand_type(problem: Problem) -> tuple[torch.dtype, str]:
    """The type that similarities and gradients are multiplied in, and how float32 is: "ieee" or "tf32"."""
    if problem.precision == "float32":
        return torch.float32, "ieee"
    inputs = (problem.query, problem.key, problem.negatives, problem.bank)
    types = [x.dtype for x in inputs if x is not None]
    dtype = functools.reduce(torch.promote_types, types)
    if problem.precision == "bf16" and dtype == torch.float32:
        dtype = torch.bfloat16
    if dtype == torch.bfloat16 and launch.INTERPRETING and not INTERPRETER_KNOWS_BF16:
        dtype = torch.float32
    return dtype, tensor_precision(problem.query) if dtype == torch.float32 else "ieee"


def tensor_precision(x: Tensor) -> str:
    """How the kernels multiply float32 on x's device, following PyTorch's settings: "ieee" or "tf32"."""
    return "tf32" if float32_products(x.device.type) == "tf32" and x.is_cuda else "ieee"


def _with_margin(positive: Tensor, margin: float) -> tuple[Tensor, Tensor | float]:
    """``cos(θ + u)`` and its derivative ``sin(θ + u) / sin θ``, expanded in s = cos θ."""
    if margin == 0.0:
        return positive, 1.0
    limit = 1 - ANGLE_CLAMP
    s = positive.clamp(-limit, limit)
    sine = ((1 - s) * (1 + s)).sqrt()
    slope = math.cos(margin) + s / sine * math.sin(margin)
    return s * math.cos(margin) - sine * math.sin(margin), torch.where(positive.abs() <= limit, slope, 0.0)
