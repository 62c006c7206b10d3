"""Sentence embeddings from a trained encoder: what evaluation uses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import hicl_fast.functional as HF
from hicl_fast.trainer.model import UNLIMITED, is_own_folder, load_encoder, load_tokenizer, max_positions, max_tokens
from hicl_fast.trainer.modules import read_modules
from hicl_fast.trainer.slicing import slice_documents
from hicl_fast.trainer.token_pooling import embed

MODEL_HELP = "a folder of sentence-transformers or of the trainer, or any encoder transformers can load"
POOLER_HELP = "default: what the folder's modules.json or config says, otherwise avg"

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


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
        """Opens a folder the trainer wrote, a sentence-transformers folder, or any encoder transformers can load.

        A folder with a modules.json gives exactly sentence-transformers' embeddings, whatever it lists; ``pooler_type``
        overrides that. Otherwise the pooler type is as given, as the model's config records, or ``avg``.

        Raises:
            ValueError: the folder needs sentence-transformers, which isn't installed, or holds no encoder.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if pooler_type is None and read_modules(name_or_path) is not None:
            is_own, max_seq_length = is_own_folder(name_or_path)
            if not is_own:
                return SentenceTransformersEncoder(_open_sentence_transformer(name_or_path, device), **options)  # type: ignore[arg-type]
            if options.get("max_seq_length") is None and options.get("segment_length") is None:
                options["max_seq_length"] = max_seq_length
        model, pooler_type = load_encoder(name_or_path, pooler_type)
        model.to(device)  # type: ignore[arg-type]
        return cls(model, load_tokenizer(name_or_path), pooler_type, **options)  # type: ignore[arg-type]

    @property
    def description(self) -> str:
        if self.max_segments > 1:
            return f"{self.pooler_type} pooling, segments of {self.segment_length} tokens"
        return f"{self.pooler_type} pooling, {_at_most(self.segment_length)}"

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """(n, D) float32 on the CPU, one row for each of the n texts."""
        distinct = sorted(set(texts), key=len, reverse=True)  # similar lengths together: little padding
        row = {text: index for index, text in enumerate(distinct)}
        return self._encode_distinct(distinct)[torch.tensor([row[text] for text in texts])]

    def _encode_distinct(self, texts: list[str]) -> Tensor:
        was_training = self.model.training
        self.model.eval()
        batches = (texts[start : start + self.batch_size] for start in range(0, len(texts), self.batch_size))
        embeddings = torch.cat([self._encode_batch(batch) for batch in batches])
        self.model.train(was_training)
        return embeddings

    def _encode_batch(self, texts: list[str]) -> Tensor:
        segments = slice_documents(self.tokenizer, texts, self.segment_length, self.max_segments)
        mask = segments.attention_mask.to(self.model.device)
        embeddings = embed(self.model, segments.input_ids.to(self.model.device), mask, self.pooler_type).float()
        if self.max_segments > 1:
            embeddings = HF.segment_pool(embeddings, segments.offsets.to(mask.device), mask.sum(dim=1))
        return embeddings.cpu()


class SentenceTransformersEncoder(SentenceEncoder):
    """A sentence-transformers model, which embeds as it would there: pooling, further modules, prompt and all.

    Args:
        model: the model, with its default prompt.
        max_seq_length: tokens kept of a text; default: as the model has it, and no more than it has positions for.
        segment_length: none; the modules embed whole texts.
        batch_size: texts at a time.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        max_seq_length: int | None = None,
        segment_length: int | None = None,
        batch_size: int = 64,
    ) -> None:
        if segment_length is not None:
            raise ValueError(
                "segment_length: expected none with a sentence-transformers folder, whose modules embed whole texts, "
                f"got {segment_length}; a pooler type takes its encoder alone"
            )
        self.model, self.batch_size = model, batch_size
        encoder = getattr(model[0], "auto_model", None)
        longest = (None if encoder is None else max_positions(encoder)) or UNLIMITED
        if max_seq_length is not None and not 1 <= max_seq_length <= longest:
            raise ValueError(
                f"max_seq_length: expected 1 to {longest} tokens, as the model takes, got {max_seq_length}"
            )
        if max_seq_length is not None or (model.max_seq_length or UNLIMITED) > longest:
            model.max_seq_length = max_seq_length or longest

    @property
    def description(self) -> str:
        modules = ", ".join(type(module).__name__ for module in self.model)
        prompt = self.model.default_prompt_name
        with_prompt = "" if prompt is None else f" with the prompt {prompt!r}"
        return f"{modules} of sentence-transformers{with_prompt}, {_at_most(self.model.max_seq_length)}"

    def _encode_distinct(self, texts: list[str]) -> Tensor:
        embeddings = self.model.encode(
            texts, batch_size=self.batch_size, show_progress_bar=False, convert_to_tensor=True
        )
        return embeddings.float().cpu()


def _open_sentence_transformer(name_or_path: str | Path, device: str) -> SentenceTransformer:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ValueError(
            f"model_name_or_path: {name_or_path} is a sentence-transformers folder, whose embeddings need that library: "
            "pip install 'hicl-fast[sentence-transformers]'; a pooler type takes its encoder alone"
        ) from None
    return SentenceTransformer(str(name_or_path), device=device, trust_remote_code=False)


def _at_most(tokens: float | None) -> str:
    return "all tokens" if tokens is None or tokens >= UNLIMITED else f"at most {tokens} tokens"
