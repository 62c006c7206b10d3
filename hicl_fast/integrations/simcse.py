"""SimCSE's loss (github.com/princeton-nlp/SimCSE) without its broadcast cosines: for the end of its ``cl_forward``."""

from __future__ import annotations

from torch import Tensor

from hicl_fast import functional as HF
from hicl_fast.distributed import ranks_of
from hicl_fast.losses import FusedInfoNCELoss

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
        gather: the loss of the joined batch of all processes, as in SimCSE's training: every process gets its value,
            and its gradients for the process's own rows. Processes may have different numbers of rows, and each
            compares only its own rows with everyone's. Without a process group it has no effect.

    Returns:
        The mean over the rows; a scalar, float32 (float64 where an input is).

    Raises:
        TypeError, ValueError: naming the argument; with ``gather``, on every process.
    """
    weight = hard_negative_weight if z3 is not None else 0.0
    if gather and (ranks := ranks_of()).size > 1:
        return _joined(z1, z2, z3, FusedInfoNCELoss(temperature, hard_negative_weight=weight, gather=True), ranks.size)
    return HF.info_nce(z1, z2, temperature=temperature, negatives=z3, hard_negative_weight=weight)


def _joined(z1: Tensor, z2: Tensor, z3: Tensor | None, loss_fn: FusedInfoNCELoss, num_processes: int) -> Tensor:
    """The joined batch's loss, of which this process computes its own rows' part.

    ``loss_fn`` weighs a part for the mean over the processes, which DistributedDataParallel takes. SimCSE's joined loss
    is the sum of the parts.
    """
    part = loss_fn(z1, z2, z3) / num_processes
    return part + (loss_fn.last["loss"] - part).detach()
