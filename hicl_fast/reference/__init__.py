"""The equations as plain PyTorch: readable, any dtype, differentiable by autograd. Every test measures against these.

They build the N×M matrix of similarities, so their memory grows with the square of the batch; train with
:mod:`hicl_fast.functional` instead.
"""

from hicl_fast.reference.hicl import hicl_loss
from hicl_fast.reference.info_nce import info_nce, normalise
from hicl_fast.reference.segment_pool import segment_pool

__all__ = ["hicl_loss", "info_nce", "normalise", "segment_pool"]
