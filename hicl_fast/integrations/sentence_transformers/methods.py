"""HiCL and HNCSE as losses of sentence-transformers' trainer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hicl_fast import _checks as check
from hicl_fast import losses
from hicl_fast.integrations.sentence_transformers.slicing import Segmented, cut_into_segments
from hicl_fast.reference.info_nce import SameGroup

Features = dict[str, Any]


class FusedHNCSELoss(nn.Module):
    """HNCSE (arXiv 2411.12156): in-batch InfoNCE with mixed hard negatives and mixed positives.

    Inputs: one column (each text is embedded twice, and dropout tells the two apart), anchors and positives, or anchors,
    positives and columns of hard negatives. Labels are not used.

    Args:
        model: a SentenceTransformer.
        temperature: τ > 0.
        hard_negative_mixing: mixtures of each row's hard negatives as further negatives; ``None``: none.
            ``"default"``: :class:`hicl_fast.HardNegativeMixing` with as many negatives, up to 10, as the batch has.
        positive_mixing: a :class:`hicl_fast.PositiveMixing`; ``None``: positives stay as they are.
        hard_negative_weight: added to the logit of row i's own hard negative (SimCSE's rule); one column of them only.

    Example:
        >>> loss = FusedHNCSELoss(model, hard_negative_mixing=HardNegativeMixing(k=10, num_mixed=40))
        >>> SentenceTransformerTrainer(model=model, train_dataset=texts, loss=loss).train()
    """

    def __init__(
        self,
        model: nn.Module,
        temperature: float = 0.05,
        *,
        hard_negative_mixing: losses.HardNegativeMixing | Literal["default"] | None = "default",
        positive_mixing: losses.PositiveMixing | None = None,
        hard_negative_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(hard_negative_mixing, str):
            check.one_of("hard_negative_mixing", hard_negative_mixing, ("default",))
            hard_negative_mixing = losses.HardNegativeMixing("auto")
        self.model = model
        self.temperature = temperature
        self.hard_negative_weight = hard_negative_weight
        self.loss = losses.FusedInfoNCELoss(
            temperature,
            hard_negative_mixing=hard_negative_mixing,
            positive_mixing=positive_mixing,
            hard_negative_weight=hard_negative_weight,
        )

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss of the columns' embeddings; a scalar, float32 (float64 where the embeddings are)."""
        query, key, *negatives = _views(self.model, list(sentence_features))
        return self.loss(query, key, torch.cat(negatives) if negatives else None)

    def get_config_dict(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "hard_negative_mixing": _configuration(self.loss.hard_negative_mixing),
            "positive_mixing": _configuration(self.loss.positive_mixing),
            "hard_negative_weight": self.hard_negative_weight,
        }

    @property
    def citation(self) -> str:
        return """
@misc{liu2024hncse,
    title={HNCSE: Advancing Sentence Embeddings via Hybrid Contrastive Learning with Hard Negatives},
    year={2024},
    eprint={2411.12156},
    archivePrefix={arXiv},
    primaryClass={cs.CL}
}
"""


class FusedHiCLLoss(nn.Module):
    """HiCL (arXiv 2310.09720): documents are cut into segments, and both are contrasted.

    Inputs: one column of documents, embedded twice (dropout tells the two apart), or the same documents as two columns.
    Labels are not used. Documents are cut after tokenisation, so ``model.max_seq_length`` bounds them, not segments.

    Args:
        model: a SentenceTransformer on a transformers tokenizer.
        temperature: τ > 0 of both losses.
        segment_length: tokens of a segment, special ones included.
        max_segments: segments kept of a document; ``None``: all.
        local_weight: α of the loss between segments; the one between documents has 1 − α.
        same_sequence: what segments of the row's own document are: ``"exclude"``, ``"negative"`` or ``"positive"``.
        pooling: ``"length"`` weights a segment by its tokens, ``"mean"`` weights all alike.

    Example:
        >>> model.max_seq_length = 512
        >>> loss = FusedHiCLLoss(model, segment_length=32)
        >>> SentenceTransformerTrainer(model=model, train_dataset=documents, loss=loss).train()
    """

    def __init__(
        self,
        model: nn.Module,
        temperature: float = 0.05,
        *,
        segment_length: int = 32,
        max_segments: int | None = None,
        local_weight: float = 0.3,
        same_sequence: SameGroup = "exclude",
        pooling: Literal["length", "mean"] = "length",
    ) -> None:
        super().__init__()
        check.whole_number("segment_length", segment_length, 1)
        if max_segments is not None:
            check.whole_number("max_segments", max_segments, 1)
        self.model = model
        self.segment_length, self.max_segments = segment_length, max_segments
        self.loss = losses.FusedHiCLLoss(
            temperature, local_weight=local_weight, same_sequence=same_sequence, pooling=pooling
        )

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss of the documents' segments; a scalar, float32 (float64 where the embeddings are).

        Raises:
            ValueError: two columns whose documents differ in their numbers of segments, or more columns.
        """
        columns = [self._cut(features) for features in sentence_features]
        first, again = columns[0], columns[-1]
        if len(columns) > 2 or not torch.equal(first.offsets, again.offsets):
            came = f"{len(columns)} columns" if len(columns) > 2 else "columns with different numbers of segments"
            raise ValueError(f"sentence_features: expected documents, or the same documents twice, got {came}")
        segments, segments_again = _views(self.model, [column.features for column in columns])
        return self.loss(segments, segments_again, first.offsets, first.lengths)

    def _cut(self, features: Features) -> Segmented:
        return cut_into_segments(features, self.model.tokenizer, self.segment_length, self.max_segments)

    def get_config_dict(self) -> dict[str, Any]:
        return {
            "temperature": self.loss.temperature,
            "segment_length": self.segment_length,
            "max_segments": self.max_segments,
            "local_weight": self.loss.local_weight,
            "same_sequence": self.loss.same_sequence,
            "pooling": self.loss.pool.pooling,
        }

    @property
    def citation(self) -> str:
        return """
@misc{wu2023hicl,
    title={HiCL: Hierarchical Contrastive Learning of Unsupervised Sentence Embeddings},
    year={2023},
    eprint={2310.09720},
    archivePrefix={arXiv},
    primaryClass={cs.CL}
}
"""


def _views(model: nn.Module, columns: list[Features]) -> list[Tensor]:
    """The columns' embeddings (B, D) each; of a single column, two."""
    if len(columns) == 1:
        columns = [columns[0], dict(columns[0])]
    return [model(dict(features))["sentence_embedding"] for features in columns]


def _configuration(part: nn.Module | None) -> str | None:
    return None if part is None else f"{type(part).__name__}({part.extra_repr()})"
