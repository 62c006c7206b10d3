"""Loads the C++ extension, which registers ``torch.ops.hicl_fast_cpp`` and, built with CUDA, ``torch.ops.hicl_fast_cuda``."""

from __future__ import annotations

import importlib

import torch


def _load() -> str:
    try:
        importlib.import_module("hicl_fast._C")
    except ModuleNotFoundError:
        return "the C++ extension was not built"
    except ImportError as error:
        return f"the C++ extension doesn't load: {error}"
    return ""


# Once, when hicl_fast is imported: a program that torch.export saved calls the operators before anyone asks for a backend.
FAILURE = _load()  # why it isn't there; empty where it is


def compiled() -> str:
    """What is in the extension: kernels for the CPU always, CUDA kernels for the GPUs named, or none."""
    if FAILURE:
        return f"nothing: {FAILURE}"
    return f"CPU kernels; {cuda_kernels() or 'no CUDA kernels'}"


def cuda_kernels() -> str:
    """The CUDA kernels that are in it; empty where there are none."""
    if not hasattr(torch.ops.hicl_fast_cuda, "compiled"):
        return ""
    release, _, codes = torch.ops.hicl_fast_cuda.compiled().partition(": ")
    machine_code = [code for code in codes.split() if code.startswith("sm_")]
    intermediate = [f"PTX of {code}" for code in codes.split() if code.startswith("compute_")]
    return f"CUDA kernels for {', '.join(machine_code + intermediate)} ({release})"
