"""Texts that come twice in a batch, and the one line that keeps an answer from being its own negative.

Runs offline in seconds on a small random model: python examples/duplicate_texts.py
"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from hicl_fast import FusedInfoNCELoss
from hicl_fast.trainer.scratch import write_scratch_model

PAIRS = [
    ("Who repairs the clock?", "He repairs the clock."),
    ("What has covered the road?", "Snow has covered the road."),
    ("Who repairs old things?", "He repairs the clock."),  # the first answer again
    ("What has covered the road?", "A storm left snow on it."),  # the second question again
    ("When does the train leave?", "The train leaves at noon."),
    ("What comes in from the sea?", "A storm comes in from the sea."),
]


def ids_of(texts: list[tuple[str, str]]) -> Tensor:  # (N, 2) int64
    """A number for each text, the same where texts are."""
    numbers: dict[str, int] = {}
    return torch.tensor([[numbers.setdefault(text, len(numbers)) for text in row] for row in texts])


def main() -> list[float]:
    torch.manual_seed(0)
    questions, answers = (list(texts) for texts in zip(*PAIRS, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        write_scratch_model((questions + answers) * 2, folder)  # or the name of a model on the hub
        tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    loss_fn = FusedInfoNCELoss(temperature=0.05)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    batch = tokenizer(questions + answers, padding=True, return_tensors="pt")
    ids, losses = ids_of(PAIRS), []
    for step in range(15):
        query, key = encoder(**batch).last_hidden_state[:, 0].chunk(2)  # (N, D) each
        # An answer is no negative of a question that is asked twice, nor of one that it answers as well.
        loss = loss_fn(query, key, query_group=ids, key_group=ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: loss {loss:.4f}; without the ids it would be {loss_fn(query, key):.4f}")
    return losses


if __name__ == "__main__":
    main()
