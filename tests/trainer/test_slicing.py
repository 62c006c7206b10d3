"""Slicing after tokenisation: every token once, special tokens around every segment, lengths in bounds."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hicl_fast.trainer.scratch import train_tokenizer
from hicl_fast.trainer.slicing import Segments, ViewCollator, slice_documents

EVERYTHING = 1000
ALPHABET = "a b c d e f g h i j k l m n o p q r s t u v w x y z"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each letter."""
    return train_tokenizer([ALPHABET] * 3)


def letters(tokenizer: PreTrainedTokenizerFast, segments: Segments) -> list[str]:
    return [
        tokenizer.decode(ids[mask.bool()]).replace("[CLS]", "<").replace("[SEP]", ">").replace(" ", "")
        for ids, mask in zip(segments.input_ids, segments.attention_mask, strict=True)
    ]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, ["<a>"]),
        (3, ["<abc>"]),  # fills the segment
        (4, ["<abc>", "<d>"]),
        (6, ["<abc>", "<def>"]),
        (7, ["<abc>", "<def>", "<g>"]),
    ],
)
def test_segments_of_five_tokens(tokenizer: PreTrainedTokenizerFast, count: int, expected: list[str]) -> None:
    segments = slice_documents(tokenizer, [ALPHABET[: 2 * count]], segment_length=5, max_segments=EVERYTHING)
    assert letters(tokenizer, segments) == expected
    assert segments.offsets.tolist() == [0, len(expected)]


def test_documents_of_different_lengths(tokenizer: PreTrainedTokenizerFast) -> None:
    segments = slice_documents(
        tokenizer, ["a b c d", "e", "\u200b", "f g h i j k l"], segment_length=5, max_segments=EVERYTHING
    )
    assert letters(tokenizer, segments) == ["<abc>", "<d>", "<e>", "<>", "<fgh>", "<ijk>", "<l>"]
    assert segments.offsets.tolist() == [0, 2, 3, 4, 7]
    assert segments.offsets.dtype == torch.int64
    assert segments.attention_mask.sum(dim=1).tolist() == [5, 3, 3, 2, 5, 5, 3]


def test_max_segments_drops_the_rest(tokenizer: PreTrainedTokenizerFast) -> None:
    segments = slice_documents(tokenizer, [ALPHABET, "a"], segment_length=5, max_segments=2)
    assert letters(tokenizer, segments) == ["<abc>", "<def>", "<a>"]
    assert segments.offsets.tolist() == [0, 2, 3]


def test_one_segment_is_plain_truncation(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [ALPHABET, "a", "b c d e f g"]
    segments = slice_documents(tokenizer, documents, segment_length=6, max_segments=1)
    truncated = tokenizer(documents, truncation=True, max_length=6, padding=True, return_tensors="pt")
    assert torch.equal(segments.input_ids, truncated["input_ids"])
    assert torch.equal(segments.attention_mask, truncated["attention_mask"])
    assert segments.offsets.tolist() == [0, 1, 2, 3]


def test_plain_documents_are_seen_twice(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = ViewCollator(tokenizer, segment_length=5, max_segments=EVERYTHING)([("a b c d",), ("e",)])
    first, second = batch["input_ids"].chunk(2)
    assert torch.equal(first, second) and first.shape[0] == 3
    assert batch["offsets"].tolist() == [0, 2, 3]


def test_documents_of_one_text_are_of_one_group(tokenizer: PreTrainedTokenizerFast) -> None:
    """Where keys of earlier batches are kept; the number is the text's, in every process and run."""
    collate = ViewCollator(tokenizer, segment_length=9, max_segments=1, with_groups=True)
    first, again = collate([("a b", "c"), ("e", "d"), ("a b", "d")]), collate([("e", "a")])
    assert first["groups"].dtype == torch.int64 and len(set(first["groups"].tolist())) == 2
    assert first["groups"][0] == first["groups"][2] and again["groups"][0] == first["groups"][1]
    assert "groups" not in ViewCollator(tokenizer, segment_length=9, max_segments=1)([("a",)])


def test_columns_are_stacked_view_by_view(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = ViewCollator(tokenizer, segment_length=9, max_segments=1)([("a", "b", "c"), ("d", "e", "f")])
    segments = Segments(batch["input_ids"], batch["attention_mask"], batch["offsets"])
    assert letters(tokenizer, segments) == ["<a>", "<d>", "<b>", "<e>", "<c>", "<f>"]
    assert batch["offsets"].tolist() == [0, 1, 2]
