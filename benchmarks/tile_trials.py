"""What each use of a tile launches, at the size that is timed, and how far its results are from float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hicl_fast.kernels import hard_negatives, info_nce, products
from hicl_fast.kernels.cosine_tile import Similarities, tile_for
from hicl_fast.kernels.device import architecture, operand_of
from hicl_fast.kernels.tiles import (
    EXP,
    HARD_NEGATIVES,
    HEAVY_EXP,
    LISTED,
    NARROW,
    PARADIGM,
    PARADIGM_COLUMNS,
    PRODUCT,
    RULED,
    STATISTICS,
    Tile,
    similarity_tile,
)
from report import Wrong
from torch import Tensor

from hicl_fast import reference
from hicl_fast.ops.common.constants import NORM_FLOOR, Groups, Special
from hicl_fast.ops.common.row_kernels import row_kernels
from hicl_fast.ops.hard_negatives.triton import unpacked
from hicl_fast.ops.info_nce.problem import KindOfColumn
from hicl_fast.ops.paradigm.triton import Sweep

SCALE = 20.0
OFFSET = 5.0  # of the exponentials: the logits of most pairs are not far from it
LIMIT = 0.3  # of the similarity, beyond which a column is left out: one of some hundred
SHARE = 0.5  # of a further positive
OF_A_GROUP = 3  # rows, and columns
LISTED_COLUMNS = 2  # of each row
K = 10  # hard negatives
CHECKED = 256  # rows, and columns
FLOAT32_SHARE = 4  # one row of so many is taken where each thread multiplies for itself, which is slow

STORED_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SUMS_TOLERANCE = {"16 bit": 1e-4, "fp32": 1e-4, "tf32": 5e-3}

Found = dict[str, tuple[Tensor, Tensor, float]]  # what was got, what is exact, the relative error that is allowed


@dataclass(frozen=True)
class Trial:
    """One use, ready to be launched under any tile."""

    operand: str
    aligned: bool  # whether the table is asked for operands whose rows begin at multiples of 16 bytes
    now: Tile  # the table's
    size: tuple[int, int, int]  # rows, columns, dimensions
    step: Callable[[Tile], Callable[[], object]]  # makes room, without what was there before, and gives what launches
    found: Callable[[], Found]  # of the last launch
    product: Callable[[], object]  # the same product alone, with PyTorch's BLAS


def error_of(found: Found) -> float:
    """The largest relative error, in norm.

    Raises:
        Wrong: one is larger than is allowed.
    """
    errors = {}
    for name, (got, exact, allowed) in found.items():
        errors[name] = float((got.double() - exact).norm() / exact.norm())
        if not errors[name] <= allowed:
            raise Wrong(f"{name}: relative error {errors[name]:.1e} against float64, {allowed:.0e} is allowed")
    return max(errors.values())


# --- InfoNCE ---------------------------------------------------------------------------------------------------------


@dataclass
class InfoNCE:
    """Rows against keys under rules, and what the kernels leave of them: sums by tile, and what is stored."""

    query: Tensor
    key: Tensor
    precision: str
    groups: Groups = Groups.ORDINARY
    limited: bool = False
    listed: bool = False
    left: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        normalise = row_kernels(self.query.device).normalise
        self.rows, self.keys = (normalise(x, NORM_FLOOR) for x in (self.query, self.key))
        self.row_group, self.col_group = (self._every(len(x)) // OF_A_GROUP for x in (self.query, self.key))
        has_groups = self.groups != Groups.ORDINARY
        self.columns = KindOfColumn(
            "key",
            self.key,
            wants_gradient=False,
            special=Special.POSITIVE,
            special_column=self._every(len(self.query)),
            groups=self.groups,
            query_group=self.row_group[:, None] if has_groups else None,
            group=self.col_group[:, None] if has_groups else None,
            left_out=self.lists.flatten() if self.listed else None,
            left_out_offsets=LISTED_COLUMNS * self._every(len(self.query) + 1) if self.listed else None,
        ).contiguous()
        self.limit = self._constant(len(self.query), LIMIT) if self.limited else None
        self.scale = self._constant(1, SCALE)
        self.offsets = {side: self._constant(len(x), OFFSET) for side, x in (("row", self.query), ("col", self.key))}
        self.ones = {side: torch.ones_like(x) for side, x in self.offsets.items()}

    def _every(self, count: int) -> Tensor:
        return torch.arange(count, device=self.query.device)

    def _constant(self, count: int, value: float) -> Tensor:
        return torch.full((count,), value, device=self.query.device)

    @functools.cached_property
    def lists(self) -> Tensor:
        """The columns that a row is without, (R, LISTED_COLUMNS)."""
        after = torch.arange(1, LISTED_COLUMNS + 1, device=self.query.device)
        return (self._every(len(self.query))[:, None] + after) % len(self.key)

    @functools.cached_property
    def stored(self) -> Tensor:  # (R, C), for all tiles in turn
        return torch.empty(len(self.query), len(self.key), dtype=self.query.dtype, device=self.query.device)

    def similarities(self, tile: Tile) -> Similarities:
        every = slice(0, len(self.query))
        return Similarities(self.rows, self.keys, self.columns, every, tile, self.precision, self.limit)

    def sums(self, planes: int, tile: Tile, *, by_column: bool = False) -> Tensor:
        """Of each tile, (planes, column tiles, R) or (planes, row tiles, C)."""
        ours, size, others = len(self.query), tile.cols, len(self.key)
        if by_column:
            ours, size, others = others, tile.rows, ours
        return torch.full((planes, -(-others // size), ours), math.nan, device=self.query.device)

    # What is launched.

    def exp(self, tile: Tile, *, wants_dot: bool) -> Callable[[], None]:
        similarities, sums = self.similarities(tile), self.sums(len(info_nce.EXP_PLANES), tile)
        self.stored.fill_(math.nan)

        def launch() -> None:
            info_nce.exp_similarities(
                similarities, self.scale, self.offsets["row"], self.stored, sums, amplitude=1.0, wants_dot=wants_dot
            )
            self.left["exp"] = sums

        return launch

    def statistics(self, tile: Tile, *, by_column: bool = False) -> Callable[[], None]:
        similarities, sums = self.similarities(tile), self.sums(len(info_nce.STATISTICS_PLANES), tile)
        of_columns = self.sums(2, tile, by_column=True) if by_column else None
        positive = torch.zeros_like(self.offsets["row"])

        def launch() -> None:
            info_nce.statistics(similarities, self.scale, positive, sums, of_columns)
            self.left["statistics"] = sums
            if of_columns is not None:
                self.left["by column"] = of_columns

        return launch

    def slopes(self, tile: Tile, *, by_column: bool = False) -> Callable[[], None]:
        similarities, dot = self.similarities(tile), self.sums(1, tile)[0]
        of_rows, of_columns = ((self.offsets[side], self.ones[side]) for side in ("row", "col"))
        share = self._constant(len(self.query), SHARE) if self.groups == Groups.POSITIVES else None
        self.stored.fill_(math.nan)

        def launch() -> None:
            info_nce.similarity_gradients(
                similarities, self.scale, of_rows, of_columns if by_column else None, share, self.stored, dot,
                wants_dot=True,
            )  # fmt: skip
            self.left["slopes' dot"] = dot

        return launch

    # What is exact, of some rows and columns.

    def cosines(self, rows: slice, cols: slice) -> Tensor:
        return reference.normalise(self.query[rows].double()) @ reference.normalise(self.key[cols].double()).T

    def together(self, rows: slice, cols: slice) -> Tensor:
        """Whether they are of one group."""
        return self.row_group[rows, None] == self.col_group[cols]

    def counts(self, rows: slice, cols: slice) -> Tensor:
        """Whether a column is there for a row."""
        row, col = self._every(len(self.query))[rows], self._every(len(self.key))[cols]
        there = row[:, None] != col
        if self.limited:
            there &= (self.cosines(rows, cols) <= LIMIT) | self.together(rows, cols)
        if self.listed:
            there &= (self.lists[rows, :, None] != col).all(dim=1)
        return there

    def logits(self, rows: slice, cols: slice) -> Tensor:
        return (SCALE * self.cosines(rows, cols)).masked_fill(~self.counts(rows, cols), -math.inf)

    # How far what was left is from it.

    @property
    def of_sums(self) -> float:
        return SUMS_TOLERANCE[operand_of(self.query, self.precision)]

    @property
    def of_stored(self) -> float:
        return max(STORED_TOLERANCE[self.query.dtype], self.of_sums)

    def found_exp(self, *, wants_dot: bool) -> Found:
        exact = (self.logits(FEW, ALL) - OFFSET).exp()
        exp_sum, _, dot = (plane.sum(dim=0)[FEW] for plane in self.left["exp"])
        found = {
            "exponentials": (self.stored[FEW], exact, self.of_stored),
            "their sums": (exp_sum, exact.sum(dim=1), self.of_sums),
        }
        if wants_dot:
            found["their products"] = (dot, (exact * self.cosines(FEW, ALL)).sum(dim=1), self.of_sums)
        return found

    def found_statistics(self) -> Found:
        exp_sum, _, most, _ = self.left["statistics"]
        found = {"log-sum-exp": (_log_sum(exp_sum, most)[FEW], self.logits(FEW, ALL).logsumexp(dim=1), self.of_sums)}
        if "by column" in self.left:
            exact = self.logits(ALL, FEW).logsumexp(dim=0)
            found["log-sum-exp by column"] = (_log_sum(*self.left["by column"])[FEW], exact, self.of_sums)
        return found

    def found_slopes(self, *, by_column: bool = False) -> Found:
        exact = (1 + by_column) * (self.logits(FEW, ALL) - OFFSET).exp()
        if self.groups == Groups.POSITIVES:
            exact -= SHARE * (self.together(FEW, ALL) & self.counts(FEW, ALL))
        dot = (exact * self.cosines(FEW, ALL)).sum(dim=1)
        return {
            "slopes": (self.stored[FEW], exact, self.of_stored),
            "their products": (self.left["slopes' dot"].sum(dim=0)[FEW], dot, self.of_sums),
        }


FEW, ALL = slice(0, CHECKED), slice(None)


def _log_sum(total: Tensor, most: Tensor) -> Tensor:
    """``log Σ_t total_t · exp(most_t)`` over the tiles."""
    return (total.double().log() + most.double()).logsumexp(dim=0)


def both(*launches: Callable[[], None]) -> Callable[[], None]:
    def launch() -> None:
        for one in launches:
            one()

    return launch


def info_nce_trial(
    problem: InfoNCE, use: str, step: Callable[[Tile], Callable[[], None]], found: Callable[[], Found]
) -> Trial:
    operands = [problem.rows.operand, problem.keys.operand]
    return Trial(
        operand_of(problem.query, problem.precision),
        aligned=aligned(operands),
        now=tile_for(operands, problem.precision, use),
        size=(len(problem.query), *problem.key.shape),
        step=step,
        found=found,
        product=lambda: torch.mm(problem.query, problem.key.T, out=problem.stored),
    )


def aligned(operands: list[Tensor]) -> bool:
    return all(x.shape[1] * x.element_size() % 16 == 0 for x in operands)


def exp_trial(use: str, query: Tensor, key: Tensor, precision: str) -> Trial:
    problem, wants_dot = InfoNCE(query, key, precision), use == HEAVY_EXP
    return info_nce_trial(
        problem,
        use,
        lambda tile: problem.exp(tile, wants_dot=wants_dot),
        lambda: problem.found_exp(wants_dot=wants_dot),
    )


def statistics_trial(use: str, query: Tensor, key: Tensor, precision: str) -> Trial:
    problem = InfoNCE(query, key, precision)
    return info_nce_trial(problem, use, problem.statistics, problem.found_statistics)


def listed_trial(use: str, query: Tensor, key: Tensor, precision: str) -> Trial:
    problem = InfoNCE(query, key, precision, listed=True)
    return info_nce_trial(
        problem,
        use,
        lambda tile: both(problem.statistics(tile), problem.exp(tile, wants_dot=False)),
        lambda: problem.found_statistics() | problem.found_exp(wants_dot=False),
    )


def narrow_trial(use: str, query: Tensor, key: Tensor, precision: str) -> Trial:
    """The symmetric loss's two sweeps."""
    problem = InfoNCE(query, key, precision)
    return info_nce_trial(
        problem,
        use,
        lambda tile: both(problem.statistics(tile, by_column=True), problem.slopes(tile, by_column=True)),
        lambda: problem.found_statistics() | problem.found_slopes(by_column=True),
    )


