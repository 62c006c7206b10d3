"""SimCSE's loss (github.com/princeton-nlp/SimCSE) without its broadcast cosines: for the end of its ``cl_forward``."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from hicl_fast import functional as HF

__all__ = ["simcse_loss"]


def simcse_loss(
    z1: Tensor,  # (N, D)
    z2: Tensor,  # (N, D)
    z3: Tensor | None = None,  # (N, D)
    *,
    temperature: float = 0.05,
    hard_negative_weight: float = 0.0,
    gather: bool = False,
) -> Tensor:
    r"""What ``cl_forward`` computes from its representations (arXiv 2104.08821, eq. 1 and 5).

    .. math:: \mathrm{loss}_i = -\log \frac{e^{\cos(z1_i, z2_i)/\tau}}
              {\sum_j e^{\cos(z1_i, z2_j)/\tau} + \sum_j e^{\cos(z1_i, z3_j)/\tau + w\,[i = j]}}

    Args:
        z1: (N, D) the sentences.
        z2: (N, D) the same sentences again, or their positives.
        z3: (N, D) hard negatives.
        temperature: τ > 0, SimCSE's ``--temp``.
        hard_negative_weight: w, a logit, as SimCSE's ``--hard_negative_weight`` is. Without z3 it has no effect.
        gather: join the representations of all processes first, as SimCSE does in training: every process computes
            the loss of the joined batch, and has gradients for its own rows. Without a process group it has no effect.

    Returns:
        The mean over the rows; a scalar, float32 (float64 where an input is).
    """
    if gather:
        z1, z2 = joined(z1), joined(z2)
        z3 = None if z3 is None else joined(z3)
    weight = hard_negative_weight if z3 is not None else 0.0
    return HF.info_nce(z1, z2, temperature=temperature, negatives=z3, hard_negative_weight=weight)


def joined(rows: Tensor) -> Tensor:  # (N, D) -> (N · processes, D)
    """All processes' rows, N on each, of which this one's keep their gradients; the rows where there is no process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    parts = [torch.zeros_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.detach().contiguous())
    parts[dist.get_rank()] = rows
    return torch.cat(parts)
