"""sentence-transformers' in-batch losses without their N×N matrices, and HiCL and HNCSE as losses of its trainer.

The drop-ins are subclasses with the originals' constructors, attributes, configuration, citation and results: swap the
name, or call :func:`patch` where the code can't be edited.

====================================  ===========================================  ====================================
class                                 what is fused                                what the original still computes
====================================  ===========================================  ====================================
FusedMultipleNegativesRankingLoss,    cosine and dot product; every direction,     other similarity functions,
FusedCachedMultiple...RankingLoss,    partition mode and hardness mode; hard       embeddings that aren't dense
their ...SymmetricRankingLoss forms   negatives; gather_across_devices             matrices, two combinations (below)
FusedGISTEmbedLoss,                   similarities, masks and cross entropy, in    a similarity_fct that isn't
FusedCachedGISTEmbedLoss              chunks of rows, in PyTorch                   nn.CosineSimilarity
====================================  ===========================================  ====================================

The two combinations: ``doc_to_doc`` without ``doc_to_query``, and ``query_to_query`` with a ``hardness_mode`` of
"in_batch_negatives" or "all_negatives", are fused for cosines with a scale up to 80, not beyond it nor for dot products.
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
