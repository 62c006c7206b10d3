"""The ``triton`` backend: kernels/, for tensors on a GPU, and on the CPU in Triton's interpreter."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os

import torch

from hicl_fast.ops.backends.contract import BackendStatus, Call

_KERNELS = ("info_nce", "hard_negatives", "mixed_negatives", "segment_pool", "paradigm")


def status() -> BackendStatus:
    if importlib.util.find_spec("triton") is None:
        return _missing("Triton is not installed")
    if not _interpreting() and not torch.cuda.is_available():
        return _missing("PyTorch sees no GPU")
    try:
        for kernels in _KERNELS:
            importlib.import_module(f"hicl_fast.kernels.{kernels}")
    except ImportError as error:
        return _missing(f"the kernels don't load: {error}")
    where = "interpreter, on the CPU" if _interpreting() else torch.cuda.get_device_name()
    return BackendStatus("triton", True, "", f"Triton {importlib.metadata.version('triton')}, {where}")


def refusal(call: Call) -> str:
    if call.operator in ("info_nce", "hard_negatives", "paradigm") and call.dtype == torch.float64:
        return "it takes float32, bfloat16 and float16, got float64"
    if _interpreting():
        if call.device_type == "cpu":
            return ""
        return f"in Triton's interpreter it takes tensors on the CPU, got {call.device_type}"
    if call.device_type == "cuda":
        return ""
    return (
        f"it takes tensors on a GPU, got {call.device_type}; TRITON_INTERPRET=1 runs the kernels on the CPU, for tests"
    )


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _missing(reason: str) -> BackendStatus:
    return BackendStatus("triton", False, reason, "")
