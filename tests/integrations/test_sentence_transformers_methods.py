"""HiCL and HNCSE as losses of sentence-transformers' trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

st = pytest.importorskip("sentence_transformers")

import hicl_fast.functional as HF  # noqa: E402
from hicl_fast import HardNegativeMixing, PositiveMixing, reference  # noqa: E402
from hicl_fast.integrations.sentence_transformers import FusedHiCLLoss, FusedHNCSELoss  # noqa: E402
from hicl_fast.integrations.sentence_transformers.slicing import cut_into_segments, embed_segments  # noqa: E402
from hicl_fast.trainer.slicing import slice_documents  # noqa: E402
from tests.integrations.conftest import TEXTS  # noqa: E402

DOCUMENTS = [" ".join(TEXTS), TEXTS[0], " ".join(TEXTS[2:5]), TEXTS[6]]


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    return st.SentenceTransformer(str(model_folder), device="cpu")


def features(model: Any, texts: list[str]) -> dict[str, Any]:
    return dict((getattr(model, "preprocess", None) or model.tokenize)(texts))


def embed(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    return model({"input_ids": input_ids, "attention_mask": attention_mask})["sentence_embedding"]


@pytest.mark.parametrize(("segment_length", "max_segments"), [(3, None), (8, None), (8, 2), (500, None)])
def test_segments_are_those_of_the_tokenizer(model: Any, segment_length: int, max_segments: int | None) -> None:
    got = cut_into_segments(features(model, DOCUMENTS), model.tokenizer, segment_length, max_segments)
    wanted = slice_documents(model.tokenizer, DOCUMENTS, segment_length, max_segments or 10**6)
    assert torch.equal(got.features["input_ids"], wanted.input_ids)
    assert torch.equal(got.features["attention_mask"], wanted.attention_mask)
    assert torch.equal(got.offsets, wanted.offsets)
    assert torch.equal(got.lengths, wanted.attention_mask.sum(dim=1))


def test_segments_need_room(model: Any) -> None:
    with pytest.raises(ValueError, match="segment_length: expected more than 2 special tokens, got 2"):
        cut_into_segments(features(model, DOCUMENTS), model.tokenizer, 2, None)
    with pytest.raises(ValueError, match="sentence_features: expected input_ids"):
        cut_into_segments({"pixel_values": torch.ones(1)}, model.tokenizer, 8, None)


def test_hicl(model: Any) -> None:
    model.eval()
    loss = FusedHiCLLoss(model, 0.1, segment_length=8, local_weight=0.4)
    wanted = slice_documents(model.tokenizer, DOCUMENTS, 8, 100)
    with torch.no_grad():
        segments = embed(model, wanted.input_ids, wanted.attention_mask).double()
        lengths = wanted.attention_mask.sum(dim=1)
        exact = reference.hicl_loss(segments, segments, wanted.offsets, lengths, temperature=0.1, local_weight=0.4)
        for num_columns in (1, 2):
            got = loss([features(model, DOCUMENTS) for _ in range(num_columns)])
            torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)
    assert loss.get_config_dict()["segment_length"] == 8 and "2310.09720" in loss.citation


# --- prompts ---------------------------------------------------------------------------------------------------------

SHORT, LONG = "a small boat : ", "she walked to the office instead of the park and the quiet town all day long : "


@pytest.fixture
def without_prompt(model: Any) -> Iterator[Any]:
    model.eval()
    model.set_pooling_include_prompt(False)
    yield model
    model.set_pooling_include_prompt(True)


def prompted(model: Any, texts: list[str], prompt: str, kind: type = int) -> dict[str, Any]:
    """As the trainer's collator has it."""
    if hasattr(model, "preprocess"):
        found = dict(model.preprocess(texts, prompt=prompt))
    else:  # before 5.4
        found = dict(model.tokenize([prompt + text for text in texts]))
        found["prompt_length"] = model._get_prompt_length(prompt)
    if kind is not int:
        found["prompt_length"] = torch.tensor([found["prompt_length"]])
    return found


def segments_of(model: Any, found: dict[str, Any], segment_length: int, max_segments: int | None = None) -> Any:
    loss = FusedHiCLLoss(model, segment_length=segment_length, max_segments=max_segments)
    with torch.no_grad():
        segmented = loss._cut(found)
        return segmented, embed_segments(model, segmented)


@pytest.mark.parametrize("kind", [int, Tensor])
@pytest.mark.parametrize("prompt", [SHORT, LONG], ids=["short prompt", "long prompt"])
def test_a_short_text_with_a_prompt_is_sentence_transformers(without_prompt: Any, prompt: str, kind: type) -> None:
    texts = [*TEXTS[:3], "day", ""]
    expected = without_prompt.encode(texts, prompt=prompt, convert_to_tensor=True)
    segmented, got = segments_of(without_prompt, prompted(without_prompt, texts, prompt, kind), 500)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert segmented.offsets.tolist() == list(range(len(texts) + 1))


