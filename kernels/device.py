"""The device that kernels are launched on: its name in the tile table, and whether it is Triton's interpreter."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor


def _nothing() -> None:
    pass


INTERPRETING = not isinstance(
    triton.jit(_nothing), triton.JITFunction
)  # TRITON_INTERPRET=1 when the kernels were loaded


@functools.cache
def architecture(device: torch.device) -> str:
    """The tile table's name for a device: "sm_90", "gfx942", "interpreter"."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once where one fills a multiprocessor; a few in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def operand_of(x: Tensor, precision: str) -> str:
    """The tile table's name for vectors of x's type, multiplied in ``precision`` ("ieee" or "tf32")."""
    if x.element_size() == 2:
        return "16 bit"
    return "tf32" if precision == "tf32" else "fp32"
