"""Makes bfloat16 right in Triton's interpreter, which computes with its bits as if they were integers.

Products and elementwise operations are done in float32, and casts round to nearest. Sums along an axis and atomics
are left as they are: the kernels do neither in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Handle, _Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder


def install() -> None:
    """Idempotent; for the whole process."""
    if getattr(_Builder, "_knows_bf16", False):
        return
    _Builder._knows_bf16 = True
    dot, cast, fp_to_fp = _Builder.create_dot, _Builder.cast_impl, _Builder.create_fp_to_fp
    _Builder.create_dot = lambda self, a, b, total, *rest: dot(self, _widen(a), _widen(b), total, *rest)
    for name in ("binary_op", "unary_op", "ternary_op"):
        setattr(_Builder, name, _in_float32(getattr(_Builder, name)))

    def cast_rounding(self: Any, source: Any, to: Any) -> Any:
        return _narrow(source.data) if _rounds(source, to) else cast(self, source, to)

    def fp_to_fp_rounding(self: Any, source: Any, to: Any, mode: Any = None) -> Any:
        truncates = mode == interpreter._ir.ROUNDING_MODE.RTZ
        return _narrow(source.data) if _rounds(source, to) and not truncates else fp_to_fp(self, source, to, mode)

    _Builder.cast_impl, _Builder.create_fp_to_fp = cast_rounding, fp_to_fp_rounding


def _is_bf16(x: Any) -> bool:
    return isinstance(x, _Handle) and x.dtype.scalar == tl.bfloat16


def _rounds(source: Any, to: Any) -> bool:
    return isinstance(source, _Handle) and source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16


def _widen(x: Any) -> Any:
    if not _is_bf16(x):
        return x
    return _Handle((np.asarray(x.data).astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(values: Any) -> Any:
    """float32 to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return _Handle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)


def _in_float32(operation: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, *operands: Any) -> Any:
        if not any(map(_is_bf16, operands)):
            return operation(self, *operands)
        result = operation(self, *map(_widen, operands))
        return _narrow(result.data) if result.data.dtype == np.float32 else result

    return run
