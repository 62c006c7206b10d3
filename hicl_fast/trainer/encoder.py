"""Sentence embeddings from a trained encoder: what evaluation uses."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import hicl_fast.functional as HF
from hicl_fast.trainer.model import load_encoder, load_tokenizer, max_tokens
from hicl_fast.trainer.slicing import slice_documents
from hicl_fast.trainer.token_pooling import embed


class SentenceEncoder:
    """Embeds texts in batches of similar length, each distinct text once.

    Args:
        model: the encoder, which is put into evaluation mode for the call.
        tokenizer: its fast tokenizer.
        pooler_type: one of :data:`hicl_fast.trainer.token_pooling.POOLERS`.
        max_seq_length: tokens kept of a text, special ones included; default: all that the model takes.
        segment_length: embed segments of this many tokens and pool them by their lengths, as HiCL does in training;
            a text of one segment is embedded the same either way. Default: texts are embedded whole.
        batch_size: texts at a time.

    Raises:
        ValueError: a length that the model does not take.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pooler_type: str,
        *,
        max_seq_length: int | None = None,
        segment_length: int | None = None,
        batch_size: int = 64,
    ) -> None:
        longest = max_tokens(model, tokenizer)
        self.model, self.tokenizer, self.pooler_type, self.batch_size = model, tokenizer, pooler_type, batch_size
        if segment_length is None:
            self.segment_length, self.max_segments = max_seq_length or longest, 1
        else:
            self.segment_length = segment_length
            self.max_segments = max(1, (max_seq_length or 2**31) // segment_length)
        shortest = tokenizer.num_special_tokens_to_add() + 1
        if not shortest <= self.segment_length <= longest:
            name = "max_seq_length" if segment_length is None else "segment_length"
            raise ValueError(
                f"{name}: expected {shortest} to {longest} tokens, as the model takes, got {self.segment_length}"
            )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        pooler_type: str | None = None,
        device: str | None = None,
        **options: int | None,
    ) -> SentenceEncoder:
        """Opens a folder the trainer wrote, or any encoder transformers can load; the pooler type is read from its config."""
        model, pooler_type = load_encoder(name_or_path, pooler_type)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
        return cls(model, load_tokenizer(name_or_path), pooler_type, **options)  # type: ignore[arg-type]

    @property
    def description(self) -> str:
        cut = (
            f"segments of {self.segment_length} tokens"
            if self.max_segments > 1
            else f"at most {self.segment_length} tokens"
        )
        return f"{self.pooler_type} pooling, {cut}"

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """(n, D) float32 on the CPU, one row for each of the n texts."""
        distinct = sorted(set(texts), key=len, reverse=True)  # similar lengths together: little padding
        was_training = self.model.training
        self.model.eval()
        batches = (distinct[start : start + self.batch_size] for start in range(0, len(distinct), self.batch_size))
        embeddings = torch.cat([self._encode_batch(batch) for batch in batches])
        self.model.train(was_training)
        row = {text: index for index, text in enumerate(distinct)}
        return embeddings[torch.tensor([row[text] for text in texts])]

    def _encode_batch(self, texts: list[str]) -> Tensor:
        segments = slice_documents(self.tokenizer, texts, self.segment_length, self.max_segments)
        mask = segments.attention_mask.to(self.model.device)
        embeddings = embed(self.model, segments.input_ids.to(self.model.device), mask, self.pooler_type).float()
        if self.max_segments > 1:
            embeddings = HF.segment_pool(embeddings, segments.offsets.to(mask.device), mask.sum(dim=1))
        return embeddings.cpu()
