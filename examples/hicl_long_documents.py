"""HiCL on documents of different lengths: segments are encoded, pooled by their tokens, and both levels contrasted.

Runs offline in seconds on a small random model: python examples/hicl_long_documents.py
"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from hicl_fast import FusedHiCLLoss
from hicl_fast.trainer.scratch import write_scratch_model
from hicl_fast.trainer.slicing import slice_documents

DOCUMENTS = [
    "The river rises in the hills. It runs through two lakes and past the old mill, and joins the sea near the port. "
    "In spring it floods the meadows, and the farmers move their cattle to the higher fields until the water falls.",
    "A small museum shows the tools of the town's clockmakers.",
    "The observatory stands on a mountain far from any light. Its mirror is eight metres wide, and on clear nights it "
    "follows the faintest galaxies for hours. Visitors may come in the afternoon, when the dome is closed.",
    "The market opens at six. Fish comes first, then bread, and by nine the flower sellers have filled the square.",
]


def main() -> list[float]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_scratch_model(DOCUMENTS * 2, folder)
        tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    encoder.train()  # dropout makes the two views
    batch = slice_documents(tokenizer, DOCUMENTS, segment_length=16, max_segments=8)
    lengths = batch.attention_mask.sum(dim=1)  # (S,) tokens of each segment

    def embed() -> Tensor:  # (S, D): the mean over a segment's tokens
        hidden = encoder(batch.input_ids, batch.attention_mask).last_hidden_state
        return (hidden * batch.attention_mask[:, :, None]).sum(dim=1) / lengths[:, None]

    print(f"{len(DOCUMENTS)} documents, {batch.offsets.diff().tolist()} segments")
    loss_fn = FusedHiCLLoss(temperature=0.05, local_weight=0.3)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    losses = []
    for step in range(12):
        loss = loss_fn(embed(), embed(), batch.offsets, lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: local {loss_fn.last['local']:.4f}, global {loss_fn.last['global']:.4f}")
    return losses


if __name__ == "__main__":
    main()
