"""Operators as plain PyTorch, for derivatives that no backend has: second ones, forward mode, ``torch.func``.

They are the reference's equations with the reference's cost: the matrix of similarities is built. What they give can be
differentiated any number of times and transformed at will.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hicl_fast import reference
from hicl_fast.ops.paradigm_settings import Settings
from hicl_fast.ops.problem import Mixing, Problem, sum_type
from hicl_fast.ops.sequences import sequence_of_segments
from hicl_fast.reference.info_nce import Statistics, info_nce_with_statistics
from hicl_fast.reference.paradigm import pair_statistics


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
        target=problem.target,
        temperature=problem.scale.to(device=problem.query.device, dtype=dtype).reciprocal(),
        negatives=problem.negatives,
        hard_negative_weight=problem.hard_negative_weight,
        bank=problem.bank,
        extra_logits=joined,
        query_group=problem.query_group,
        key_group=problem.key_group,
        bank_group=bank_group,
        same_group=problem.same_group,  # type: ignore[arg-type]
        margin=problem.margin,
        symmetric=problem.symmetric,
        reduction=reduction,  # type: ignore[arg-type]
    )


def mixed_logits(problem: Problem, mixing: Mixing, index: Tensor) -> Tensor:
    """The logits (N, m) of mixtures of the keys that ``index`` (N, k) names."""
    return mixed_negatives(problem.query, problem.key, index, mixing.pairs, mixing.alpha) * problem.scale.to(
        device=problem.query.device, dtype=problem.dtype
    )


def hardest_keys(problem: Problem, k: int) -> Tensor:
    """(N, k) int64, the keys that are mixed."""
    has_groups = problem.same_group != "negative"
    _, index = reference.hard_negatives(
        problem.query,
        problem.key,
        k,
        target=problem.target,
        query_group=problem.query_group if has_groups else None,
        key_group=problem.key_group if has_groups else None,
    )
    return index


def mixed_negatives(query: Tensor, bank: Tensor, index: Tensor, pairs: Tensor, alpha: float) -> Tensor:  # (N, m)
    return reference.mixed_negative_logits(query, bank, index, pairs, alpha=alpha, temperature=1.0)


def paradigm(u: Tensor, v: Tensor, settings: Settings) -> Statistics:
    loss = reference.paradigm(
        u,
        v,
        settings.objective,  # type: ignore[arg-type]
        modified=settings.modified,  # type: ignore[arg-type]
        margin=settings.margin,
        temperature=settings.temperature,
        strength=settings.strength,
        dissipation=settings.dissipation,
        weight=settings.weight,
        ratio=settings.ratio,
    )
    unit_u, unit_v = (reference.normalise(x.detach().to(loss.dtype)) for x in (u, v))
    nearest_is_in_view = settings.objective in ("mhe", "vicreg", "barlow_twins") or "gd" in settings.modified
    hardest = pair_statistics(unit_u @ (unit_u if nearest_is_in_view else unit_v).T, 1.0).hardest
    return Statistics(loss, (unit_u * unit_v).sum(dim=1), hardest if settings.knows_hardest else loss.new_empty(0))


def segment_pool(
    segments: Tensor, offsets: Tensor, weights: Tensor | None
) -> Tensor:  # (S, D), (B + 1,), (S,) -> (B, D)
    """:func:`hicl_fast.reference.segment_pool` without its loop over sequences."""
    dtype, num_sequences = sum_type(segments, weights), len(offsets) - 1
    h = segments.to(dtype)
    w = torch.ones_like(h[:, 0]) if weights is None else weights.to(dtype)
    sequence = sequence_of_segments(offsets, len(segments))
    weighted = h.new_zeros(num_sequences, h.shape[1]).index_add(0, sequence, w[:, None] * h)
    total = w.new_zeros(num_sequences).index_add(0, sequence, w)
    is_zero = total == 0
    return torch.where(is_zero[:, None], 0.0, weighted / total.masked_fill(is_zero, 1.0)[:, None]).to(segments.dtype)
