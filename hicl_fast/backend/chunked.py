"""The ``torch`` backend: chunks of rows in plain PyTorch. Works on every device, with no compiler.

Extra memory is one chunk of logits and a normalised copy of the inputs.
"""

from __future__ import annotations

from hicl_fast.backend import chunked_hard_negatives as hard_negatives
from hicl_fast.backend import chunked_info_nce as info_nce
from hicl_fast.backend import chunked_mixed_negatives as mixed_negatives
from hicl_fast.backend import chunked_paradigm as paradigm
from hicl_fast.backend import chunked_segment_pool as segment_pool
from hicl_fast.backend.registry import BackendStatus, Call

__all__ = ["hard_negatives", "info_nce", "mixed_negatives", "paradigm", "refusal", "segment_pool", "status"]


def status() -> BackendStatus:
    return BackendStatus("torch", available=True, reason="", detail="chunked PyTorch, every device")


def refusal(call: Call) -> str:
    return ""
