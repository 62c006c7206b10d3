"""The backends: ``torch`` anywhere, ``cpp`` on the CPU, ``triton`` and ``cuda`` on GPUs; what each of them is and takes.

What a backend does for an operator is in the operator's folder, in a file with the backend's name.
"""

from hicl_fast.ops.backends.contract import BackendError, BackendStatus
from hicl_fast.ops.backends.registry import backends

__all__ = ["BackendError", "BackendStatus", "backends"]
