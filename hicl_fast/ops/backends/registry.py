"""Which backends exist, which of them does a call, and why not the others."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch

from hicl_fast import _checks as check
from hicl_fast.ops.backends.contract import NAMES, BackendError, BackendStatus, Call

ENVIRONMENT = "HICL_FAST_BACKEND"

# The first available backend that supports the call. cpp beats torch at every size measured on CPUs, cuda beats triton on
# the small batches that it takes: see docs/performance.md for the measurements.
PREFERENCE = {"cpu": ("cpp", "torch"), "cuda": ("cuda", "triton", "torch")}


@functools.cache
def _module(name: str) -> ModuleType:
    """See :class:`hicl_fast.ops.backends.contract.Backend`."""
    return importlib.import_module(f"hicl_fast.ops.backends.{name}")


@functools.cache
def implementation(operator: str, name: str) -> ModuleType:
    """The backend's part for an operator. Loaded when it is used: listing the backends must work without Triton."""
    return importlib.import_module(f"hicl_fast.ops.{operator}.{name}")


@functools.cache
def _has_part(operator: str, name: str) -> bool:
    return importlib.util.find_spec(f"hicl_fast.ops.{operator}.{name}") is not None


@functools.cache
def _status(name: str) -> BackendStatus:
    return _module(name).status()


def backends() -> list[BackendStatus]:
    """Every backend: whether it is available, and if not why."""
    return [_status(name) for name in NAMES]


def is_available(name: str) -> bool:
    return _status(name).available


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
    if not status.available:
        return status.reason
    return _module(name).refusal(call) if _has_part(call.operator, name) else f"it has no {call.operator}"
