"""``hicl_fast::hard_negatives``: schema, fake kernel. It has no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hicl_fast.ops.backends import features, registry
from hicl_fast.ops.common.autograd import is_transformed, readable, runs_eagerly, without_autocast
from hicl_fast.ops.common.numbers import sum_type
from hicl_fast.ops.common.shapes import check_shapes
from hicl_fast.ops.hard_negatives import by_reference

_library = torch.library.Library("hicl_fast", "FRAGMENT")
_library.define(
    "hard_negatives(Tensor query, Tensor key, int k, Tensor? target, Tensor? query_group, Tensor? key_group, "
    "bool exclude_target, str backend) -> (Tensor similarity, Tensor index)"
)


def apply(
    query: Tensor,  # (N, D)
    key: Tensor,  # (M, D)
    k: int,
    target: Tensor | None,  # (N,) int64; −1: the row has none
    query_group: Tensor | None,  # (N,) int64
    key_group: Tensor | None,  # (M,) int64
    exclude_target: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # (N, k), (N, k) int64
    backend = registry.choose(
        backend, "hard_negatives", query.device.type, sum_type(query, key), features.of_rows(query, key)
    )
    if is_transformed(query, key):
        _check_target(target, key.shape[0])
        similarity, index = by_reference.hard_negatives(
            query, key, k, target, query_group, key_group, exclude_target=exclude_target
        )
        check_found(index, k)
        return similarity, index
    eager = runs_eagerly(query, key, target, query_group, key_group)
    run = _run if eager else torch.ops.hicl_fast.hard_negatives
    return run(query.detach(), key.detach(), k, target, query_group, key_group, exclude_target, backend)


def _check_target(target: Tensor | None, num_keys: int) -> None:
    """Looks at host memory only: a device is never waited for."""
    if (values := readable(target)) is None:
        return
    low, high = (int(bound) for bound in torch.aminmax(values))
    if low < -1 or high >= num_keys:
        raise ValueError(
            f"target: expected indices of keys, 0 to {num_keys - 1}, or -1 for none, got values from {low} to {high}"
        )


def check_found(index: Tensor, k: int) -> None:
    """A row with too few candidates shows in its last place; a device is not asked."""
    if (places := readable(index)) is None or int(places.min()) >= 0:
        return
    if places.dim() != 2:  # of a batch of calls, whose rows have no numbers
        raise ValueError(f"k: expected at most as many as a row has candidates, got k = {k}")
    row = int((places[:, -1] < 0).nonzero()[0])
    found = int((places[row] >= 0).sum())
    raise ValueError(
        f"k: expected at most as many as a row has candidates; row {row} has {found} outside its target and group, "
        f"got k = {k}"
    )


def _run(
    query: Tensor,
    key: Tensor,
    k: int,
    target: Tensor | None,
    query_group: Tensor | None,
    key_group: Tensor | None,
    exclude_target: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check_target(target, key.shape[0])
    with torch.no_grad(), without_autocast(query.device.type):
        similarity, index = registry.implementation("hard_negatives", backend).forward(
            query, key, k, target, query_group, key_group, exclude_target
        )
    check_found(index, k)
    return similarity, index


def _run_registered(
    query: Tensor,
    key: Tensor,
    k: int,
    target: Tensor | None,
    query_group: Tensor | None,
    key_group: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    groups = {"query_group": (query_group, "N"), "key_group": (key_group, "M")}
    check_shapes("hard_negatives", query=(query, "ND"), key=(key, "MD"), target=(target, "N"), **groups)
    return _run(query, key, k, target, query_group, key_group, *rest)


_library.impl("hard_negatives", _run_registered, "CompositeExplicitAutograd")


@torch.library.register_fake("hicl_fast::hard_negatives", lib=_library)
def _fake(
    query: Tensor,
    key: Tensor,
    k: int,
    target: Tensor | None,
    query_group: Tensor | None,
    key_group: Tensor | None,
    exclude_target: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    similarity = query.new_empty(query.shape[0], k, dtype=sum_type(query, key))
    return similarity, torch.empty_like(similarity, dtype=torch.int64)
