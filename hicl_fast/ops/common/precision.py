"""Float32 products that keep float32's digits, whatever the process allows PyTorch to do.

PyTorch's settings (``torch.set_float32_matmul_precision``, ``torch.backends.*.fp32_precision``) belong to the user and to
all threads: they are read, and never set. Where a call wants more than they give, it is computed in float64.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

_Outputs = TypeVar("_Outputs", bound=NamedTuple)
_EXACT = ("none", "ieee")


def float32_products(device_type: str) -> str:
    """How PyTorch rounds the operands of float32 products on a device: "ieee" (not at all), "tf32" or "bf16"."""
    if device_type == "cpu":
        asked = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    elif device_type == "cuda" and not torch.version.hip:  # AMD's matrix units have no tf32 beyond one generation
        asked = torch.backends.cuda.matmul.fp32_precision
    else:
        asked = "none"
    return "ieee" if asked in _EXACT else asked


def operand_type(precision: str, *inputs: Tensor | None) -> torch.dtype:
    """The type that a GPU's kernels multiply the inputs in, for a call's ``precision``."""
    if precision == "float32":
        return torch.float32
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in inputs if x is not None))
    return torch.bfloat16 if precision == "bf16" and dtype == torch.float32 else dtype


def brought_to(dtype: torch.dtype, outputs: _Outputs) -> _Outputs:
    """The outputs' floating-point tensors in one type."""
    return type(outputs)(*(_cast(x, dtype) for x in outputs))  # type: ignore[call-overload]


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x.to(dtype) if x is not None and x.is_floating_point() else x
