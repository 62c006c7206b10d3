"""What a backend is: a module in this package that says whether it is there and which calls it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

NAMES = ("torch", "cpp", "triton", "cuda")


class BackendError(RuntimeError):
    """The backend asked for is not there, or does not do the call."""


@dataclass(frozen=True)
class BackendStatus:
    """What :func:`hicl_fast.backends` lists."""

    name: str
    available: bool
    reason: str  # why it is not available, and what would make it so; empty where it is
    detail: str  # the compiler's or processor's part in it: "AVX2", "interpreter", ...


class Call(NamedTuple):
    """What the choice of a backend can depend on."""

    operator: str  # the name of its folder in hicl_fast/ops
    device_type: str
    dtype: torch.dtype  # of the sums
    features: tuple[str, ...] = ()  # what it asks beyond the plain call and a backend may have to refuse


class Backend(Protocol):
    """What the module ``hicl_fast.ops.backends.<name>`` defines."""

    def status(self) -> BackendStatus: ...

    def refusal(self, call: Call) -> str:
        """Why it doesn't do the call; empty where it does."""
