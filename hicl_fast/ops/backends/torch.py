"""The ``torch`` backend: chunks of rows in plain PyTorch. Works on every device, with no compiler.

Extra memory is one chunk of logits and a normalised copy of the inputs.
"""

from __future__ import annotations

from hicl_fast.ops.backends.contract import BackendStatus, Call


def status() -> BackendStatus:
    return BackendStatus("torch", available=True, reason="", detail="chunked PyTorch, every device")


def refusal(call: Call) -> str:
    return ""
