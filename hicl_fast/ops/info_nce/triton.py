"""InfoNCE through kernels/info_nce.py: a chunk of rows of exponentials is the largest thing there ever is.

Where the host knows that no exponential leaves float32's range, one sweep does it: E = exp(ℓ − offset) is stored, and
since ∂loss/∂s = v ⊙ E with v a factor by row, both gradients are library products with v moved to the small operand
(three products, 6N²D operations, no pass over E but its two readings). Else a first sweep takes each row's
log-sum-exp with a true maximum, and a second computes the similarities again (four products).

The positive is kept out of E throughout: its coefficient −Z_neg/Z is applied in float32, row by row.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hicl_fast.kernels import info_nce as kernels
from hicl_fast.kernels.cosine_tile import Similarities, tile_for
from hicl_fast.kernels.info_nce import RowResults
from hicl_fast.kernels.tiles import EXP, HEAVY_EXP, LISTED, NARROW, RULED, STATISTICS, Tile
from hicl_fast.ops.common.constants import Groups, Special
from hicl_fast.ops.common.triton import on_device
from hicl_fast.ops.info_nce.problem import Gradients, Problem, RowStatistics, Wanted
from hicl_fast.ops.info_nce.rows import RowWeights
from hicl_fast.ops.info_nce.triton_operands import Operands
from hicl_fast.ops.info_nce.triton_products import InputGradients

CHUNK_BYTES = 1 << 30  # of stored gradients of the similarities, unless that makes chunks too low
MIN_CHUNK_ROWS = 2048  # below that, reading and writing dK̂ once a chunk takes longer than its product
MOST_CHUNK_BYTES = 4 << 30  # never more, but for a single tile's rows: 2048 rows of a million 16-bit columns
_ALIGNMENT = 64  # columns; the library's fast products want rows that begin at a multiple of 16 bytes

# Spread of the logits, 2 · scale and what rules add, up to which one offset serves all rows: exponentials from
# e^−72 to e^48 leave room to float32's e^±87 for sums over columns (e^17 = 24 million) and factors by row.
MAX_SPREAD = 120.0
_LOWEST_EXPONENT = -72.0

_FLOAT16_AMPLITUDE = 2.0**14  # float16 reaches 2^16: what is stored in it is scaled to fill it


def forward(problem: Problem, row_weight: float, wanted: Wanted) -> tuple[RowStatistics, Gradients]:
    with _running(problem, wanted) as sweeps:
        if any(wanted) and sweeps.offset is not None:
            return sweeps.once(row_weight, sweeps.offset)
        return sweeps.twice(row_weight)


def backward(
    problem: Problem, negative_lse: Tensor, column_lse: Tensor, loss_grad: Tensor, wanted: Wanted
) -> Gradients:
    with _running(problem, wanted) as sweeps:
        _, weights = sweeps.loss(negative_lse, column_lse, loss_grad.to(torch.float32).contiguous())
        return sweeps.gradients(negative_lse, column_lse, weights)


def log_sum_exp_backward(problem: Problem, negative_lse: Tensor, weights: RowWeights, wanted: Wanted) -> Gradients:
    with _running(problem, wanted) as sweeps:
        return sweeps.gradients(negative_lse, negative_lse.new_empty(0), weights.contiguous())


@contextlib.contextmanager
def _running(problem: Problem, wanted: Wanted) -> Iterator[_Sweeps]:
    with on_device(problem.query):
        yield _Sweeps(Operands(problem, wanted))


@dataclass
class _Stored:
    """How the second sweep stores ∂loss/∂ℓ: divided by ``weight``."""

    weight: Tensor  # (N,)
    row_factor: Tensor  # (N,) weight times scale, that makes ∂loss/∂s of it
    query_factor: Tensor  # (N,) of the unit query rows in the columns' product
    column_factor: Tensor  # (1,) that undoes both in the columns' gradients
    by_column: tuple[Tensor, Tensor] | None = None  # offset and factor, (M,) each
    by_row: tuple[Tensor, Tensor] | None = None  # offset and factor, (N,) each; None: exp(ℓ − lse) as it is
    positives_share: Tensor | None = None  # (N,)


@dataclass(frozen=True)
class _Tiling:
    """A tile, and where the tiles of each kind of column are among all column tiles."""

    tile: Tile
    columns: list[slice]

    @property
    def num_column_tiles(self) -> int:
        return self.columns[-1].stop


class _Sweeps:
    def __init__(self, operands: Operands) -> None:
        self.operands, self.wanted = operands, operands.wanted
        self.problem, self.scale = operands.problem, operands.scale
        has_own = any(kind.rules.special == Special.OWN_NEGATIVE for kind in operands.kinds)
        heavy = HEAVY_EXP if has_own or self.wanted.scale or operands.has_rules else EXP
        self.exp = self._tiling(LISTED if operands.has_lists else heavy)
        self.narrow = self._tiling(RULED if operands.has_rules else NARROW)
        self.sums = self._tiling_of_sums()
        self.widths = [-(-kind.count // _ALIGNMENT) * _ALIGNMENT for kind in operands.kinds]
        extra = self.problem.extra_logits
        # −inf leaves a column out; +inf is as little a logit as NaN.
        extra = None if extra is None else extra.detach().to(torch.float32)
        self.extra_logits = None if extra is None else extra.masked_fill(extra == torch.inf, torch.nan)

    def _tiling_of_sums(self) -> _Tiling:
        """With a limit that of the gradients, so that both sweeps round alike and leave out the same columns."""
        if self.problem.symmetric:
            return self.narrow
        if self.operands.has_several_positives:
            return self._tiling(RULED)
        return self.exp if self.operands.has_rules else self._tiling(STATISTICS)

    def _tiling(self, use: str) -> _Tiling:
        operands = self.operands
        multiplied = [operands.query.operand, *(kind.vectors.operand for kind in operands.kinds)]
        tile = tile_for(multiplied, operands.precision, use)
        ends = list(itertools.accumulate(-(-kind.count // tile.cols) for kind in operands.kinds))
        return _Tiling(tile, [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)])

    @property
    def offset(self) -> float | None:
        """What is subtracted from every logit in the single sweep; None where it takes two."""
        problem = self.problem
        needs_two = problem.symmetric or self.operands.has_several_positives or self.extra_logits is not None
        if needs_two or self.operands.dtype == torch.float16 or problem.scale.device.type != "cpu":
            return None
        added = [bound for kind in self.operands.kinds for bound in kind.rules.added]
        scale, most = float(problem.scale), max(added)
        spread = 2 * scale + most - min(added)
        if not spread <= MAX_SPREAD:
            return None
        # The nearer to the largest logit the better: exponentials of small numbers are the most exact.
        return scale + most - max(0.0, spread + _LOWEST_EXPONENT)

    def chunks(self) -> list[slice]:
        num_rows = self.operands.num_rows
        row_bytes = sum(self.widths) * self.operands.query.x.element_size()
        size = chunk_rows(row_bytes, self.exp.tile.rows)
        return [slice(begin, min(begin + size, num_rows)) for begin in range(0, num_rows, size)]

    # --- one sweep ---------------------------------------------------------------------------------------------------

    def once(self, row_weight: float, offset: float) -> tuple[RowStatistics, Gradients]:
        operands, scale = self.operands, self.scale
        of_rows = RowResults.unknown(operands.positive, wants_scale=self.wanted.scale)
        derivative = operands.margin_derivative if isinstance(operands.margin_derivative, Tensor) else None
        gradients = InputGradients(operands)
        buffers = self._buffers()
        for rows in self.chunks():
            stored, partials = self._exponentials(rows, offset, buffers, amplitude=1.0)
            scaled_query = kernels.exp_rows(
                partials, operands.with_margin[rows], None if derivative is None else derivative[rows],
                scale, offset, row_weight, operands.query[rows], rows, of_rows,
            )  # fmt: skip
            gradients.add(rows, stored, of_rows.factor[rows], scaled_query, of_rows.coefficient[rows])

        loss = of_rows.loss
        statistics = RowStatistics(loss, of_rows.negative_lse, loss.new_empty(0), operands.positive, of_rows.hardest)
        columns = gradients.columns(scale, of_rows.coefficient)  # which the scaled rows are without
        scale_grad = None if of_rows.scale_gradient is None else of_rows.scale_gradient.sum()
        return statistics, self._gradients(query=gradients.query, scale=scale_grad, **columns)

    def _exponentials(
        self, rows: slice, offset: Tensor | float, buffers: list[Tensor], amplitude: float
    ) -> tuple[list[Tensor], Tensor]:
        """The chunk's exponentials by kind of column, and their sums (3, column tiles, R)."""
        partials = self.scale.new_empty(len(kernels.EXP_PLANES), self.exp.num_column_tiles, rows.stop - rows.start)
        stored = self._places(rows, buffers)
        for i, similarities, tiles in self._launches(rows, self.exp):
            kernels.exp_similarities(
                similarities, self.scale, offset[rows] if isinstance(offset, Tensor) else offset, stored[i], partials[:, tiles],
                amplitude=amplitude, wants_dot=self.wanted.scale,
            )  # fmt: skip
        return stored, partials

    def _launches(self, rows: slice, tiling: _Tiling) -> Iterator[tuple[int, Similarities, slice]]:
        """A chunk against each kind of column that has any: which, what is launched, and its column tiles."""
        query, precision, limit = self.operands.query[rows], self.operands.precision, self.operands.limit
        for i, (kind, tiles) in enumerate(zip(self.operands.kinds, tiling.columns, strict=True)):
            if kind.count:
                yield i, Similarities(query, kind.vectors, kind.rules, rows, tiling.tile, precision, limit), tiles

    def _places(self, rows: slice, buffers: list[Tensor]) -> list[Tensor]:
        """Where the chunk's gradients go, (R, C) for each kind of column."""
        num_rows = rows.stop - rows.start
        return [buffer[:num_rows, : kind.count] for buffer, kind in zip(buffers, self.operands.kinds, strict=True)]

    # --- two sweeps --------------------------------------------------------------------------------------------------

    def twice(self, row_weight: float) -> tuple[RowStatistics, Gradients]:
        operands = self.operands
        negative_lse, column_lse, hardest, shift = self.statistics()
        loss, weights = self.loss(negative_lse, column_lse, row_weight)
        if operands.has_several_positives:
            loss += shift / operands.num_positives
        statistics = RowStatistics(loss, negative_lse, column_lse, operands.positive, hardest)
        return statistics, self.gradients(negative_lse, column_lse, weights)

    def statistics(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The first sweep: log-sum-exps (N,) and (M,) or (0,), the hardest negatives' similarities (N,), shifts (N,).

        A shift is how far all positives' logits lie below the target's, where there are several.
        """
        operands, problem = self.operands, self.problem
        negative_lse, hardest = torch.empty_like(operands.positive), torch.empty_like(operands.positive)
        shift = torch.empty_like(operands.positive)
        column_lse = negative_lse.new_empty(operands.keys.count if problem.symmetric else 0)
        for rows in self.chunks():
            partials, column_partials = self._statistics_of(rows)
            plane = dict(zip(kernels.STATISTICS_PLANES, partials, strict=True))
            hardest_of = (plane["hardest"], hardest[rows])
            kernels.log_sums(plane["exp_sum"], plane["max"], negative_lse[rows], hardest_of)
            if operands.has_several_positives:
                shift[rows] = -self._of_kinds_with_positives(plane["positives_shift"])
            if column_partials is not None:
                kernels.log_sums(*column_partials, column_lse, adds=rows.start > 0)
        if self.extra_logits is not None:
            negative_lse = torch.logaddexp(negative_lse, self.extra_logits.logsumexp(dim=1))
        return negative_lse, column_lse, hardest, shift

    def _statistics_of(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Sums by row (4, column tiles, R), and by column (2, row tiles, M) if the loss is symmetric."""
        num_rows = rows.stop - rows.start
        tiling, by_column = self.sums, None
        if self.problem.symmetric:
            row_tiles = -(-num_rows // tiling.tile.rows)
            by_column = self.scale.new_empty(2, row_tiles, self.operands.keys.count)
        partials = self.scale.new_empty(len(kernels.STATISTICS_PLANES), tiling.num_column_tiles, num_rows)
        positive_logit = self.operands.positive_logit[rows] if self.operands.has_several_positives else None
        for _, similarities, tiles in self._launches(rows, tiling):
            kernels.statistics(similarities, self.scale, positive_logit, partials[:, tiles], by_column)
        return partials, by_column

    def _of_kinds_with_positives(self, by_tile: Tensor) -> Tensor:  # (column tiles, R) -> (R,)
        kinds = zip(self.operands.kinds, self.sums.columns, strict=True)
        with_positives = [tiles for kind, tiles in kinds if kind.rules.groups == Groups.POSITIVES]
        return torch.cat([by_tile[tiles] for tiles in with_positives]).sum(dim=0)

    def loss(self, negative_lse: Tensor, column_lse: Tensor, weight: Tensor | float) -> tuple[Tensor, RowWeights]:
        """Of each row (N,), the shift of several positives left out; and its derivatives times ``weight``, (N,) or one."""
        operands = self.operands
        columns = column_lse if column_lse.numel() else None
        loss, negative, column, positive = kernels.loss_rows(
            negative_lse, columns, operands.with_margin, self.scale, weight
        )
        shift = None
        if operands.has_several_positives:
            shift = weight if isinstance(weight, Tensor) else torch.full_like(loss, weight)
        return loss, RowWeights(negative, positive, column, shift)

    def gradients(self, negative_lse: Tensor, column_lse: Tensor, weights: RowWeights) -> Gradients:
        """The second sweep."""
        operands, scale = self.operands, self.scale
        extra_grad = None
        if self.wanted.extra_logits and self.extra_logits is not None:
            offset = negative_lse.masked_fill(negative_lse == -torch.inf, 0.0)
            extra_grad = (self.extra_logits - offset[:, None]).exp_() * weights.negative[:, None]
        if not (self.wanted.query or self.wanted.key or self.wanted.negatives or self.wanted.scale):
            return self._gradients(extra_logits=extra_grad)

        target_weight = weights.positive
        if weights.column is not None:
            how = self._summed((negative_lse, weights.negative), (column_lse, weights.column), None)
        elif weights.shift is not None:
            target_weight = target_weight + (1 - 1 / operands.num_positives) * weights.shift
            how = self._summed((negative_lse, weights.negative), None, weights.shift / operands.num_positives)
        else:
            how = self._factored(weights.negative)
        coefficient = target_weight * scale
        if isinstance(operands.margin_derivative, Tensor):
            coefficient *= operands.margin_derivative

        gradients = InputGradients(operands)
        scale_grad = torch.dot(target_weight, operands.with_margin).reshape(1) if self.wanted.scale else None
        buffers = self._buffers()
        for rows in self.chunks():
            stored, dot = self._similarity_gradients(rows, how, negative_lse, buffers)
            if scale_grad is not None:
                scale_grad += torch.mv(dot, how.weight[rows]).sum()
            query = operands.query[rows]
            scaled_query = operands.row_kernels.scale_rows(query, how.query_factor[rows])
            gradients.add(rows, stored, how.row_factor[rows], scaled_query, coefficient[rows])
        columns = gradients.columns(how.column_factor, coefficient)
        return self._gradients(query=gradients.query, extra_logits=extra_grad, scale=scale_grad, **columns)

    def _factored(self, weight: Tensor) -> _Stored:
        """What is stored is exp(ℓ − negative_lse), at most 1; ``weight`` (N,) makes ∂loss/∂ℓ of it."""
        row_factor = weight * self.scale
        if self.operands.dtype != torch.float16:
            return _Stored(weight, row_factor, weight, self.scale)
        amplitude = _FLOAT16_AMPLITUDE
        largest = weight.abs().amax().clamp_min(torch.finfo(torch.float32).tiny * amplitude**2)
        undo = self.scale * largest / amplitude**2
        return _Stored(weight / amplitude, row_factor / amplitude, weight * (amplitude / largest), undo)

    def _summed(
        self, by_row: tuple[Tensor, Tensor], by_column: tuple[Tensor, Tensor] | None, positives_share: Tensor | None
    ) -> _Stored:
        """What is stored is ∂loss/∂ℓ itself, since it is a sum; in float16, scaled by its bound."""
        ones = torch.ones_like(by_row[1])
        if self.operands.dtype != torch.float16:
            return _Stored(ones, self.scale.expand_as(ones), ones, self.scale, by_column, by_row, positives_share)
        terms = [by_row[1], positives_share, None if by_column is None else by_column[1]]
        bound = torch.stack([x.abs().amax() for x in terms if x is not None]).sum()
        bound = bound.clamp_min(torch.finfo(torch.float32).tiny * _FLOAT16_AMPLITUDE)
        to_fill = _FLOAT16_AMPLITUDE / bound
        undo = bound.reshape(1) / _FLOAT16_AMPLITUDE
        return _Stored(
            undo.expand_as(ones),
            (undo * self.scale).expand_as(ones),
            ones,
            undo * self.scale,
            None if by_column is None else (by_column[0], by_column[1] * to_fill),
            (by_row[0], by_row[1] * to_fill),
            None if positives_share is None else positives_share * to_fill,
        )

    def _similarity_gradients(
        self, rows: slice, how: _Stored, negative_lse: Tensor, buffers: list[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """The chunk's stored gradients by kind of column, and Σ s · what is stored (column tiles, R)."""
        if how.by_row is None:
            amplitude = _FLOAT16_AMPLITUDE if self.operands.dtype == torch.float16 else 1.0
            stored, partials = self._exponentials(rows, negative_lse, buffers, amplitude)
            dot = partials[kernels.EXP_PLANES.index("dot")]
            return stored, dot if amplitude == 1.0 else dot * amplitude
        stored = self._places(rows, buffers)
        dot = self.scale.new_empty(self.narrow.num_column_tiles, rows.stop - rows.start)
        by_row = (how.by_row[0][rows], how.by_row[1][rows])
        share = None if how.positives_share is None else how.positives_share[rows]
        for i, similarities, tiles in self._launches(rows, self.narrow):
            kernels.similarity_gradients(
                similarities, self.scale, by_row, how.by_column, share, stored[i], dot[tiles],
                wants_dot=self.wanted.scale,
            )  # fmt: skip
        return stored, dot

    # --- both --------------------------------------------------------------------------------------------------------

    def _buffers(self) -> list[Tensor]:
        chunks = self.chunks()
        num_rows = chunks[0].stop
        return [self.operands.query.x.new_empty(num_rows, width) for width in self.widths]

    def _gradients(self, *, scale: Tensor | None = None, **found: Tensor | None) -> Gradients:
        """Those that were found, by name, and an empty tensor for each of the others."""
        found["scale"] = None if scale is None else scale.reshape(())
        nothing = self.scale.new_empty(0)
        return Gradients(*(nothing if (x := found.get(name)) is None else x for name in Gradients._fields))


def chunk_rows(row_bytes: int, tile_rows: int) -> int:
    """How many rows are swept at a time where a row's stored gradients take ``row_bytes``: whole tiles, at least one."""
    num_rows = max(CHUNK_BYTES // row_bytes, min(MIN_CHUNK_ROWS, MOST_CHUNK_BYTES // row_bytes))
    return max(num_rows // tile_rows, 1) * tile_rows
