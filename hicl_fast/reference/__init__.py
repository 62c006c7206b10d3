"""The equations as plain PyTorch: readable, any dtype, differentiable by autograd. Every test measures against these.

They build the N×M matrix of similarities, so their memory grows with the square of the batch; train with
:mod:`hicl_fast.functional` instead.
"""

from hicl_fast.reference.hard_negatives import hard_negatives
from hicl_fast.reference.hicl import hicl_loss
from hicl_fast.reference.info_nce import info_nce, normalise
from hicl_fast.reference.mixing import mixed_negative_logits, positive_mixing
from hicl_fast.reference.paradigm import paradigm
from hicl_fast.reference.segment_pool import segment_pool

__all__ = [
    "hard_negatives",
    "hicl_loss",
    "info_nce",
    "mixed_negative_logits",
    "normalise",
    "paradigm",
    "positive_mixing",
    "segment_pool",
]