def ruled_trial(use: str, query: Tensor, key: Tensor, precision: str) -> Trial:
    """The two sweeps of a loss with several positives and a limit."""
    problem = InfoNCE(query, key, precision, groups=Groups.POSITIVES, limited=True)
    return info_nce_trial(
        problem,
        use,
        lambda tile: both(problem.statistics(tile), problem.slopes(tile)),
        lambda: problem.found_statistics() | problem.found_slopes(),
    )


# --- the others ------------------------------------------------------------------------------------------------------


def hard_negatives_trial(use: str, query: Tensor, key: Tensor, precision: str) -> Trial:
    problem = InfoNCE(query, key, precision)
    k = min(K, len(key) - 1)
    left: list[Tensor] = []

    def step(tile: Tile) -> Callable[[], None]:
        def launch() -> None:
            left[:] = [hard_negatives.hardest(problem.rows, problem.keys, problem.columns, k, precision, tile)]

        return launch

    def found() -> Found:
        similarity, index = unpacked(left[0][FEW])
        exact = problem.cosines(FEW, ALL)
        best = exact.masked_fill(~problem.counts(FEW, ALL), -math.inf).topk(k, dim=1).values
        return {
            "similarities": (similarity, best, problem.of_sums),
            "those of the columns": (exact.gather(1, index), best, problem.of_sums),
        }

    return info_nce_trial(problem, use, step, found)


