"""HiCL's hierarchical loss as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hicl_fast import _checks as check
from hicl_fast import functional as HF
from hicl_fast.losses.hncse import HardNegativeMixing, PositiveMixing
from hicl_fast.losses.info_nce import FusedInfoNCELoss
from hicl_fast.losses.pooling import Pooling, SegmentPooling
from hicl_fast.reference.info_nce import SameGroup


class FusedHiCLLoss(nn.Module):
    r"""Local loss between segments plus global loss between pooled sequences (HiCL, arXiv 2310.09720).

    .. math:: L = \alpha L_{\mathrm{local}} + \beta L_{\mathrm{global}}

    :math:`L_{\mathrm{local}}` is InfoNCE between all S segments of the two views, where the other segments of the same
    sequence are left out of the denominator (or counted as negatives, or as positives);
    :math:`L_{\mathrm{global}}` is InfoNCE between the sequences' weighted means of segments.
    Called without offsets every row is a sequence, and the loss is SimCSE's.

    Args:
        temperature: τ > 0 of both losses.
        local_weight: α.
        global_weight: β; default 1 − α.
        same_sequence: what segments of the row's own sequence are in the local loss: ``"exclude"`` (the paper's
            choice), ``"negative"`` or ``"positive"``.
        pooling: ``"length"`` weights a segment by its tokens, ``"mean"`` weights all alike.
        hard_negative_mixing: HNCSE's mixtures of hard negatives, in the global loss.
        positive_mixing: HNCSE's mixing of positives, in the global loss.
        queue_size: rows of earlier batches kept as negatives of the global loss; 0 keeps none.
        precision: ``None``, ``"float32"`` or ``"bf16"``; see :func:`hicl_fast.functional.info_nce`.
        backend: ``"auto"``, ``"torch"``, ``"cpp"`` or ``"triton"``.

    Attributes:
        last: after a call, detached scalars for logging: ``loss``, ``positive_similarity``,
            ``hardest_negative_similarity`` (both of the sequences) and, with offsets, ``local`` and ``global``.

    Example:
        >>> loss_fn = FusedHiCLLoss()
        >>> loss_fn(z1, z2).backward()                                   # SimCSE
        >>> loss_fn(segments, segments_again, offsets, lengths).backward()  # HiCL
    """

    def __init__(
        self,
        temperature: float = 0.05,
        *,
        local_weight: float = 0.3,
        global_weight: float | None = None,
        same_sequence: SameGroup = "exclude",
        pooling: Pooling = "length",
        hard_negative_mixing: HardNegativeMixing | None = None,
        positive_mixing: PositiveMixing | None = None,
        queue_size: int = 0,
        precision: str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check.one_of("same_sequence", same_sequence, ("exclude", "negative", "positive"))
        self.local_weight = local_weight
        self.global_weight = 1.0 - local_weight if global_weight is None else global_weight
        self.temperature, self.same_sequence = temperature, same_sequence
        self.precision, self.backend = precision, backend
        self.pool = SegmentPooling(pooling, backend=backend)
        self.global_loss = FusedInfoNCELoss(
            temperature,
            queue_size=queue_size,
            hard_negative_mixing=hard_negative_mixing,
            positive_mixing=positive_mixing,
            precision=precision,
            backend=backend,
        )
        self._parts: dict[str, Tensor] = {}

    @property
    def last(self) -> dict[str, Tensor]:
        return {**self.global_loss.last, **self._parts}

    def forward(
        self,
        segments: Tensor,
        segments_positive: Tensor,
        offsets: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """The loss of two views of the same segments.

        Args:
            segments: (S, D) embeddings of the segments.
            segments_positive: (S, D) the same segments under another dropout mask.
            offsets: (B + 1,) int64; sequence b owns rows ``offsets[b]:offsets[b + 1]``. ``None``: every row is one.
            lengths: (S,) tokens of each segment, for ``pooling="length"``.

        Returns:
            A scalar, float32 (float64 where an input is float64).
        """
        if offsets is None:
            loss = self.global_loss(segments, segments_positive)
            self._parts = {}
            return loss
        check.floating_matrix("segments_positive", segments_positive, "(S, D)", like=segments)
        if segments_positive.shape != segments.shape:
            raise ValueError(
                f"segments_positive: expected shape {tuple(segments.shape)}, as segments has, "
                f"got {check.describe(segments_positive)}"
            )
        pooled = self.pool(segments, offsets, lengths)  # (B, D); checks the offsets
        pooled_positive = self.pool(segments_positive, offsets, lengths)
        global_loss = self.global_loss(pooled, pooled_positive)
        sequence = sequence_index(offsets, segments.shape[0])
        local_loss = HF.info_nce(
            segments,
            segments_positive,
            temperature=self.temperature,
            query_group=sequence,
            key_group=sequence,
            same_group=self.same_sequence,
            precision=self.precision,
            backend=self.backend,
        )
        loss = self.local_weight * local_loss + self.global_weight * global_loss
        self._parts = {"loss": loss.detach(), "local": local_loss.detach(), "global": global_loss.detach()}
        return loss

    def extra_repr(self) -> str:
        return f"local_weight={self.local_weight}, global_weight={self.global_weight}, same_sequence={self.same_sequence!r}"


def sequence_index(offsets: Tensor, num_segments: int) -> Tensor:  # (B + 1,) -> (S,)
    """The sequence each segment belongs to."""
    sequences = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    return torch.repeat_interleave(sequences, offsets.diff(), output_size=num_segments)
