"""The losses and poolings as functions: arguments are checked here, the mathematics is in the backends."""

from hicl_fast.functional._info_nce import info_nce, info_nce_with_statistics
from hicl_fast.functional._mixing import hard_negatives, mixed_negative_logits, positive_mixing
from hicl_fast.functional._paradigm import check_views as check_views
from hicl_fast.functional._paradigm import paradigm, paradigm_with_statistics
from hicl_fast.functional._paradigm import paradigm_settings as paradigm_settings
from hicl_fast.functional._segment_pool import segment_pool
from hicl_fast.ops.problem import Mixing
from hicl_fast.pairs import random_pairs

__all__ = [
    "Mixing",
    "hard_negatives",
    "info_nce",
    "info_nce_with_statistics",
    "mixed_negative_logits",
    "paradigm",
    "paradigm_with_statistics",
    "positive_mixing",
    "random_pairs",
    "segment_pool",
]
