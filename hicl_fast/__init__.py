"""Contrastive losses for sentence embeddings as custom kernels."""

from hicl_fast import functional, reference
from hicl_fast.losses import (
    FusedHiCLLoss,
    FusedInfoNCELoss,
    GradientParadigmLoss,
    HardNegativeMixing,
    NegativeQueue,
    PositiveMixing,
    SegmentPooling,
)
from hicl_fast.ops.backends import BackendError, BackendStatus, backends

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BackendStatus",
    "FusedHiCLLoss",
    "FusedInfoNCELoss",
    "GradientParadigmLoss",
    "HardNegativeMixing",
    "NegativeQueue",
    "PositiveMixing",
    "SegmentPooling",
    "__version__",
    "backends",
    "functional",
    "reference",
]
