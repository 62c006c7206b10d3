"""Hard negatives in plain PyTorch: chunks of rows against chunks of columns, and the k best of each row so far."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from hicl_fast.ops.common.numbers import sum_type
from hicl_fast.ops.common.unit_rows import UnitRows

CHUNK_ROWS, CHUNK_COLUMNS = 1024, 2048
CHUNK_BYTES = 32 << 20  # of a chunk's rows, in the type of the sums

# Products of these multiples, all of one width, come out equal in every bit where columns are equal, wherever they lie:
# a BLAS treats what is left over at the edges of its tiles, and single rows, with code of their own. Its tiles are 12 or
# 24 doubles wide on some processors.
ROW_MULTIPLE = 8
COLUMN_MULTIPLE = {torch.float32: 64, torch.float64: 192}


def forward(
    query: Tensor,  # (N, D)
    key: Tensor,  # (M, D)
    k: int,
    target: Tensor | None,  # (N,) int64
    query_group: Tensor | None,  # (N,) int64
    key_group: Tensor | None,  # (M,) int64
    exclude_target: bool,
) -> tuple[Tensor, Tensor]:  # (N, k), (N, k) int64
    n, device = query.shape[0], query.device
    dtype = sum_type(query, key)
    similarity = torch.empty(n, k, dtype=dtype, device=device)
    index = torch.empty(n, k, dtype=torch.int64, device=device)
    if exclude_target and target is None:
        target = torch.arange(n, device=device)
    per_chunk = CHUNK_BYTES // (query.shape[1] * dtype.itemsize)
    multiple = COLUMN_MULTIPLE[dtype]
    most = max(multiple, min(CHUNK_COLUMNS, per_chunk) // multiple * multiple)
    num_rows = max(ROW_MULTIPLE, min(CHUNK_ROWS, per_chunk))
    for first in range(0, n, num_rows):
        rows = slice(first, min(first + num_rows, n))
        q = _unit_rows(query[rows], dtype, _rounded_up(rows.stop - first, ROW_MULTIPLE))
        value = similarity.new_full((rows.stop - first, k), -torch.inf)
        at = index.new_full(value.shape, -1)
        for new, columns, width in _chunks(key.shape[0], multiple, most):
            s = (q @ _unit_rows(key[columns], dtype, width).T)[
                : len(value), new - columns.start : columns.stop - columns.start
            ]
            numbers = torch.arange(new, columns.stop, device=device)
            if exclude_target and target is not None:
                s = s.masked_fill(target[rows, None] == numbers, -torch.inf)
            if query_group is not None and key_group is not None:
                s = s.masked_fill(query_group[rows, None] == key_group[new : columns.stop], -torch.inf)
            value, at = _merge(value, at, *_largest(s, new, k))
        similarity[rows], index[rows] = value, at.masked_fill(value == -torch.inf, -1)
    return similarity, index


def _largest(s: Tensor, first: int, k: int) -> tuple[Tensor, Tensor]:  # (R, C) -> (R, min(k, C)) twice
    """The largest values and their columns, counted from ``first``, by rising column; of equal ones the first."""
    count = s.shape[1]
    columns = torch.arange(count, device=s.device)
    if k < count:
        order = s.masked_fill(s.isnan(), torch.inf)
        bound = order.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)  # topk breaks ties as it likes
        above, equal = order > bound, order == bound
        room = k - above.sum(dim=1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(dim=1) <= room))
        columns = columns.masked_fill(~chosen, count).topk(k, dim=1, largest=False, sorted=True).values
        return s.gather(1, columns), columns + first
    return s, (columns + first).expand_as(s)


def _merge(value: Tensor, at: Tensor, new_value: Tensor, new_at: Tensor) -> tuple[Tensor, Tensor]:  # (R, k), ...
    """The best k of both, in order. The new columns all come after the old ones, so that a stable sort breaks ties."""
    k = value.shape[1]
    best = torch.cat((value, new_value), dim=1).sort(dim=1, descending=True, stable=True)
    return best.values[:, :k], torch.cat((at, new_at), dim=1).gather(1, best.indices[:, :k])


def _chunks(count: int, multiple: int, most: int) -> Iterator[tuple[int, slice, int]]:
    """Columns in chunks of one width; the last is moved back to end where the columns end.

    Yields the first column that no chunk before had, the chunk, and the width to which it is filled up.
    """
    fits = count <= most and (count % multiple == 0 or count < multiple)
    parts = 1 if fits else max(2, -(-count // most))
    width = _rounded_up(-(-count // parts), multiple)
    for first in range(0, count, width):
        yield first, slice(max(0, min(first, count - width)), min(first + width, count)), width


def _unit_rows(x: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """Unit rows in the type of the sums, filled up with zero rows."""
    return pad(UnitRows.of(x, dtype).rows, (0, 0, 0, count - len(x)))


def _rounded_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
