"""Row statistics as plain PyTorch, for derivatives that no backend has: second ones, forward mode, ``torch.func``."""

from __future__ import annotations

from hicl_fast.ops.info_nce.by_reference import arguments_of
from hicl_fast.ops.info_nce.problem import Problem
from hicl_fast.ops.log_sum_exp import reference


def log_sum_exp(problem: Problem) -> reference.RowLogits:
    arguments = arguments_of(problem)
    del arguments["symmetric"]
    rows = reference.log_sum_exp(**arguments)
    if problem.target_offsets is None:
        return rows
    first = problem.target_offsets[:-1]  # a problem's positive, of the row's several
    return rows._replace(positive=rows.positive[first], similarity=rows.similarity[first])
