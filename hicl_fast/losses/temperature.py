"""A fixed temperature, or one that is learned as CLIP learns it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hicl_fast import _checks as check
from hicl_fast.ops.common.autograd import is_transformed

MAX_LOGIT_SCALE = 100.0  # CLIP's limit, a temperature of 0.01


class Temperature(nn.Module):
    """Calling it gives τ: a float, or a 0-d tensor with gradient.

    The parameter is ``log(1/τ)``, as in CLIP (arXiv 2103.00020), so that steps are relative and τ stays above 0. The
    largest 1/τ is ``max_logit_scale``, or the first value's where that is larger. As in CLIP the parameter itself is held
    there, after each step of whatever optimizer: here when it is next used in training, so that neither momentum nor a
    long stay at the bound keeps it from coming back. Where it can't be held (in evaluation, in a checkpoint that has been
    loaded, given by functional_call, under torch.func) τ is that of the bound all the same, with the gradient that it has there.

    Args:
        initial: τ > 0; where it is learned, its first value.
        learnable: whether it is learned.
        max_logit_scale: the largest 1/τ that is learned; ``None``: there is no bound.
    """

    def __init__(self, initial: float, learnable: bool, max_logit_scale: float | None = MAX_LOGIT_SCALE) -> None:
        super().__init__()
        check.positive_number("temperature", initial)
        if max_logit_scale is not None:
            check.positive_number("max_logit_scale", max_logit_scale)
        if not learnable and max_logit_scale not in (None, MAX_LOGIT_SCALE):
            raise ValueError(f"max_logit_scale: expected none without learnable_temperature, got {max_logit_scale!r}")
        self.initial, self.max_logit_scale = float(initial), max_logit_scale
        self.log_scale = nn.Parameter(torch.tensor(-math.log(initial))) if learnable else None

    @property
    def bound(self) -> float | None:
        """The largest ``log_scale``."""
        return None if self.max_logit_scale is None else max(math.log(self.max_logit_scale), -math.log(self.initial))

    def forward(self) -> float | Tensor:
        if self.log_scale is None:
            return self.initial
        log_scale: Tensor = self.log_scale
        if self.bound is not None:
            self._hold(self.bound)
            log_scale = _bounded(log_scale, self.bound)
        return log_scale.neg().exp()

    def _hold(self, bound: float) -> None:
        """Take the parameter back to its bound, if a step has just led it further.

        ``data`` leaves autograd's version as it is: nothing here saves the parameter for a backward pass.
        """
        is_step = self.training and torch.is_grad_enabled() and not is_transformed()
        if is_step and isinstance(self.log_scale, nn.Parameter):
            self.log_scale.data.clamp_(max=bound)

    def extra_repr(self) -> str:
        bound = "" if self.log_scale is None else f", max_logit_scale={self.max_logit_scale}"
        return f"{self.initial}, learnable={self.log_scale is not None}{bound}"


def _bounded(log_scale: Tensor, bound: float) -> Tensor:
    """At most ``bound``, with gradient 1 everywhere: a clamp's is 0 beyond it, for good."""
    beyond = (log_scale - bound).clamp_min(0.0).detach()
    return log_scale - beyond
