"""What an InfoNCE call consists of, once its arguments have been checked: the one thing every backend is handed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hicl_fast.ops.autograd import readable
from hicl_fast.reference.info_nce import ANGLE_CLAMP, NORM_FLOOR

__all__ = [
    "ANGLE_CLAMP",
    "DIFFERENTIABLE",
    "NORM_FLOOR",
    "NOTHING",
    "Gradients",
    "Mixing",
    "Problem",
    "RowStatistics",
    "Wanted",
    "check_scale",
    "host_number",
    "scale_on",
    "sum_type",
]


def host_number(value: float) -> Tensor:
    """() float64 in host memory, whatever PyTorch's default device is."""
    return torch.scalar_tensor(value, dtype=torch.float64, device="cpu")


def sum_type(*inputs: Tensor | None) -> torch.dtype:
    """The type that sums of the inputs are kept in: float64 if one of them is float64, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in inputs) else torch.float32


def check_scale(scale: Tensor) -> None:  # () 1 / temperature
    """Raise ``ValueError`` for a temperature that is no number above 0; looks at host memory only."""
    if (values := readable(scale)) is not None and not (lowest := float(values.min())) > 0:
        raise ValueError(f"temperature: expected a number above 0, got {1.0 / lowest if lowest else 0.0!r}")


def scale_on(scale: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The scale () where the sums are. The host's number is written there: a copy from its memory would be waited for."""
    if scale.device.type == "cpu" != device.type:
        return torch.full((), float(scale), dtype=dtype, device=device)
    return scale.detach().to(device=device, dtype=dtype)


class Wanted(NamedTuple):
    """Which inputs need a gradient."""

    query: bool
    key: bool
    negatives: bool
    extra_logits: bool
    scale: bool


NOTHING = Wanted(False, False, False, False, False)
DIFFERENTIABLE = Wanted._fields


class Gradients(NamedTuple):
    """One gradient per input in the type the sums are kept in; an empty tensor where none was wanted."""

    query: Tensor  # (N, D)
    key: Tensor  # (M, D)
    negatives: Tensor  # (P, D)
    extra_logits: Tensor  # (N, E)
    scale: Tensor  # ()


class Mixing(NamedTuple):
    """Mixtures of each row's hard negatives among the keys, as further columns of that row (HNCSE, arXiv 2411.12156).

    Args:
        k: how many of a row's most similar keys, beside its positive and its group, are mixed.
        pairs: (N, m, 2) int64, which two of the k each mixture is of, from 0; for example of :func:`random_pairs`.
        alpha: the first one's share.
    """

    k: int
    pairs: Tensor
    alpha: float = 0.5


class RowStatistics(NamedTuple):
    """What one sweep over the similarities leaves behind for each row."""

    loss: Tensor  # (N,)
    negative_lse: Tensor  # (N,) log-sum-exp over the row's columns without its positive; −inf where there is none
    column_lse: Tensor  # (M,) the same for the column loss; empty unless the loss is symmetric
    positive: Tensor  # (N,) similarity of the positive, before any margin
    hardest: Tensor  # (N,) largest similarity among the negatives; −inf where there is none
    hard_negatives: Tensor | None = None  # (N, k) int64, with Mixing: the keys that were mixed
    total: Tensor | None = None  # () row_weight · Σ loss, where the backend has it at hand


@dataclass(eq=False, slots=True)
class Problem:
    """The columns of a row are, in order: M keys, P explicit negatives, B bank rows, E extra logits."""

    query: Tensor  # (N, D)
    key: Tensor  # (M, D)
    scale: Tensor  # () 1 / temperature; on the CPU where its value is known to the host
    target: Tensor | None  # (N,) int64; None: row i's positive is key i
    negatives: Tensor | None  # (P, D)
    bank: Tensor | None  # (B, D)
    extra_logits: Tensor | None  # (N, E)
    query_group: Tensor | None  # (N,) int64
    key_group: Tensor | None  # (M,) int64
    hard_negative_weight: float  # added to the logit of row i's own negative; 0: no negative is anyone's own
    same_group: str  # "exclude" | "negative" | "positive"
    margin: float  # radians
    symmetric: bool  # only without negatives, bank, extra logits, target and several positives
    precision: str  # of the products: "float32" | "bf16"

    @property
    def dtype(self) -> torch.dtype:
        """The type sums, losses and logits are kept in: float64 if an input is float64, else float32."""
        return sum_type(self.query, self.key, self.negatives, self.bank, self.extra_logits)

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The inputs that can have gradients, in the order of :class:`Wanted` and :class:`Gradients`."""
        return self.query, self.key, self.negatives, self.extra_logits, self.scale

    def check_values(self) -> None:
        """Raise ``ValueError`` for a target or temperature out of range.

        Looks at host memory only: a device is never waited for.
        """
        check_scale(self.scale)
        if (target := readable(self.target)) is not None:
            low, high = (int(bound) for bound in torch.aminmax(target))
            if low < 0 or high >= self.key.shape[0]:
                raise ValueError(
                    f"target: expected indices of keys, 0 to {self.key.shape[0] - 1}, got values from {low} to {high}"
                )
