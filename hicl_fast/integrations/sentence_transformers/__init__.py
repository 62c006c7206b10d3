"""sentence-transformers' in-batch losses without their N×N matrices, and HiCL and HNCSE as losses of its trainer.

The drop-ins are subclasses with the originals' constructors, attributes, configuration, citation and results: swap the
name, or call :func:`patch` where the code can't be edited.

====================================  ===========================================  ====================================
class                                 what is fused                                what the original still computes
====================================  ===========================================  ====================================
FusedMultipleNegativesRankingLoss,    cosine and dot product; every direction,     other similarity functions,
FusedCachedMultiple...RankingLoss,    partition mode and hardness mode; hard       embeddings that aren't dense
their ...SymmetricRankingLoss forms   negatives; gather_across_devices; a scale    matrices, a scale of several
                                      that is learned                              numbers
FusedGISTEmbedLoss,                   similarities, masks and cross entropy, in    a similarity_fct or a temperature of
FusedCachedGISTEmbedLoss              chunks of rows, in PyTorch                   another kind than the constructor's
====================================  ===========================================  ====================================

With gather_across_devices processes may have different numbers of rows: a process's loss is weighted, so that the mean over
the processes is the joined batch's.
"""

from hicl_fast.integrations._requires import missing

try:
    import sentence_transformers  # noqa: F401
except ImportError as error:
    raise missing("sentence_transformers", "sentence-transformers>=5") from error

from hicl_fast.integrations.sentence_transformers import drop_ins
from hicl_fast.integrations.sentence_transformers.drop_ins import (
    FusedCachedGISTEmbedLoss,
    FusedCachedMultipleNegativesRankingLoss,
    FusedGISTEmbedLoss,
    FusedMultipleNegativesRankingLoss,
    patch,
    unpatch,
)
from hicl_fast.integrations.sentence_transformers.methods import FusedHiCLLoss, FusedHNCSELoss

__all__ = [
    "FusedCachedGISTEmbedLoss",
    "FusedCachedMultipleNegativesRankingLoss",
    "FusedGISTEmbedLoss",
    "FusedHNCSELoss",
    "FusedHiCLLoss",
    "FusedMultipleNegativesRankingLoss",
    "patch",
    "unpatch",
]

if hasattr(drop_ins, "FusedMultipleNegativesSymmetricRankingLoss"):  # where the originals are ranking losses
    from hicl_fast.integrations.sentence_transformers.drop_ins import (
        FusedCachedMultipleNegativesSymmetricRankingLoss,
        FusedMultipleNegativesSymmetricRankingLoss,
    )

    __all__ += ["FusedCachedMultipleNegativesSymmetricRankingLoss", "FusedMultipleNegativesSymmetricRankingLoss"]
