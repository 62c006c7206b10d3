"""InfoNCE as plain PyTorch, for derivatives that no backend has: second ones, forward mode, ``torch.func``.

It is the reference's equation with the reference's cost: the matrix of similarities is built. What it gives can be
differentiated any number of times and transformed at will.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hicl_fast.ops.hard_negatives.by_reference import hard_negatives
from hicl_fast.ops.info_nce.problem import FIELDS, Mixing, Problem
from hicl_fast.ops.info_nce.reference import Statistics, info_nce_with_statistics
from hicl_fast.ops.mixed_negatives.by_reference import mixed_negatives

# What the reference is called with as it stands in the problem.
_SHARED = [name for name in FIELDS if name not in ("query", "key", "scale", "extra_logits", "precision")]


def info_nce(
    problem: Problem, reduction: str, extra_logits: Tensor | None = None, bank_group: Tensor | None = None
) -> Statistics:
    """``extra_logits`` (N, E): further ones than the problem's; ``bank_group`` (B,): groups of its bank's rows."""
    extra = [x for x in (problem.extra_logits, extra_logits) if x is not None]
    dtype = problem.dtype
    joined = torch.cat([x.to(dtype) for x in extra], dim=1) if extra else None
    return info_nce_with_statistics(
        problem.query,
        problem.key,
        temperature=problem.scale.to(device=problem.query.device, dtype=dtype).reciprocal(),
        extra_logits=joined,
        bank_group=bank_group,
        **{name: getattr(problem, name) for name in _SHARED},
        reduction=reduction,  # type: ignore[arg-type]
    )


def mixed_logits(problem: Problem, mixing: Mixing, index: Tensor) -> Tensor:
    """The logits (N, m) of mixtures of the keys that ``index`` (N, k) names."""
    return mixed_negatives(problem.query, problem.key, index, mixing.pairs, mixing.alpha) * problem.scale.to(
        device=problem.query.device, dtype=problem.dtype
    )


def hardest_keys(problem: Problem, k: int) -> Tensor:
    """(N, k) int64, the keys that are mixed."""
    groups = (None, None) if problem.same_group == "negative" else (problem.query_group, problem.key_group)
    _, index = hard_negatives(problem.query, problem.key, k, problem.target, *groups)
    return index
