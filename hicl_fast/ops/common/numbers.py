"""The type that sums are kept in, and the scale 1 / temperature."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hicl_fast import _checks as check
from hicl_fast.ops.common.autograd import readable


def sum_type(*inputs: Tensor | None) -> torch.dtype:
    """The type that sums of the inputs are kept in: float64 if one of them is float64, else float32."""
    for x in inputs:
        if x is not None and x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def host_number(value: float) -> Tensor:
    """() float64 in host memory, whatever PyTorch's default device is."""
    return torch.scalar_tensor(value, dtype=torch.float64, device="cpu")


def scale_of(temperature: float | Tensor, query: Tensor, *others: Tensor | None) -> Tensor:
    """1 / temperature as a 0-d tensor; a number stays in host memory, so that no device is waited for to read it.

    A tensor's is in the type of the sums over query and others at least; its gradient comes in the tensor's own.
    """
    if isinstance(temperature, Tensor):
        if temperature.dim() != 0 or not temperature.is_floating_point():
            raise ValueError(f"temperature: expected a number or a 0-d tensor, got {check.describe(temperature)}")
        if temperature.device != query.device and temperature.device.type != "cpu":
            raise ValueError(
                f"temperature: expected a tensor on {query.device} or cpu, got {check.describe(temperature)}"
            )
        return temperature.to(torch.promote_types(temperature.dtype, sum_type(query, *others))).reciprocal()
    check.positive_number("temperature", temperature)
    return host_number(1.0 / temperature)


def check_scale(scale: Tensor) -> None:  # () 1 / temperature
    """Raise ``ValueError`` for a temperature that is no number above 0; looks at host memory only."""
    if (values := readable(scale)) is None:
        return
    for value in [float(values)] if values.dim() == 0 else values.flatten().tolist():  # several under torch.func
        if not 0 < value < math.inf:
            raise ValueError(f"temperature: expected a number above 0, got {1.0 / value if value else math.inf!r}")


def scale_on(scale: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The scale () where the sums are. The host's number is written there: a copy from its memory would be waited for."""
    if scale.device.type == "cpu" != device.type:
        return torch.full((), float(scale), dtype=dtype, device=device)
    return scale.detach().to(device=device, dtype=dtype)
