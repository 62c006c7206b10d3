"""The ``cpp`` backend: csrc/cpu, for tensors in host memory."""

from __future__ import annotations

import os

import torch
from torch.utils._python_dispatch import _disable_current_modes

from hicl_fast.ops.backends import extension
from hicl_fast.ops.backends.contract import BackendStatus, Call


def status() -> BackendStatus:
    if extension.FAILURE:
        return BackendStatus("cpp", False, f"{extension.FAILURE}; install a C++ compiler and reinstall hicl_fast", "")
    with _disable_current_modes():  # a trace that is being taken is of the user's program, not of this question
        return BackendStatus("cpp", True, "", f"row kernels for {_row_kernels()}")


def row_kernel_sets() -> list[str]:
    """The sets of row kernels that this processor has the instructions for, narrowest first."""
    return torch.ops.hicl_fast_cpp.capabilities().split()


def _row_kernels() -> str:
    """The set in use: the widest, or what HICL_FAST_CPU asks for."""
    if (asked := os.environ.get("HICL_FAST_CPU")) and asked not in (sets := row_kernel_sets()):
        raise ValueError(f"HICL_FAST_CPU: expected one of {', '.join(sets)}, which this processor has, got {asked!r}")
    return torch.ops.hicl_fast_cpp.capability()


def refusal(call: Call) -> str:
    return "" if call.device_type == "cpu" else f"it takes tensors on the CPU, got {call.device_type}"
