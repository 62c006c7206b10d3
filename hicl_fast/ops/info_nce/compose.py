"""How a call of InfoNCE is carried out: by one operator, or by several whose results are put together."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hicl_fast.ops.backends import registry
from hicl_fast.ops.common.autograd import is_transformed, runs_eagerly
from hicl_fast.ops.hard_negatives import operator as hard_negatives
from hicl_fast.ops.info_nce import by_reference
from hicl_fast.ops.info_nce.operator import InfoNCEMean, InfoNCERows, sweep
from hicl_fast.ops.info_nce.problem import NOTHING, Mixing, Problem, Result, Wanted
from hicl_fast.ops.log_sum_exp import operator as log_sum_exp
from hicl_fast.ops.mixed_negatives import operator as mixed_negatives
from hicl_fast.ops.own_negatives.problem import Own


def apply(
    problem: Problem,
    reduction: str,
    backend: str,
    mixing: Mixing | None = None,
    own: Own | None = None,
    *,
    in_batch: bool = True,
) -> Result:
    if problem.symmetric and (own is not None or not in_batch):
        return _average_of_directions(problem, reduction, backend, own, in_batch=in_batch)
    if not in_batch or problem.targets is not None:
        return _of_rows(log_sum_exp.apply(problem, backend, own, in_batch=in_batch), problem, reduction)
    if own is not None:
        problem, hardest = log_sum_exp.with_own_negatives(problem, own, backend)
        result = apply(problem, reduction, backend, mixing)
        return result._replace(hardest=torch.maximum(result.hardest, hardest))
    if is_transformed(*problem.differentiable()):
        return _apply_transformed(problem, reduction, backend, mixing)
    if mixing is not None:
        return _apply_mixing(problem, reduction, backend, mixing)
    if problem.symmetric and not _one_sweep_covers_both_directions(problem):
        return _average_of_directions(problem, reduction, backend)
    backend = registry.choose(backend, "info_nce", problem.query.device.type, problem.dtype, problem.features())
    inputs = problem.differentiable()
    wanted = _wanted(inputs)
    if not runs_eagerly(*inputs):
        return _apply_traced(problem, reduction, wanted, backend)
    if reduction == "none":
        return Result(*InfoNCERows.apply(problem, backend, *inputs)[:3])
    return _apply_mean(problem, reduction, wanted, backend)


def _apply_mean(problem: Problem, reduction: str, wanted: Wanted, backend: str, mixing: Mixing | None = None) -> Result:
    if any(wanted):
        return Result(*InfoNCEMean.apply(problem, mixing, reduction, wanted, backend, *problem.differentiable()))
    return Result(*sweep(problem, reduction, wanted, backend, mixing)[0])


def _apply_traced(problem: Problem, reduction: str, wanted: Wanted, backend: str) -> Result:
    if reduction == "none":
        outputs = torch.ops.hicl_fast.info_nce_rows(*problem.flat(), backend)
    else:
        outputs = torch.ops.hicl_fast.info_nce_mean(*problem.flat(), reduction, list(wanted), backend)
    return Result(*outputs[:3])


def _apply_mixing(problem: Problem, reduction: str, backend: str, mixing: Mixing) -> Result:
    """In the sweep over the similarities where the backend does that; else hard negatives and mixtures come first."""
    chosen = registry.choose(backend, "info_nce", problem.query.device.type, problem.dtype, problem.features())
    inputs = problem.differentiable()
    can_sweep = reduction != "none" and not problem.key_hardness and runs_eagerly(*inputs, mixing.pairs)
    if can_sweep and _mixes_while_sweeping(chosen):
        mixed_negatives.check_indices("pairs", mixing.pairs, mixing.k, "places among the k")
        return _apply_mean(problem, reduction, _wanted(inputs), chosen, mixing)

    problem = _in_type_of_sums(problem)
    query, key = problem.query, problem.key
    _, index = hard_negatives.apply(query, key, mixing.k, problem.target, *problem.one_relation(), True, backend)
    logits = mixed_negatives.apply(query, key, index, mixing.pairs, mixing.alpha, problem.scale, backend)
    if problem.extra_logits is not None:
        logits = torch.cat([problem.extra_logits.to(logits.dtype), logits], dim=1)
    with_mixtures = replace(problem, extra_logits=logits)
    return apply(with_mixtures, reduction, backend)._replace(hard_negatives=index)


def _mixes_while_sweeping(backend: str) -> bool:
    return getattr(registry.implementation("info_nce", backend), "MIXES_WHILE_SWEEPING", False)


def _apply_transformed(problem: Problem, reduction: str, backend: str, mixing: Mixing | None) -> Result:
    registry.choose(backend, "info_nce", problem.query.device.type, problem.dtype, problem.features())  # or its refusal
    problem.check_values()
    index = mixed = None
    if mixing is not None:
        mixed_negatives.check_indices("pairs", mixing.pairs, mixing.k, "places among the k")
        index = by_reference.hardest_keys(problem, mixing.k)
        hard_negatives.check_found(index, mixing.k)
        mixed = by_reference.mixed_logits(problem, mixing, index)
    return Result(*by_reference.info_nce(problem, reduction, mixed), index)


def _one_sweep_covers_both_directions(problem: Problem) -> bool:
    """Columns beyond the keys, several positives, and limits look different from the other side."""
    only_keys = problem.negatives is None and problem.bank is None and problem.extra_logits is None
    return only_keys and problem.same_group != "positive" and not problem.has_limit


def _of_rows(rows: log_sum_exp.Outputs, problem: Problem, reduction: str) -> Result:
    """The loss ``log(1 + e^(negative − positive))`` of rows whose logits are known; of several positives the mean."""
    row = (
        None if problem.targets is None else problem.row_of_targets()
    )  # (T,) of each positive, where there are several
    negative = rows.negative if row is None else rows.negative.index_select(0, row)
    has_negative = negative != -torch.inf
    difference = torch.where(has_negative, negative, 0.0) - rows.positive
    loss = torch.logaddexp(difference, torch.zeros_like(difference))
    loss = torch.where(has_negative, loss, rows.positive - rows.positive)  # 0, or NaN where the input was
    similarity = rows.similarity
    if row is not None and problem.target_offsets is not None:
        loss, similarity = (_mean_by_row(x, row, problem.target_offsets) for x in (loss, similarity))
    if reduction != "none":
        loss = loss.mean() if reduction == "mean" else loss.sum()
    return Result(loss, similarity, rows.hardest)


def _mean_by_row(x: Tensor, row: Tensor, offsets: Tensor) -> Tensor:  # (T,), (T,) int64, (N + 1,) int64 -> (N,)
    count = offsets.diff()
    return x.new_zeros(count.shape[0]).index_add(0, row, x) / count.clamp_min(1)


def _average_of_directions(
    problem: Problem, reduction: str, backend: str, own: Own | None = None, *, in_batch: bool = True
) -> Result:
    forward = replace(_in_type_of_sums(problem), symmetric=False)
    exchanged = replace(
        forward,
        query=forward.key,
        key=forward.query,
        query_group=problem.key_group,
        key_group=problem.query_group,
    )
    if exchanged.query_group is None:  # then nothing is of a row's group
        exchanged = replace(exchanged, key_group=None, negatives_group=None, bank_group=None)
    rows, columns = (apply(one, reduction, backend, None, own, in_batch=in_batch) for one in (forward, exchanged))
    return rows._replace(loss=(rows.loss + columns.loss) / 2)


def _in_type_of_sums(problem: Problem) -> Problem:
    """For inputs that go into two operators: autograd adds their two gradients in this type, and rounds once."""
    dtype, inputs = problem.dtype, ("query", "key", "negatives", "extra_logits")
    rows = [x for x in (problem.query, problem.key, problem.negatives, problem.bank) if x is not None]
    are_bf16 = problem.precision == "default" and all(x.dtype == torch.bfloat16 for x in rows)
    cast = {name: x.to(dtype) for name in inputs if (x := getattr(problem, name)) is not None}
    return replace(problem, **cast, precision="bf16" if are_bf16 else problem.precision)


def _wanted(inputs: tuple[Tensor | None, ...]) -> Wanted:
    if not torch.is_grad_enabled():
        return NOTHING
    return Wanted(*(x is not None and x.requires_grad for x in inputs))
