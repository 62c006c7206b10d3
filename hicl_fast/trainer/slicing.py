"""Cuts tokenised documents into segments and puts a batch of them, seen twice, into tensors."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hicl_fast.trainer.text import Row


class Segments(NamedTuple):
    """Document b owns the segments ``offsets[b]:offsets[b + 1]``."""

    input_ids: Tensor  # (S, T) int64, padded
    attention_mask: Tensor  # (S, T) int64, 0 at padding
    offsets: Tensor  # (B + 1,) int64


def slice_documents(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], segment_length: int, max_segments: int
) -> Segments:
    """Cuts each document, after tokenisation, into segments of at most ``segment_length`` tokens.

    Every segment has its own special tokens, which count; the last one of a document may be shorter, and what lies
    beyond ``max_segments`` is dropped. A document of one segment is exactly what truncation to ``segment_length`` gives.
    """
    encoded = tokenizer(
        documents,
        truncation=True,
        max_length=segment_length,
        return_overflowing_tokens=max_segments > 1,
        return_token_type_ids=False,
    )
    document_of = encoded.pop("overflow_to_sample_mapping", range(len(documents)))
    counts = [0] * len(documents)
    kept: list[list[int]] = []
    for document, ids in zip(document_of, encoded["input_ids"], strict=True):
        if counts[document] < max_segments:
            counts[document] += 1
            kept.append(ids)
    padded = tokenizer.pad({"input_ids": kept}, padding_side="right", return_tensors="pt")
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return Segments(padded["input_ids"], padded["attention_mask"], offsets)


class ViewCollator:
    """Makes one batch of rows: the V views stacked, V = 2 for plain documents (the same tokens twice, told apart by dropout).

    Args:
        tokenizer: a fast tokenizer with a padding token.
        segment_length: tokens of a segment, special ones included.
        max_segments: segments kept of a document.
        with_groups: whether batches say which rows have the same text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, segment_length: int, max_segments: int, with_groups: bool = False
    ) -> None:
        self.tokenizer, self.segment_length, self.max_segments = tokenizer, segment_length, max_segments
        self.with_groups = with_groups

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` (V·S, T); ``offsets`` (B + 1,) of one view; perhaps ``groups`` (B,)."""
        documents = [document for column in zip(*rows, strict=True) for document in column]
        segments = slice_documents(self.tokenizer, documents, self.segment_length, self.max_segments)
        repeats = 2 if len(rows[0]) == 1 else 1
        batch = {
            "input_ids": segments.input_ids.repeat(repeats, 1),
            "attention_mask": segments.attention_mask.repeat(repeats, 1),
            "offsets": segments.offsets[: len(rows) + 1],
        }
        if self.with_groups:
            batch["groups"] = torch.tensor([group_of(row[0]) for row in rows])
        return batch


def group_of(text: str) -> int:
    """A text's number, the same in every process and every run: 64 bits of its hash."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
