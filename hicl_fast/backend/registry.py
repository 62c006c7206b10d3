"""Which backends exist, which of them does a call, and why not the others."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch

from hicl_fast import _checks as check

NAMES = ("torch", "cpp", "triton", "cuda")
ENVIRONMENT = "HICL_FAST_BACKEND"

# The first available backend that supports the call. cpp beats torch at every size measured on CPUs: see
# docs/performance.md for the measurements. On GPUs the order is what operations and bytes promise (docs/cuda.md); it
# has not been measured.
PREFERENCE = {"cpu": ("cpp", "torch"), "cuda": ("cuda", "triton", "torch")}


class BackendError(RuntimeError):
    """The backend asked for is not there, or does not do the call."""


@dataclass(frozen=True)
class BackendStatus:
    """What :func:`backends` lists."""

    name: str
    available: bool
    reason: str  # why it is not available, and what would make it so; empty where it is
    detail: str  # the compiler's or processor's part in it: "AVX2", "interpreter", ...


class Call(NamedTuple):
    """What the choice of a backend can depend on."""

    operator: str  # an operator of :class:`Backend`
    device_type: str
    dtype: torch.dtype  # of the sums
    features: tuple[str, ...] = ()  # what it asks beyond the plain call and a backend may have to refuse


class Backend(Protocol):
    """What a module in this package defines."""

    def status(self) -> BackendStatus: ...

    def refusal(self, call: Call) -> str:
        """Why it doesn't do the call; empty where it does."""

    hard_negatives: Any
    info_nce: Any
    mixed_negatives: Any
    paradigm: Any
    segment_pool: Any


@functools.cache
def _module(name: str) -> ModuleType:
    if name == "torch":
        from hicl_fast.backend import chunked as module
    elif name == "cpp":
        from hicl_fast.backend import cpp as module  # type: ignore[no-redef]
    elif name == "cuda":
        from hicl_fast.backend import cuda as module  # type: ignore[no-redef]
    else:
        from hicl_fast.backend import triton as module  # type: ignore[no-redef]
    return module


@functools.cache
def _status(name: str) -> BackendStatus:
    return _module(name).status()


def backends() -> list[BackendStatus]:
    """Every backend: whether it is available, and if not why."""
    return [_status(name) for name in NAMES]


def is_available(name: str) -> bool:
    return _status(name).available


def implementation(operator: str, name: str) -> Any:
    return getattr(_module(name), operator)


def check_name(backend: str, name: str = "backend") -> None:
    """Whether it names a backend; whether that one is there and does a call is known once there is a call."""
    if not isinstance(backend, str) or backend not in ("auto", *NAMES):
        raise ValueError(
            f"{name}: expected 'auto' or one of {', '.join(map(repr, NAMES))}, got {check.describe(backend)}"
        )


@torch.compiler.assume_constant_result
def choose(asked: str, operator: str, device_type: str, dtype: torch.dtype, features: tuple[str, ...] = ()) -> str:
    """The backend for a call: the one asked for, else HICL_FAST_BACKEND's, else the first in PREFERENCE that does it."""
    call = Call(operator, device_type, dtype, features)
    check_name(asked)
    if asked == "auto":
        asked = os.environ.get(ENVIRONMENT, "auto")
        check_name(asked, ENVIRONMENT)
    if asked == "auto":
        return _preferred(call)
    refusal = _refusal(asked, call)
    if refusal:
        able = ", ".join(name for name in NAMES if not _refusal(name, call))
        raise BackendError(f"backend {asked!r} can't run {call.operator} here: {refusal}. Those that can: {able}")
    return asked


@functools.cache
def _preferred(call: Call) -> str:
    order = PREFERENCE.get(call.device_type, ("torch",))
    return next(name for name in order if not _refusal(name, call))


@functools.cache
def _refusal(name: str, call: Call) -> str:
    status = _status(name)
    return status.reason if not status.available else _module(name).refusal(call)
