"""The gradient paradigm's passes in chunks of rows: a chunk's similarities (R, N) are the largest thing there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from hicl_fast.ops.common.constants import POWER_FLOOR
from hicl_fast.ops.common.unit_rows import UnitRows, row_dot
from hicl_fast.ops.hard_negatives.torch import COLUMN_MULTIPLE, ROW_MULTIPLE
from hicl_fast.ops.info_nce.torch import CHUNK_BYTES
from hicl_fast.ops.mixed_negatives.torch import add_in_order
from hicl_fast.ops.paradigm.engine import Combination, RowWeights, Statistics, Term, Views

_OTHER_DEVICE_CHUNK_BYTES = 256 << 20


def _softmax(s: Tensor, hardest: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return s.sub_(hardest[:, None]).div_(temperature).exp_(), hardest / temperature


def _power(s: Tensor, hardest: Tensor, exponent: float) -> tuple[Tensor, Tensor]:
    # Divided by the row's largest weight, since the floor's twelfth power is 0 in float32.
    base = hardest.clamp_min(POWER_FLOOR) if exponent >= 0 else torch.full_like(hardest, POWER_FLOOR)
    return s.clamp_min_(POWER_FLOOR).div_(base[:, None]).pow_(exponent), exponent * base.log()


# What each weight is of similarities (R, N), whose diagonal is overwritten afterwards, with their rows' largest (R,)
# and its parameter: (R, N) up to a factor, and the factor's logarithm (R,).
WEIGHTS: dict[str, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {"softmax": _softmax, "power": _power}


def views(u: Tensor, v: Tensor, dtype: torch.dtype) -> Views:
    first, second = UnitRows.of(u, dtype), UnitRows.of(v, dtype)
    return Views(first, second, row_dot(first.rows, second.rows))


def gradient(unit: UnitRows, terms: Sequence[Term]) -> Tensor:
    total = torch.zeros_like(unit.rows)
    for rows, factor, source, target in terms:
        of = rows if source is None else rows[source]
        if target is None:
            total.addcmul_(of, factor[:, None])
        else:
            add_in_order(total, target[:, None], (of * factor[:, None])[:, None])
    return unit.gradient(total)


def statistics(x: Tensor, y: Tensor, temperature: float | None, columns: bool) -> Statistics:
    n = len(x)
    hardest = x.new_empty(n)
    index = torch.empty(n, dtype=torch.int64, device=x.device)
    lse = x.new_empty(n if temperature is not None else 0)
    column_hardest = x.new_full((n if columns else 0,), -torch.inf)
    column_index = torch.zeros_like(column_hardest, dtype=torch.int64)
    for rows, s in _chunks(x, y):
        hardest[rows], index[rows] = s.max(dim=1)
        if columns:
            best, at = s.max(dim=0)
            better = (best > column_hardest) | (best.isnan() & ~column_hardest.isnan())
            column_hardest = torch.where(better, best, column_hardest)
            column_index = torch.where(better, at + rows.start, column_index)
        if temperature is not None:
            lse[rows] = torch.logsumexp(s.div_(temperature), dim=1)
    return Statistics(hardest, index, lse, column_hardest, column_index)


def combine(x: Tensor, y: Tensor, t: Tensor, weight: str, parameter: float) -> Combination:
    out, hardest, log_total = torch.empty_like(t), x.new_empty(len(x)), x.new_empty(len(x))
    index = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for rows, s in _chunks(x, y):
        hardest[rows], index[rows] = s.max(dim=1)
        weights, log_factor = WEIGHTS[weight](s, hardest[rows], parameter)
        weights.diagonal(rows.start).fill_(0.0)
        total = weights.sum(dim=1)
        log_total[rows] = log_factor + total.log()
        torch.mm(weights, t, out=out[rows]).div_(total[:, None])
    return Combination(out, log_total, hardest, index)


def combine_by(x: Tensor, y: Tensor, t: Tensor, weights: RowWeights) -> tuple[Tensor, Tensor]:
    out, total = torch.empty_like(t), x.new_empty(len(x))
    for rows, s in _chunks(x, y):
        w = weights(s, rows).clone()
        w.diagonal(rows.start).fill_(0.0)
        total[rows] = w.sum(dim=1)
        torch.mm(w, t, out=out[rows])
    return out, total


def _chunks(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows, and their similarities (R, N) with −inf on the diagonal.

    Operands are filled up with zero rows: then columns that are equal come out equal in every bit, wherever they lie.
    """
    n, multiple = len(y), COLUMN_MULTIPLE[x.dtype]
    columns = pad(y, (0, 0, 0, -n % multiple)) if n % multiple else y
    size = CHUNK_BYTES.get(x.device.type, _OTHER_DEVICE_CHUNK_BYTES) // (len(columns) * x.element_size())
    size = max(2 * ROW_MULTIPLE, size // ROW_MULTIPLE * ROW_MULTIPLE)
    for begin in range(0, n, size):
        rows = slice(begin, min(begin + size, n))
        count = rows.stop - begin
        s = (pad(x[rows], (0, 0, 0, -count % ROW_MULTIPLE)) @ columns.T)[:count, :n]
        s.diagonal(begin).fill_(-torch.inf)
        yield rows, s
