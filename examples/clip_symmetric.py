"""CLIP's symmetric loss between two encoders, with its learned temperature, in a plain training loop.

Random vectors stand in for images and texts; runs in seconds: python examples/clip_symmetric.py
In open_clip's training code, hicl_fast.integrations.open_clip.ClipLoss takes the place of open_clip.ClipLoss.
"""

from __future__ import annotations

import torch
from torch import nn

from hicl_fast import FusedInfoNCELoss

BATCH_SIZE, IMAGE_DIM, TEXT_DIM, DIM = 256, 48, 32, 64


def main() -> list[float]:
    torch.manual_seed(0)
    shared = torch.randn(BATCH_SIZE, 16)  # what an image and its text have in common
    images, texts = shared @ torch.randn(16, IMAGE_DIM), shared @ torch.randn(16, TEXT_DIM)
    image_tower, text_tower = (
        nn.Sequential(nn.Linear(dim, 128), nn.GELU(), nn.Linear(128, DIM)) for dim in (IMAGE_DIM, TEXT_DIM)
    )
    loss_fn = FusedInfoNCELoss(temperature=0.07, learnable_temperature=True, symmetric=True)
    optimizer = torch.optim.AdamW(nn.ModuleList([image_tower, text_tower, loss_fn]).parameters(), lr=2e-3)
    losses = []
    for step in range(30):
        loss = loss_fn(image_tower(images), text_tower(texts))  # rows need not be normalised
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 9:
            print(f"step {step}: loss {loss:.4f}, temperature {loss_fn.temperature():.4f}")
    return losses


if __name__ == "__main__":
    main()
