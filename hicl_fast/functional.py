"""The losses and poolings as functions: arguments are checked here, the mathematics is in the backends."""

from hicl_fast.ops.hard_negatives.api import hard_negatives
from hicl_fast.ops.info_nce.api import info_nce, info_nce_with_statistics
from hicl_fast.ops.info_nce.arguments import Columns, OwnNegatives
from hicl_fast.ops.info_nce.problem import Mixing
from hicl_fast.ops.log_sum_exp.api import RowLogits, log_sum_exp
from hicl_fast.ops.mixed_negatives.api import mixed_negative_logits
from hicl_fast.ops.paradigm.api import check_views as check_views
from hicl_fast.ops.paradigm.api import paradigm, paradigm_with_statistics
from hicl_fast.ops.paradigm.api import paradigm_settings as paradigm_settings
from hicl_fast.ops.positive_mixing.api import positive_mixing
from hicl_fast.ops.segment_pool.api import segment_pool
from hicl_fast.pairs import random_pairs

__all__ = [
    "Columns",
    "Mixing",
    "OwnNegatives",
    "RowLogits",
    "hard_negatives",
    "info_nce",
    "info_nce_with_statistics",
    "log_sum_exp",
    "mixed_negative_logits",
    "paradigm",
    "paradigm_with_statistics",
    "positive_mixing",
    "random_pairs",
    "segment_pool",
]
