"""Cuts documents that are already tokenised into segments with special tokens of their own."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hicl_fast import _checks as check


class Segmented(NamedTuple):
    """Document b owns the segments ``offsets[b]:offsets[b + 1]``."""

    features: dict[str, Any]  # input_ids and attention_mask (S, T), and what else the column had that is no tensor
    offsets: Tensor  # (B + 1,) int64
    lengths: Tensor  # (S,) int64 tokens, without the prompt's
    prompts: list[int]  # of each segment how many of its first tokens are the document's prompt


def cut_into_segments(
    features: dict[str, Any],
    tokenizer: Any,
    segment_length: int,
    max_segments: int | None,
    *,
    prompt_length: int = 0,
) -> Segmented:
    """Segments of at most ``segment_length`` tokens, each between the special tokens that the document is between.

    Args:
        features: ``input_ids`` and ``attention_mask``, (B, T) int64. They are read in host memory.
        tokenizer: knows the special tokens' ids.
        segment_length: special tokens included.
        max_segments: kept of a document; ``None``: all.
        prompt_length: tokens at the beginning of each document, special ones included, that are a prompt which has no
            part in its embedding. Segments with nothing else between their special tokens are left out, but for the
            last of a document that has no other.

    Raises:
        ValueError: ``segment_length`` leaves no room beside the special tokens, or the features aren't padded rows.
    """
    ids, mask = features.get("input_ids"), features.get("attention_mask")
    if ids is None or mask is None or ids.shape != mask.shape:
        raise ValueError(
            f"sentence_features: expected input_ids and attention_mask of one shape (B, T), got {check.shown(sorted(features))}"
        )
    kept: list[_Segment] = []
    counts = []
    for row, real in zip(ids.tolist(), mask.tolist(), strict=True):
        tokens = [token for token, is_real in zip(row, real, strict=True) if is_real]
        segments = _cut(tokens, _end_tokens(tokenizer), segment_length, prompt_length)[:max_segments]
        counts.append(len(segments))
        kept += segments
    sizes = torch.tensor([len(segment.tokens) for segment in kept], device=ids.device)
    prompts = [segment.prompt for segment in kept]
    padded = ids.new_full((len(kept), max(len(segment.tokens) for segment in kept)), tokenizer.pad_token_id or 0)
    attention_mask = (torch.arange(padded.shape[1], device=ids.device) < sizes[:, None]).to(mask.dtype)
    padded[attention_mask.bool()] = torch.tensor([t for segment in kept for t in segment.tokens], device=ids.device)
    others = {name: value for name, value in features.items() if not isinstance(value, Tensor)}
    others.pop("prompt_length", None)  # of the document, not of its segments
    return Segmented(
        {**others, "input_ids": padded, "attention_mask": attention_mask},
        torch.tensor([0, *counts], device=ids.device).cumsum(0),
        sizes - torch.tensor(prompts, device=ids.device),
        prompts,
    )


def check_room(segment_length: int, special_tokens: int) -> None:
    """A segment has room for more than its special tokens.

    Raises:
        ValueError: it has not.
    """
    if segment_length <= special_tokens:
        raise ValueError(f"segment_length: expected more than {special_tokens} special tokens, got {segment_length}")


def embed_segments(model: nn.Module, segmented: Segmented) -> Tensor:  # -> (S, D)
    """The segments' embeddings; a forward pass for those with a prompt in them, and one for all others.

    sentence-transformers leaves out as many tokens of every row that it is given.
    """
    prompts = segmented.prompts
    if not any(prompts):
        return model(dict(segmented.features))["sentence_embedding"]
    order: list[int] = []
    parts = []
    for prompt_length in sorted(set(prompts)):
        rows = [row for row, prompt in enumerate(prompts) if prompt == prompt_length]
        features = {
            name: value[rows] if isinstance(value, Tensor) else value for name, value in segmented.features.items()
        }
        parts.append(model({**features, "prompt_length": prompt_length})["sentence_embedding"])
        order += rows
    place = torch.tensor(order, device=parts[0].device).argsort()
    return torch.cat(parts)[place]


def excluded_prompt_length(model: nn.Module, features: dict[str, Any]) -> int:
    """How many tokens at the beginning of a column's texts its pooling leaves out: ``include_prompt=False``."""
    length = features.get("prompt_length")
    if length is None or all(getattr(module, "include_prompt", True) for module in model.modules()):
        return 0
    return int(length.flatten()[0]) if isinstance(length, Tensor) else int(length)


class _Segment(NamedTuple):
    tokens: list[int]
    prompt: int  # how many of them, at the beginning


def _end_tokens(tokenizer: Any) -> set[int]:
    names = ("cls_token_id", "bos_token_id", "sep_token_id", "eos_token_id")
    return {token for name in names if (token := getattr(tokenizer, name, None)) is not None}


def _cut(tokens: list[int], ends: set[int], segment_length: int, prompt_length: int) -> list[_Segment]:
    begin = next((i for i, token in enumerate(tokens) if token not in ends), len(tokens))
    end = next((i for i in range(len(tokens), begin, -1) if tokens[i - 1] not in ends), begin)
    room = segment_length - begin - (len(tokens) - end)
    check_room(segment_length, segment_length - room)
    starts = range(begin, end, room) if end > begin else range(begin, begin + 1)
    text = min(prompt_length, end)  # where the prompt ends
    first = min(max(text - begin, 0) // room, len(starts) - 1)  # the segment with the first token after it
    segments = []
    for at in starts[first:]:
        prompt = text - (at - begin)  # special tokens count where the prompt goes on behind them
        prompt = min(prompt, begin + room) if prompt > begin or at == begin else 0
        segments.append(_Segment(tokens[:begin] + tokens[at : min(at + room, end)] + tokens[end:], prompt))
    return segments
