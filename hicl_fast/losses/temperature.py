"""A fixed temperature, or one that is learned as CLIP learns it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hicl_fast import _checks as check

MAX_LOGIT_SCALE = 100.0  # CLIP's limit, a temperature of 0.01


class Temperature(nn.Module):
    """Calling it gives τ: a float, or a 0-d tensor with gradient.

    The parameter is ``log(1/τ)``, as in CLIP (arXiv 2103.00020), so that steps are relative and τ stays above 0;
    1/τ is held at most at 100.
    """

    def __init__(self, initial: float, learnable: bool) -> None:
        super().__init__()
        check.positive_number("temperature", initial)
        self.initial = float(initial)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(initial))) if learnable else None

    def forward(self) -> float | Tensor:
        if self.log_scale is None:
            return self.initial
        return self.log_scale.clamp(max=math.log(MAX_LOGIT_SCALE)).neg().exp()

    def extra_repr(self) -> str:
        return f"{self.initial}, learnable={self.log_scale is not None}"
