"""A loss over the batches of all processes, under DistributedDataParallel, with ranks of unequal size.

    torchrun --nproc_per_node 2 examples/distributed.py
    torchrun --nproc_per_node 4 examples/distributed.py --gather ring

Nothing is downloaded: noisy views of made-up vectors stand for two encodings of the same sentences. On GPUs the same
program takes backend "nccl" and tensors on ``cuda:LOCAL_RANK``.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hicl_fast import FusedInfoNCELoss


def views(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(N, 32) twice: what the views share lies in few dimensions, and the noise in all."""
    shared = torch.randn(rows, 4, generator=generator) @ torch.eye(4, 32)
    first, second = (shared + 0.3 * torch.randn(rows, 32, generator=generator) for _ in range(2))
    return first, second


def train(gather: str, steps: int) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    rows = 96 + 32 * rank  # every rank may have a batch of its own size

    torch.manual_seed(0)
    encoder: nn.Module = nn.Linear(32, 16)
    if dist.is_initialized():
        encoder = DistributedDataParallel(encoder)
    loss_fn = FusedInfoNCELoss(0.1, gather="ring" if gather == "ring" else True)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(rank)
    for step in range(steps):
        first, second = encoder(torch.cat(views(rows, generator))).chunk(2)
        optimizer.zero_grad()
        loss_fn(first, second).backward()  # the rank's part: the mean over the ranks is the joined batch's loss
        optimizer.step()
        if rank == 0 and (step % 10 == 0 or step == steps - 1):
            print(f"step {step:3d}  loss of the joined batch {loss_fn.last['loss'].item():.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gather", choices=["all", "ring"], default="all")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()

    torch.set_num_threads(1)
    if "RANK" in os.environ:  # under torchrun
        dist.init_process_group("gloo")
    # A function of its own: DistributedDataParallel must be gone before the group is. Where it holds the group last,
    # PyTorch waits for gloo's thread with Python's lock in its hand, and that thread may be waiting for the lock.
    train(args.gather, args.steps)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
