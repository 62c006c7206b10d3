"""SentenceTransformerTrainer with a loss and its drop-in: the same steps."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

st = pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")

from hicl_fast.integrations import sentence_transformers as fused  # noqa: E402
from hicl_fast.integrations.sentence_transformers.drop_ins import original  # noqa: E402
from tests.integrations.conftest import TEXTS  # noqa: E402


@pytest.fixture
def triplets(tmp_path: Path) -> Any:
    with (tmp_path / "triplets.csv").open("w", newline="") as file:
        rows = zip(TEXTS, TEXTS[1:] + TEXTS[:1], TEXTS[2:] + TEXTS[:2], strict=True)
        csv.writer(file).writerows([("anchor", "positive", "negative"), *rows])
    return datasets.Dataset.from_csv(str(tmp_path / "triplets.csv"), cache_dir=str(tmp_path / "cache"))


def losses_of_steps(loss_class: Any, model_folder: Path, triplets: Any, folder: Path, **options: Any) -> list[float]:
    torch.manual_seed(0)
    card = st.SentenceTransformerModelCardData(generate_widget_examples=False, local_files_only=True)
    model = st.SentenceTransformer(str(model_folder), device="cpu", model_card_data=card)
    guide = [st.SentenceTransformer(str(model_folder), device="cpu")] if "GIST" in loss_class.__name__ else []
    arguments = st.SentenceTransformerTrainingArguments(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=2e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    loss = loss_class(model, *guide)
    trainer = st.SentenceTransformerTrainer(model=model, args=arguments, train_dataset=triplets, loss=loss)
    trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"batch_sampler": "no_duplicates"}], ids=str)
@pytest.mark.parametrize(
    "name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss", "GISTEmbedLoss"]
)
def test_the_same_steps(name: str, options: dict[str, Any], model_folder: Path, triplets: Any, tmp_path: Path) -> None:
    mine, theirs = (
        losses_of_steps(loss_class, model_folder, triplets, tmp_path / "run", **options)
        for loss_class in (getattr(fused, f"Fused{name}"), getattr(original, name))
    )
    assert len(mine) == 3
    assert mine == pytest.approx(theirs, rel=1e-3 if "bf16" in options else 1e-4)
