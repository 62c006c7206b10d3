"""HiCL and HNCSE as losses of sentence-transformers' trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

st = pytest.importorskip("sentence_transformers")

import hicl_fast.functional as HF  # noqa: E402
from hicl_fast import HardNegativeMixing, PositiveMixing, reference  # noqa: E402
from hicl_fast.integrations.sentence_transformers import FusedHiCLLoss, FusedHNCSELoss  # noqa: E402
from hicl_fast.integrations.sentence_transformers.slicing import cut_into_segments  # noqa: E402
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


def test_hicl_trains_on_two_dropouts(model: Any) -> None:
    model.train()
    loss = FusedHiCLLoss(model, segment_length=8)
    loss([features(model, DOCUMENTS)], None).backward()
    assert loss.loss.last["positive_similarity"] < 0.9999
    assert sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None) > 0
    model.zero_grad()


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
