"""Cuts documents that are already tokenised into segments with special tokens of their own."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hicl_fast import _checks as check


class Segmented(NamedTuple):
    """Document b owns the segments ``offsets[b]:offsets[b + 1]``."""

    features: dict[str, Any]  # input_ids and attention_mask (S, T), and what else the column had that is no tensor
    offsets: Tensor  # (B + 1,) int64
    lengths: Tensor  # (S,) int64 tokens


def cut_into_segments(
    features: dict[str, Any], tokenizer: Any, segment_length: int, max_segments: int | None
) -> Segmented:
    """Segments of at most ``segment_length`` tokens, each between the special tokens that the document is between.

    Args:
        features: ``input_ids`` and ``attention_mask``, (B, T) int64. They are read in host memory.
        tokenizer: knows the special tokens' ids.
        segment_length: special tokens included.
        max_segments: kept of a document; ``None``: all.

    Raises:
        ValueError: ``segment_length`` leaves no room beside the special tokens, or the features aren't padded rows.
    """
    ids, mask = features.get("input_ids"), features.get("attention_mask")
    if ids is None or mask is None or ids.shape != mask.shape:
        raise ValueError(
            f"sentence_features: expected input_ids and attention_mask of one shape (B, T), got {check.shown(sorted(features))}"
        )
    kept: list[list[int]] = []
    counts = []
    for row, real in zip(ids.tolist(), mask.tolist(), strict=True):
        tokens = [token for token, is_real in zip(row, real, strict=True) if is_real]
        segments = _cut(tokens, _end_tokens(tokenizer), segment_length)[:max_segments]
        counts.append(len(segments))
        kept += segments
    padded = ids.new_full((len(kept), max(map(len, kept))), tokenizer.pad_token_id or 0)
    lengths = torch.tensor([len(segment) for segment in kept], device=ids.device)
    attention_mask = (torch.arange(padded.shape[1], device=ids.device) < lengths[:, None]).to(mask.dtype)
    padded[attention_mask.bool()] = torch.tensor([t for segment in kept for t in segment], device=ids.device)
    others = {name: value for name, value in features.items() if not isinstance(value, Tensor)}
    offsets = torch.tensor([0, *counts], device=ids.device).cumsum(0)
    return Segmented({**others, "input_ids": padded, "attention_mask": attention_mask}, offsets, lengths)


def _end_tokens(tokenizer: Any) -> set[int]:
    names = ("cls_token_id", "bos_token_id", "sep_token_id", "eos_token_id")
    return {token for name in names if (token := getattr(tokenizer, name, None)) is not None}


def _cut(tokens: list[int], ends: set[int], segment_length: int) -> list[list[int]]:
    begin = next((i for i, token in enumerate(tokens) if token not in ends), len(tokens))
    end = next((i for i in range(len(tokens), begin, -1) if tokens[i - 1] not in ends), begin)
    room = segment_length - begin - (len(tokens) - end)
    if room < 1:
        raise ValueError(
            f"segment_length: expected more than {segment_length - room} special tokens, got {segment_length}"
        )
    starts = range(begin, end, room) if end > begin else [begin]
    return [tokens[:begin] + tokens[at : min(at + room, end)] + tokens[end:] for at in starts]
