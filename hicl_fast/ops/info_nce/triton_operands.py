"""An InfoNCE problem made ready for the kernels: one type of operand, inverse norms, columns with their rules."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hicl_fast.kernels import rows
from hicl_fast.kernels.rows import Rows
from hicl_fast.ops.common.constants import NORM_FLOOR, Groups, Special
from hicl_fast.ops.common.numbers import scale_on
from hicl_fast.ops.common.row_kernels import row_kernels
from hicl_fast.ops.common.triton import multiplied_as
from hicl_fast.ops.info_nce.problem import KindOfColumn, Problem, Wanted
from hicl_fast.ops.info_nce.rows import limits, with_margin


@dataclass(frozen=True)
class Kind:
    """A kind of column made ready."""

    rules: KindOfColumn
    vectors: Rows  # (C, D)
    unit: Tensor | None  # (C, D) the unit rows, where the query's gradient is wanted

    @property
    def count(self) -> int:
        return self.rules.count


class Operands:
    """The problem's tensors as the kernels take them."""

    def __init__(self, problem: Problem, wanted: Wanted) -> None:
        device = problem.query.device
        self.problem, self.wanted = problem, wanted
        self.dtype, self.precision = multiplied_as(
            problem.precision, problem.query, problem.key, problem.negatives, problem.bank
        )
        self.row_kernels = row_kernels(device)
        self.num_rows = problem.query.shape[0]
        keys, *others = problem.columns(wanted)
        self._begin(keys)
        self.kinds = [self.keys, *map(self._kind, others)]
        self.with_margin, self.margin_derivative = with_margin(self.positive, problem.margin)
        self.limit = limits(problem, self.positive)  # (N,), or None

    def _begin(self, columns: KindOfColumn) -> None:
        """Query, keys, positives and scale: all in one launch where row i's positive is key i."""
        rules, key, query = columns.contiguous(), self._operand(columns.vectors), self._operand(self.problem.query)
        unit = self._unit(key)
        if rules.special_column is None:
            found = rows.prepare(query, key, NORM_FLOOR, unit, self._scale_to_write(query.device))
            self.query, vectors, self.scale = found.query, found.key, found.scale
            self.positive, self.same_index = found.positive, found.index
            rules.special_column = self.same_index
        else:
            self.scale = scale_on(self.problem.scale, query.device, torch.float32).reshape(1)
            self.query = self.row_kernels.normalise(query, NORM_FLOOR)
            vectors = self.row_kernels.normalise(key, NORM_FLOOR, unit)
            self.same_index = torch.arange(self.num_rows, device=query.device)
            self.positive = self.row_kernels.positive_similarity(self.query, vectors, rules.special_column)
        self.target, self.keys = rules.special_column, Kind(rules, vectors, unit)

    def _scale_to_write(self, device: torch.device) -> float | Tensor:
        """The host's number, or the device's (1,)."""
        scale = self.problem.scale
        return float(scale) if scale.device.type == "cpu" else scale_on(scale, device, torch.float32).reshape(1)

    def _kind(self, columns: KindOfColumn) -> Kind:
        rules = columns.contiguous()
        if rules.special != Special.NOTHING and rules.special_column is None:
            rules.special_column = self.same_index
        operand = self._operand(columns.vectors)
        unit = self._unit(operand)
        return Kind(rules, self.row_kernels.normalise(operand, NORM_FLOOR, unit), unit)

    def _operand(self, x: Tensor) -> Tensor:
        return x.detach().to(self.dtype).contiguous()

    def _unit(self, operand: Tensor) -> Tensor | None:
        return torch.empty_like(operand) if self.wanted.query else None

    @functools.cached_property
    def positive_logit(self) -> Tensor:  # (N,)
        return self.with_margin * self.scale

    @property
    def has_rules(self) -> bool:
        """Whether what a tile's end looks at takes registers beyond those of one group for each column."""
        of_kinds = any(kind.rules.hardness or kind.rules.num_relations > 1 for kind in self.kinds)
        return of_kinds or self.limit is not None or self.has_lists

    @property
    def has_lists(self) -> bool:
        return any(kind.rules.left_out is not None for kind in self.kinds)

    @property
    def has_several_positives(self) -> bool:
        return any(kind.rules.groups == Groups.POSITIVES for kind in self.kinds)

    @functools.cached_property
    def num_positives(self) -> Tensor:
        """KindOfColumn of the row's group and its target, (N,): by sorting, not by comparing all with all."""
        count = torch.ones_like(self.positive)
        for kind in self.kinds:
            query_group, group = kind.rules.query_group, kind.rules.group
            if kind.rules.groups != Groups.POSITIVES or query_group is None or group is None:
                continue
            ordered, wanted = group[:, 0].sort().values, query_group[:, 0].contiguous()
            count += torch.searchsorted(ordered, wanted, right=True) - torch.searchsorted(ordered, wanted)
            if kind is self.keys:  # the target may be among them
                count -= (group[self.target.clamp(0, len(group) - 1), 0] == wanted).to(count.dtype)
        return count

    @functools.cached_property
    def rows_by_target(self) -> tuple[Tensor, Tensor] | None:
        """Rows (N,) ordered by target, and where each key's begin (M + 1,); None where row i's target is key i.

        A key then gathers from its rows in a fixed order; adding them up as they come would not be deterministic.
        """
        if self.problem.target is None:
            return None
        ordered = self.target.sort(stable=True)
        keys = torch.arange(self.keys.count + 1, device=self.target.device)
        return ordered.indices, torch.searchsorted(ordered.values, keys)
