"""sentence-transformers' own trainer with a fused loss: nothing but the loss's name changes.

Runs offline in seconds on a small random model: pip install datasets; python examples/sentence_transformers_trainer.py
Under torchrun, ``gather_across_devices=True`` compares every question with the answers of all processes.
"""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from hicl_fast.integrations.sentence_transformers import FusedMultipleNegativesRankingLoss
from hicl_fast.trainer.scratch import write_scratch_model

PAIRS = [
    ("how do bees make honey", "bees turn nectar into honey in the hive"),
    ("why is the sea salty", "rivers carry salt from rocks into the sea"),
    ("when do birds fly south", "birds fly south before the winter comes"),
    ("who invented the telescope", "the telescope was invented by a maker of lenses"),
    ("what makes bread rise", "yeast makes gas that lets bread rise"),
    ("where does the wind come from", "wind comes from air that flows to where it is warm"),
]


def main() -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        return train(Path(folder))


def train(folder: Path) -> list[float]:
    torch.manual_seed(0)
    write_scratch_model([text for pair in PAIRS * 2 for text in pair], folder / "model")
    model = SentenceTransformer(str(folder / "model"), device="cpu")  # adds mean pooling
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *PAIRS])
    dataset = Dataset.from_csv(str(folder / "pairs.csv"), cache_dir=str(folder / "cache"))
    arguments = SentenceTransformerTrainingArguments(
        str(folder / "run"),
        max_steps=8,
        per_device_train_batch_size=len(PAIRS),
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    loss = FusedMultipleNegativesRankingLoss(model, scale=20.0)  # the original's arguments
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss)
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: {losses[0]:.4f} -> {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
