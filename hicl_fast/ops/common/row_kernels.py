"""Whose kernels do the large-batch path's work by rows: CUDA C++'s where they are built for the device, else Triton's."""

from __future__ import annotations

from types import ModuleType

import torch

from hicl_fast.kernels import rows
from hicl_fast.ops.backends import cuda, registry
from hicl_fast.ops.common import cuda_rows


def row_kernels(device: torch.device) -> ModuleType:
    """A module with ``normalise``, ``scale_rows``, ``positive_similarity`` and ``gradient``, as in kernels/rows.py."""
    return cuda_rows if device.type == cuda.DEVICE_TYPE and registry.is_available("cuda") else rows