@pytest.mark.parametrize("prompt", [SHORT, LONG], ids=["short prompt", "long prompt"])
def test_only_the_first_segments_have_the_prompt(without_prompt: Any, prompt: str) -> None:
    """A document's tokens in segments of 8; of each what the prompt leaves is pooled, and nothing twice or not at all."""
    found = prompted(without_prompt, [*DOCUMENTS[1:], "day", ""], prompt)
    length, room = found["prompt_length"] - 1, 6  # tokens of the prompt behind the first special one
    segmented, got = segments_of(without_prompt, found, 8)
    assert bool((got.norm(dim=1) > 1e-3).all())
    wanted, lengths, counts = [], [], []
    with torch.no_grad():
        for ids, mask in zip(found["input_ids"], found["attention_mask"], strict=True):
            start, *text, end = ids[mask.bool()].tolist()
            pieces = [text[at : at + room] for at in range(0, len(text), room)]
            kept = pieces[min(length // room, len(pieces) - 1) :]
            for place, piece in enumerate(kept, start=len(pieces) - len(kept)):
                left_out = max(0, min(length - place * room, len(piece)))
                tokens = torch.tensor([[start, *piece, end]])
                every = without_prompt[0]({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
                pooled = every["token_embeddings"][0, left_out + 1 if left_out else 0 :]
                wanted.append(pooled.mean(dim=0))
                lengths.append(len(pooled))
            counts.append(len(kept))
    torch.testing.assert_close(got, torch.stack(wanted), rtol=1e-5, atol=1e-5)
    assert segmented.lengths.tolist() == lengths and segmented.offsets.diff().tolist() == counts
    few, _ = segments_of(without_prompt, found, 8, max_segments=2)
    assert few.offsets.diff().tolist() == [min(count, 2) for count in counts]


def test_a_prompt_that_is_embedded_is_text(model: Any) -> None:
    model.eval()
    found = prompted(model, DOCUMENTS, LONG)
    plain = {name: value for name, value in found.items() if name != "prompt_length"}
    (segmented, got), (expected, embedded) = (segments_of(model, dict(x), 8) for x in (found, plain))
    assert torch.equal(got, embedded) and torch.equal(segmented.lengths, expected.lengths)


def test_hicl_trains_with_prompts(without_prompt: Any) -> None:
    without_prompt.train()
    loss = FusedHiCLLoss(without_prompt, segment_length=8)
    loss([prompted(without_prompt, DOCUMENTS, SHORT)]).backward()
    assert sum(float(p.grad.abs().sum()) for p in without_prompt.parameters() if p.grad is not None) > 0
    without_prompt.zero_grad()


def test_constructors_check_their_options(model: Any) -> None:
    for options, words in (
        ({"segment_length": 0}, "segment_length: expected a whole number, at least 1, got 0"),
        ({"segment_length": 2}, "segment_length: expected more than 2 special tokens, got 2"),
        ({"max_segments": -1}, "max_segments: expected a whole number, at least 1, got -1"),
        ({"same_sequence": "other"}, "same_sequence: expected one of"),
    ):
        with pytest.raises(ValueError, match=words):
            FusedHiCLLoss(model, **options)
    with pytest.raises(TypeError, match="segment_length: expected a whole number"):
        FusedHiCLLoss(None, segment_length=8.5)
    with pytest.raises(TypeError, match="temperature: expected a number, got a tensor of shape"):
        FusedHiCLLoss(None, torch.nn.Parameter(torch.tensor(0.05)))
    with pytest.raises(ValueError, match="hard_negative_mixing: expected one of 'default', got 'none'"):
        FusedHNCSELoss(None, hard_negative_mixing="none")
    with pytest.raises(ValueError, match="sentence_features: expected at least one column"):
        FusedHNCSELoss(model)([])
    with pytest.raises(AttributeError):
        FusedHNCSELoss(None).temperature = 0.1  # which would not reach the loss
    with pytest.raises(ValueError, match="got 0 columns"):
        FusedHiCLLoss(model)([])


def test_hicl_trains_on_two_dropouts(model: Any) -> None:
    model.train()
    loss = FusedHiCLLoss(model, segment_length=8)
    loss([features(model, DOCUMENTS)], None).backward()
    assert loss.loss.last["positive_similarity"] < 0.9999
    assert sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None) > 0
    model.zero_grad()


class Wrapped(torch.nn.Module):
    """As DistributedDataParallel, which the trainer puts in the model's place on the loss."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, features: dict[str, Any]) -> Any:
        return self.module(features)


def test_hicl_of_a_wrapped_model(model: Any) -> None:
    model.eval()
    loss = FusedHiCLLoss(model, segment_length=8)
    with torch.no_grad():
        expected = loss([features(model, DOCUMENTS)])
        loss.model = Wrapped(model)
        assert torch.equal(loss([features(model, DOCUMENTS)]), expected)


def test_hicl_refuses_other_documents(model: Any) -> None:
    loss = FusedHiCLLoss(model, segment_length=8)
    with pytest.raises(ValueError, match="different numbers of segments"):
        loss([features(model, DOCUMENTS), features(model, DOCUMENTS[::-1])])
    with pytest.raises(ValueError, match="got 3 columns"):
        loss([features(model, DOCUMENTS)] * 3)


def test_hncse(model: Any) -> None:
    model.eval()
    columns = [TEXTS[:5], TEXTS[1:6], TEXTS[2:7]]
    with torch.no_grad():
        query, key, negative = (embed(model, *_ids(model, texts)) for texts in columns)
        plain = FusedHNCSELoss(model, 0.1, hard_negative_mixing=None, hard_negative_weight=0.5)
        got = plain([features(model, texts) for texts in columns])
        wanted = HF.info_nce(query, key, negatives=negative, hard_negative_weight=0.5, temperature=0.1)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        mixing = HardNegativeMixing(3, num_mixed=4, seed=1)
        mixed = FusedHNCSELoss(model, 0.1, hard_negative_mixing=mixing, positive_mixing=PositiveMixing())
        more = mixed([features(model, texts) for texts in columns[:2]])
        assert more > HF.info_nce(query, key, temperature=0.1)
    configuration = mixed.get_config_dict()
    assert "k=3" in configuration["hard_negative_mixing"] and configuration["positive_mixing"] is not None
    assert FusedHNCSELoss(model).loss.hard_negative_mixing.k == "auto"


def _ids(model: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    found = features(model, texts)
    return found["input_ids"], found["attention_mask"]
