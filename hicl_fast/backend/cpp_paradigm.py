"""The gradient paradigm's two passes through csrc/cpu/paradigm.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from hicl_fast.backend.chunked_paradigm import combine_by
from hicl_fast.ops.paradigm_engine import Combination, Statistics

__all__ = ["combine", "combine_by", "statistics"]  # a function of the user's is Python on every backend


def statistics(x: Tensor, y: Tensor, temperature: float | None, columns: bool) -> Statistics:
    return Statistics(*torch.ops.hicl_fast_cpp.paradigm_statistics(x, y, temperature, columns))


def combine(x: Tensor, y: Tensor, t: Tensor, weight: str, parameter: float) -> Combination:
    return Combination(*torch.ops.hicl_fast_cpp.paradigm_combine(x, y, t, weight, parameter))
