"""Argument checks that name the argument, what was expected and what came."""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_LARGEST_INT64 = 2**63 - 1

# Of what is shown in a message: characters of one value, and of all of a container; its members, and how deep they go.
_LONGEST = 60
_LONGEST_IN_ALL = 200
_MOST_MEMBERS = 4
_DEEPEST = 2
_PLAIN = (type(None), bool, int, float, complex, type, np.generic, torch.dtype, torch.device, enum.Enum, PurePath)


def describe(value: object) -> str:
    """A value in a few words, however large it is: of tensors and arrays the shape, type and device, never the content."""
    if isinstance(value, (Tensor, np.ndarray)):
        return shown(value)
    return f"{shown(value)} ({type(value).__name__})"


def shown(value: object, depth: int = _DEEPEST) -> str:
    """:func:`describe` without the name of a plain value's type."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}, {value.dtype}"
    if isinstance(value, (str, bytes)):
        cut = "" if len(value) <= _LONGEST else f"… ({len(value)} in all)"
        return f"{value[:_LONGEST]!r}{cut}"
    if isinstance(value, int) and abs(value).bit_length() > 64:  # Python itself refuses to print the longest
        return f"an integer of {abs(value).bit_length()} bits"
    if isinstance(value, (list, tuple, set, frozenset, Mapping)):
        return _shown_members(value, depth)
    if isinstance(value, _PLAIN):
        text = repr(value)
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return f"a {type(value).__qualname__}"


def _shown_members(value: Collection[object], depth: int) -> str:
    opening, closing = ("[", "]") if isinstance(value, list) else ("(", ")") if isinstance(value, tuple) else ("{", "}")
    if not value:
        return opening + closing
    if depth == 0:
        return f"{opening}{len(value)} members{closing}"
    members: list[str] = []
    for member in value:
        if len(members) == _MOST_MEMBERS:
            members.append(f"… {len(value)} in all")
            break
        key = f"{shown(member, 0)}: " if isinstance(value, Mapping) else ""
        members.append(key + shown(value[member] if isinstance(value, Mapping) else member, depth - 1))
    text = ", ".join(members)
    return opening + (text if len(text) <= _LONGEST_IN_ALL else f"{text[:_LONGEST_IN_ALL]}…") + closing


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


def floating_rows(name: str, value: Tensor, shape: str, query: Tensor, *, or_else: str) -> None:
    """A floating-point tensor (N, K, D) for queries (N, D); ``or_else``: the other type that it could have been."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {shape} or {or_else}, got {describe(value)}")
    if value.dim() != 3 or value.shape[0] != query.shape[0] or value.shape[2] != query.shape[1]:
        raise ValueError(
            f"{name}: expected shape {shape}, some rows for each query, or {or_else}, got {describe(value)}"
        )
    floating_matrix(name, value[0], shape, like=query)


def row_length(name: str, value: Tensor, expected: int) -> None:
    if value.shape[1] != expected:
        raise ValueError(f"{name}: expected rows of length {expected}, as query has, got {describe(value)}")


def rows_like(name: str, value: Tensor, shape: str, query: Tensor) -> None:
    """A 2-d floating-point tensor on the query's device, with rows of its length."""
    floating_matrix(name, value, shape, like=query)
    row_length(name, value, query.shape[1])


def index_vector(name: str, value: Tensor, length: int, what: str, like: Tensor) -> None:
    """A 1-d int64 tensor of a known length."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(f"{name}: expected an int64 tensor of shape ({length},), {what}, got {describe(value)}")
    if value.shape != (length,):
        raise ValueError(f"{name}: expected shape ({length},), {what}, got {describe(value)}")
    same_device(name, value, like)


def ids(name: str, value: Tensor, length: int, what: str, like: Tensor) -> None:
    """A 1-d int64 tensor of a known length, or a 2-d one with so many rows and at least one column."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(
            f"{name}: expected an int64 tensor of shape ({length},) or ({length}, G), {what}, got {describe(value)}"
        )
    if value.dim() not in (1, 2) or value.shape[0] != length or 0 in value.shape[1:]:
        raise ValueError(f"{name}: expected shape ({length},) or ({length}, G), {what}, got {describe(value)}")
    same_device(name, value, like)


def floating_vector(name: str, value: Tensor, length: int, what: str, like: Tensor) -> None:
    """A 1-d floating-point tensor of a known length."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor of shape ({length},), {what}, got {describe(value)}")
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


def one_of(name: str, value: object, allowed: Collection[str | bool | None]) -> None:
    if not (value is None or isinstance(value, (str, bool))) or value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {describe(value)}")


def instance(name: str, value: object, kind: type) -> None:
    """One of that class, or ``None``."""
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name}: expected a {kind.__name__} or None, got {describe(value)}")


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {describe(value)}")


def whole_number(name: str, value: object, least: int, most: int | None = None) -> None:
    expected = f"a whole number, at least {least}" if most is None else f"a whole number from {least} to {most}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")
    if value > _LARGEST_INT64 and most is None:
        expected = f"a whole number from {least} to {_LARGEST_INT64}"
    if value < least or value > (_LARGEST_INT64 if most is None else most):
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")


def is_number(value: object) -> bool:
    """Finite or not, of Python or NumPy; a bool is none."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


# Sums are kept in float32: what it doesn't hold would come out as NaN or infinity, far from here.
_LARGEST, _SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)


def is_finite(value: Any) -> bool:
    """Of a number: not NaN, not infinite, and small enough for a float32."""
    return -_LARGEST <= value <= _LARGEST


def real_number(name: str, value: object) -> None:
    if not is_number(value):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    if not is_finite(value):
        is_large = isinstance(value, int) or math.isfinite(value)  # type: ignore[arg-type]
        expected = f"a number of at most {_LARGEST:.1e}, as float32 has it" if is_large else "a finite number"
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")


def positive_number(name: str, value: Any) -> None:
    real_number(name, value)
    if value < _SMALLEST:
        least = "0" if value <= 0 else f"{_SMALLEST:.1e}, as float32 has it"
        raise ValueError(f"{name}: expected a number above {least}, got {shown(value)}")


def non_negative_number(name: str, value: Any) -> None:
    real_number(name, value)
    if value < 0:
        raise ValueError(f"{name}: expected a number of at least 0, got {shown(value)}")


def share(name: str, value: Any) -> None:
    real_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {shown(value)}")


def angle(name: str, value: Any) -> None:
    real_number(name, value)
    if not 0 <= value < math.pi:
        raise ValueError(f"{name}: expected an angle in radians, at least 0 and below π, got {shown(value)}")
