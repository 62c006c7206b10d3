"""The ``cuda`` backend: csrc/cuda, for tensors on an NVIDIA GPU, and in tests on the CPU, emulated."""

from __future__ import annotations

import torch

from hicl_fast.ops.backends import extension
from hicl_fast.ops.backends.contract import BackendStatus, Call

# The device that the loaded operators take; the tests, which load emulated ones, say "cpu".
DEVICE_TYPE = "cuda"
LOWEST_CAPABILITY = (8, 0)  # that the binary has code for


def status() -> BackendStatus:
    if DEVICE_TYPE == "cpu":
        return BackendStatus("cuda", True, "", "emulated on the CPU")
    if not torch.version.cuda:
        return _missing("this PyTorch is built without CUDA")
    if extension.FAILURE:
        return _missing(extension.FAILURE)
    if not hasattr(torch.ops.hicl_fast_cuda, "segment_pool"):
        return _missing("the C++ extension was built without its CUDA kernels")
    if not torch.cuda.is_available():
        return _missing("PyTorch sees no GPU")
    if (capability := torch.cuda.get_device_capability()) < LOWEST_CAPABILITY:
        return _missing(f"it needs a GPU from sm_80 on, got sm_{capability[0]}{capability[1]}")
    return BackendStatus("cuda", True, "", f"CUDA C++, {torch.cuda.get_device_name()}")


def refusal(call: Call) -> str:
    if call.device_type != DEVICE_TYPE:
        return f"it takes tensors on an NVIDIA GPU, got {call.device_type}"
    if call.dtype == torch.float64:
        return "it takes float32, bfloat16 and float16, got float64"
    return f"it does not take {', '.join(call.features)}" if call.features else ""


def _missing(reason: str) -> BackendStatus:
    return BackendStatus("cuda", False, reason, "")
