"""HiCL and HNCSE as losses of sentence-transformers' trainer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from hicl_fast import _checks as check
from hicl_fast import losses
from hicl_fast.integrations.sentence_transformers.slicing import (
    Segmented,
    check_room,
    cut_into_segments,
    embed_segments,
    excluded_prompt_length,
)
from hicl_fast.ops.common.constants import SameGroup

Features = dict[str, Any]
Column = TypeVar("Column")


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
        if hard_negative_mixing is not None and not isinstance(hard_negative_mixing, losses.HardNegativeMixing):
            check.one_of("hard_negative_mixing", hard_negative_mixing, ("default",))
            hard_negative_mixing = losses.HardNegativeMixing("auto")
        self.model = model
        self.loss = losses.FusedInfoNCELoss(
            temperature,
            hard_negative_mixing=hard_negative_mixing,
            positive_mixing=positive_mixing,
            hard_negative_weight=hard_negative_weight,
        )

    @property
    def temperature(self) -> float:
        """τ, as the loss was made with it."""
        return self.loss.temperature.initial

    @property
    def hard_negative_weight(self) -> float:
        """What is added to the logit of a row's own hard negative."""
        return self.loss.hard_negative_weight

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss of the columns' embeddings; a scalar, float32 (float64 where the embeddings are).

        Raises:
            ValueError: there is no column; or as :func:`hicl_fast.functional.info_nce` says.
        """
        columns = list(sentence_features)
        if not columns:
            raise ValueError("sentence_features: expected at least one column, got none")
        views = [self.model(_copy(features))["sentence_embedding"] for features in _twice(columns)]
        query, key, *negatives = views
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
    Labels are not used. Documents are cut after tokenisation, so ``model.max_seq_length`` bounds them, not segments. A
    prompt stands at the beginning of a document, so of its first segment. Where the model leaves prompts out of its
    embeddings (``include_prompt=False``), so do the segments: one that is all prompt is left out, a segment's weight is
    of the tokens that are embedded, and segments with and without a prompt take a forward pass each.

    Args:
        model: a SentenceTransformer on a transformers tokenizer.
        temperature: τ > 0 of both losses.
        segment_length: tokens of a segment, special ones included.
        max_segments: segments kept of a document; ``None``: all.
        local_weight: α, 0 to 1, of the loss between segments; the one between documents has 1 − α.
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
        tokenizer: Any = getattr(model, "tokenizer", None)
        if hasattr(tokenizer, "num_special_tokens_to_add"):
            check_room(segment_length, tokenizer.num_special_tokens_to_add())
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
        if len(columns) not in (1, 2) or not torch.equal(columns[0].offsets, columns[-1].offsets):
            came = "columns with different numbers of segments" if len(columns) == 2 else f"{len(columns)} columns"
            raise ValueError(f"sentence_features: expected documents, or the same documents twice, got {came}")
        segments, segments_again = (embed_segments(self.model, column) for column in _twice(columns))
        return self.loss(segments, segments_again, columns[0].offsets, columns[0].lengths)

    def _cut(self, features: Features) -> Segmented:
        return cut_into_segments(
            features,
            _unwrapped(self.model).tokenizer,
            self.segment_length,
            self.max_segments,
            prompt_length=excluded_prompt_length(self.model, features),
        )

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


def _twice(columns: list[Column]) -> list[Column]:
    """Columns to compare; a single one with itself, under another dropout mask."""
    return columns * 2 if len(columns) == 1 else columns


def _unwrapped(model: Any) -> Any:
    """The model inside what data parallelism puts in its place, which the trainer sets on its loss."""
    while not hasattr(model, "tokenizer") and hasattr(model, "module"):
        model = model.module
    return model


def _copy(features: Features) -> Features:
    """What a model may write into: older releases' pooling takes a prompt out of the attention mask itself."""
    return {name: value.clone() if name == "attention_mask" else value for name, value in features.items()}


def _check_whole_number(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number, at least 1, got {check.describe(value)}")
    if value < 1:
        raise ValueError(f"{name}: expected a whole number, at least 1, got {value}")


def _configuration(part: nn.Module | None) -> str | None:
    return None if part is None else f"{type(part).__name__}({part.extra_repr()})"
