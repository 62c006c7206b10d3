"""Loads the C++ extension, which registers ``torch.ops.hicl_fast_cpp`` and, built with CUDA, ``torch.ops.hicl_fast_cuda``."""

from __future__ import annotations

import importlib


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
