"""A sentence-transformers model trained with its ranking loss, fused, and with HNCSE's hard-negative mixing.

Runs offline in seconds on a small random model: python examples/sentence_transformers_hnm.py
With SentenceTransformerTrainer, hand it the same ``loss``: SentenceTransformerTrainer(model=..., loss=loss, ...).
"""

from __future__ import annotations

import tempfile

import torch
from sentence_transformers import SentenceTransformer

from hicl_fast import HardNegativeMixing
from hicl_fast.integrations.sentence_transformers import FusedHNCSELoss, FusedMultipleNegativesRankingLoss
from hicl_fast.trainer.scratch import write_scratch_model

QUESTIONS = [
    "how do bees make honey",
    "why is the sea salty",
    "when do birds fly south",
    "who invented the telescope",
    "what makes bread rise",
    "where does the wind come from",
]
ANSWERS = [
    "bees turn nectar into honey in the hive",
    "rivers carry salt from rocks into the sea",
    "birds fly south before the winter comes",
    "the telescope was invented by a maker of lenses",
    "yeast makes gas that lets bread rise",
    "wind comes from air that flows to where it is warm",
]


def train(model: SentenceTransformer, loss_fn: torch.nn.Module, columns: list[list[str]]) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    losses = []
    for _ in range(8):
        loss = loss_fn([model.preprocess(column) for column in columns], None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> list[float]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_scratch_model((QUESTIONS + ANSWERS) * 2, folder)
        model = SentenceTransformer(folder, device="cpu")  # adds mean pooling
    ranking = FusedMultipleNegativesRankingLoss(model, scale=20.0)  # sentence-transformers' own arguments
    losses = train(model, ranking, [QUESTIONS, ANSWERS])
    print(f"ranking loss: {losses[0]:.4f} -> {losses[-1]:.4f}")
    mixing = HardNegativeMixing(k=4, num_mixed=8)  # eight mixtures of two of each row's four hardest negatives
    hncse = FusedHNCSELoss(model, temperature=0.05, hard_negative_mixing=mixing)
    more = train(model, hncse, [QUESTIONS, ANSWERS])
    print(f"with mixed hard negatives: {more[0]:.4f} -> {more[-1]:.4f}")
    return losses + more


if __name__ == "__main__":
    main()
