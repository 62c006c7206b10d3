"""SimCSE in a plain training loop: each sentence encoded twice, told apart by dropout alone.

Runs offline in seconds on a small random model: python examples/simcse.py
"""

from __future__ import annotations

import tempfile

import torch
from transformers import AutoModel, AutoTokenizer

from hicl_fast import FusedInfoNCELoss
from hicl_fast.trainer.scratch import write_scratch_model

SENTENCES = [
    "A man is playing a guitar on the stage.",
    "Two dogs run across the wet field.",
    "The train to the coast leaves at noon.",
    "She reads an old letter by the window.",
    "Snow has covered the road to the village.",
    "The children build a castle out of sand.",
    "He repairs the clock with great care.",
    "A storm is coming in from the sea.",
]


def main() -> list[float]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_scratch_model(SENTENCES * 2, folder)  # or the name of a model on the hub
        tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    encoder.train()  # dropout makes the two views
    loss_fn = FusedInfoNCELoss(temperature=0.05)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    losses = []
    for step in range(15):
        z1, z2 = (encoder(**batch).last_hidden_state[:, 0] for _ in range(2))  # (N, D) each
        loss = loss_fn(z1, z2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: loss {loss:.4f}, cosine of positives {loss_fn.last['positive_similarity']:.3f}")
    return losses


if __name__ == "__main__":
    main()
