"""Argument checks that name the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def describe(value: object) -> str:
    """A tensor's shape, type and device, or any other value as it prints."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def floating_matrix(name: str, value: Tensor, shape: str, *, like: Tensor | None = None) -> None:
    """A 2-d floating-point tensor; with ``like``, on the same device and with rows of the same length."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {shape}, got {describe(value)}")
    if value.dim() != 2:
        raise ValueError(f"{name}: expected a tensor of shape {shape}, got {describe(value)}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {describe(value)}")
    if like is not None:
        same_device(name, value, like)


def row_length(name: str, value: Tensor, expected: int) -> None:
    if value.shape[1] != expected:
        raise ValueError(f"{name}: expected rows of length {expected}, as query has, got {describe(value)}")


def index_vector(name: str, value: Tensor, length: int, what: str, like: Tensor) -> None:
    """A 1-d int64 tensor of a known length."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(f"{name}: expected an int64 tensor of shape ({length},), {what}, got {describe(value)}")
    if value.shape != (length,):
        raise ValueError(f"{name}: expected shape ({length},), {what}, got {describe(value)}")
    same_device(name, value, like)


def integers(name: str, value: Tensor, shape: str, like: Tensor) -> None:
    """An int64 tensor on the same device; its shape is for the caller to check."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(f"{name}: expected an int64 tensor of shape {shape}, got {describe(value)}")
    same_device(name, value, like)


def same_device(name: str, value: Tensor, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(
            f"{name}: expected a tensor on {like.device}, where the first argument is, got {describe(value)}"
        )


def one_of(name: str, value: object, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {describe(value)}")


def positive_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    if not value > 0:
        raise ValueError(f"{name}: expected a number above 0, got {value!r}")


def real_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
