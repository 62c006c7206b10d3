"""InfoNCE as plain PyTorch, for derivatives that no backend has: second ones, forward mode, ``torch.func``.

It is the reference's equation with the reference's cost: the matrix of similarities is built. What it gives can be
differentiated any number of times and transformed at will.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hicl_fast.ops.hard_negatives.by_reference import hard_negatives
from hicl_fast.ops.info_nce.problem import FIELDS, Mixing, Problem
from hicl_fast.ops.info_nce.reference import Statistics, info_nce_with_statistics
from hicl_fast.ops.mixed_negatives.by_reference import mixed_negatives

# What the reference is called with as it stands in the problem.
_SHARED = [name for name in FIELDS if name not in ("scale", "precision", "targets")]


def arguments_of(problem: Problem) -> dict[str, Any]:
    """The problem as the reference takes it."""
    scale = problem.scale.to(device=problem.query.device, dtype=problem.dtype)
    arguments = {name: getattr(problem, name) for name in _SHARED} | {"temperature": scale.reciprocal()}
    return arguments if problem.targets is None else arguments | {"target": problem.targets}


def info_nce(problem: Problem, reduction: str, extra_logits: Tensor | None = None) -> Statistics:
    """``extra_logits`` (N, E): further ones than the problem's."""
    extra = [x for x in (problem.extra_logits, extra_logits) if x is not None]
    joined = torch.cat([x.to(problem.dtype) for x in extra], dim=1) if extra else None
    arguments = arguments_of(problem) | {"extra_logits": joined, "reduction": reduction}
    return info_nce_with_statistics(**arguments)


def mixed_logits(problem: Problem, mixing: Mixing, index: Tensor) -> Tensor:
    """The logits (N, m) of mixtures of the keys that ``index`` (N, k) names."""
    return mixed_negatives(problem.query, problem.key, index, mixing.pairs, mixing.alpha) * problem.scale.to(
        device=problem.query.device, dtype=problem.dtype
    )


def hardest_keys(problem: Problem, k: int) -> Tensor:
    """(N, k) int64, the keys that are mixed."""
    _, index = hard_negatives(problem.query, problem.key, k, problem.target, *problem.one_relation())
    return index
