"""The losses as modules."""

from hicl_fast.losses.hicl import FusedHiCLLoss
from hicl_fast.losses.hncse import HardNegativeMixing, PositiveMixing
from hicl_fast.losses.info_nce import FusedInfoNCELoss
from hicl_fast.losses.paradigm import GradientParadigmLoss
from hicl_fast.losses.pooling import SegmentPooling
from hicl_fast.losses.queue import NegativeQueue

__all__ = [
    "FusedHiCLLoss",
    "FusedInfoNCELoss",
    "GradientParadigmLoss",
    "HardNegativeMixing",
    "NegativeQueue",
    "PositiveMixing",
    "SegmentPooling",
]
