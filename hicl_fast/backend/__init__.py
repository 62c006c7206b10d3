"""The implementations of the operators: ``torch`` anywhere, ``cpp`` on the CPU, ``triton`` and ``cuda`` on GPUs."""

from hicl_fast.backend.registry import BackendError, BackendStatus, backends

__all__ = ["BackendError", "BackendStatus", "backends"]