def paradigm_trial(use: str, query: Tensor, key: Tensor, precision: str) -> Trial:
    """The statistics by row and by column; or those by row, and softmax weights."""
    by_column = use == PARADIGM_COLUMNS
    x, y = (reference.normalise(side.float()) for side in (query[: len(query) // FLOAT32_SHARE or 1], key))
    every, temperature = slice(0, len(x)), 1 / SCALE
    offset, weights = torch.full((len(x),), OFFSET, device=x.device), torch.empty(len(x), len(y), device=x.device)
    left: dict[str, Tensor] = {}

    def step(tile: Tile) -> Callable[[], None]:
        sweep = Sweep(x, y, tile, precision)
        weights.fill_(math.nan)

        def launch() -> None:
            _, of_columns, partials = sweep.statistics_of(every, temperature, by_column)
            assert partials is not None
            left["lse"] = partials
            if of_columns is not None:
                left["by column"] = of_columns.value
            else:
                _, left["sums"] = sweep.weights_of(every, "softmax", temperature, offset, weights)

        return launch

    def found() -> Found:
        allowed = SUMS_TOLERANCE[operand_of(x, precision)]
        rows, cols = (torch.arange(len(side), device=x.device) for side in (x, y))
        s = (x.double() @ y.double().T).masked_fill(rows[:, None] == cols, -math.inf)
        logits = SCALE * s
        found = {"log-sum-exp": (_log_sum(*left["lse"]), logits.logsumexp(dim=1), allowed)}
        if by_column:
            return found | {"largest by column": (left["by column"].amax(dim=0), s.amax(dim=0), allowed)}
        exact = (logits - OFFSET).exp()
        return found | {
            "weights": (weights, exact, allowed),
            "their sums": (left["sums"].sum(dim=0), exact.sum(dim=1), allowed),
        }

    return Trial(
        operand_of(x, precision),
        aligned=aligned([x, y]),
        now=tile_for([x, y], precision, use),
        size=(len(x), len(y), x.shape[1]),
        step=step,
        found=found,
        product=lambda: torch.mm(x, y.T, out=weights),
    )


def product_trial(use: str, query: Tensor, key: Tensor, precision: str) -> Trial:
    """Stored slopes times unit rows."""
    x, y = (reference.normalise(side.float()) for side in (query[: len(query) // FLOAT32_SHARE or 1], key))
    slopes, out = x @ y.T, torch.empty_like(x)
    left: list[Tensor] = []

    def step(tile: Tile) -> Callable[[], None]:
        def launch() -> None:
            left[:] = [products.product(slopes, y, tile=tile)]

        return launch

    return Trial(
        "fp32",
        aligned=False,  # it takes any strides
        now=similarity_tile(architecture(x.device), "fp32", use),
        size=(len(x), x.shape[1], len(y)),
        step=step,
        found=lambda: {"product": (left[0], slopes.double() @ y.double(), SUMS_TOLERANCE["fp32"])},
        product=lambda: torch.mm(slopes, y, out=out),
    )


TRIALS: dict[str, Callable[[str, Tensor, Tensor, str], Trial]] = {
    EXP: exp_trial,
    HEAVY_EXP: exp_trial,
    STATISTICS: statistics_trial,
    RULED: ruled_trial,
    NARROW: narrow_trial,
    LISTED: listed_trial,
    HARD_NEGATIVES: hard_negatives_trial,
    PARADIGM: paradigm_trial,
    PARADIGM_COLUMNS: paradigm_trial,
    PRODUCT: product_trial,
}
