"""Hard-negative mixing as plain PyTorch, for derivatives that no backend has: second ones, forward mode, ``torch.func``.

It is the reference's equation with the reference's cost: every mixture is built.
"""

from __future__ import annotations

from torch import Tensor

from hicl_fast.ops.mixed_negatives.reference import mixed_negative_logits


def mixed_negatives(query: Tensor, bank: Tensor, index: Tensor, pairs: Tensor, alpha: float) -> Tensor:  # (N, m)
    return mixed_negative_logits(query, bank, index, pairs, alpha=alpha, temperature=1.0)
