"""The saved folder opens elsewhere and gives the same embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from hicl_fast.trainer.cli import train
from hicl_fast.trainer.encoder import SentenceEncoder

TEXTS = ["kala morem tesist", "vina", "Lopour, SENY darem morist kala teseem vinour " * 30, "kala morem tesist"]
POOLERS = [
    ("cls", False),
    ("cls", True),
    ("cls_before_pooler", False),
    ("avg", False),
    ("avg_top2", False),
    ("avg_first_last", False),
]


@pytest.fixture
def save(tmp_path: Path, sentences: Path, command: Callable[..., list[str]]) -> Callable[..., Path]:
    def run(pooler_type: str, mlp_only_train: bool) -> Path:
        train(command(sentences, max_steps=2, pooler_type=pooler_type, mlp_only_train=mlp_only_train))
        return tmp_path / "run"

    return run


def embeddings_by_hand(folder: Path, pooler_type: str) -> Tensor:
    """What anyone with transformers alone would do."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
    _, first, last = output.hidden_states  # embedding layer and two layers
    mask = batch["attention_mask"].unsqueeze(-1)
    if pooler_type == "cls":
        return output.pooler_output
    if pooler_type == "cls_before_pooler":
        return last[:, 0]
    tokens = last if pooler_type == "avg" else (first + last) / 2  # with two layers "top two" is "first and last"
    return (tokens * mask).sum(dim=1) / mask.sum(dim=1)


@pytest.mark.parametrize(("pooler_type", "mlp_only_train"), POOLERS)
def test_same_embeddings_in_transformers(save: Callable[..., Path], pooler_type: str, mlp_only_train: bool) -> None:
    folder = save(pooler_type, mlp_only_train)
    ours = SentenceEncoder.from_pretrained(folder, device="cpu").encode(TEXTS)
    theirs = embeddings_by_hand(folder, "cls_before_pooler" if mlp_only_train else pooler_type)
    assert ours.std(dim=0).mean() > 1e-3  # not all texts alike
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("pooler_type", "mlp_only_train"), POOLERS[:4])
def test_same_embeddings_in_sentence_transformers(
    save: Callable[..., Path], pooler_type: str, mlp_only_train: bool
) -> None:
    library = pytest.importorskip("sentence_transformers")
    folder = save(pooler_type, mlp_only_train)
    ours = SentenceEncoder.from_pretrained(folder, device="cpu").encode(TEXTS)
    theirs = library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_poolings_that_sentence_transformers_lacks_get_no_files(save: Callable[..., Path]) -> None:
    assert not (save("avg_top2", False) / "modules.json").exists()


def test_segments_are_pooled_by_length(save: Callable[..., Path]) -> None:
    folder = save("avg", False)
    whole = SentenceEncoder.from_pretrained(folder, device="cpu", max_seq_length=8)
    cut = SentenceEncoder.from_pretrained(folder, device="cpu", segment_length=8)
    short, long = "kala morem", "kala morem tesist vina lopa seny dary kalist"
    torch.testing.assert_close(cut.encode([short]), whole.encode([short]))

    ids = whole.tokenizer(long, add_special_tokens=False)["input_ids"]
    pieces = [whole.tokenizer.decode(ids[start : start + 6]) for start in range(0, len(ids), 6)]
    assert len(pieces) > 1
    lengths = torch.tensor([len(ids[start : start + 6]) + 2.0 for start in range(0, len(ids), 6)])
    pooled = (whole.encode(pieces) * lengths[:, None]).sum(dim=0) / lengths.sum()
    torch.testing.assert_close(cut.encode([long])[0], pooled, rtol=1e-4, atol=1e-5)


def test_no_weights_but_safetensors(save: Callable[..., Path]) -> None:
    folder = save("avg", False)
    assert [path.name for path in folder.iterdir() if path.suffix == ".safetensors"] == ["model.safetensors"]
    assert not list(folder.glob("pytorch_model*"))
