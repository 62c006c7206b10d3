"""What the operators' ``triton`` backends share: the device that work goes to, and the type that vectors are multiplied in."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from hicl_fast.kernels.device import INTERPRETING
from hicl_fast.ops.common.precision import float32_products, operand_type

# Triton's interpreter multiplies bfloat16 as if its bits were integers; the tests mend it, and say so here.
INTERPRETER_KNOWS_BF16 = False


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def multiplied_as(precision: str, *inputs: Tensor | None) -> tuple[torch.dtype, str]:
    """The type that vectors are multiplied in, for a call's ``precision``, and how float32 is: "ieee" or "tf32"."""
    dtype = operand_type(precision, *inputs)
    if dtype == torch.bfloat16 and INTERPRETING and not INTERPRETER_KNOWS_BF16:
        dtype = torch.float32
    if precision == "float32" or dtype != torch.float32:
        return dtype, "ieee"
    return dtype, tensor_precision(next(x for x in inputs if x is not None))


def tensor_precision(x: Tensor) -> str:
    """How the kernels multiply float32 on x's device, following PyTorch's settings: "ieee" or "tf32"."""
    return "tf32" if float32_products(x.device.type) == "tf32" and x.is_cuda else "ieee"
