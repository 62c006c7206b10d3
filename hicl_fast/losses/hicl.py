"""HiCL's hierarchical loss as a module."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hicl_fast import _checks as check
from hicl_fast import functional as HF
from hicl_fast.distributed import Gather, Ranks, agree, attempt, joined_means, ranks_of
from hicl_fast.distributed.gathering import describe_rows
from hicl_fast.distributed.info_nce import Part, joined_info_nce
from hicl_fast.losses.hncse import HardNegativeMixing, PositiveMixing
from hicl_fast.losses.info_nce import FusedInfoNCELoss, Given
from hicl_fast.losses.pooling import Pooling, SegmentPooling
from hicl_fast.ops.common.autograd import unwrapped
from hicl_fast.ops.common.constants import SameGroup
from hicl_fast.ops.segment_pool.sequences import sequence_of_segments


class FusedHiCLLoss(nn.Module):
    r"""Local loss between segments plus global loss between pooled sequences (HiCL, arXiv 2310.09720).

    .. math:: L = \alpha L_{\mathrm{local}} + \beta L_{\mathrm{global}}

    :math:`L_{\mathrm{local}}` is InfoNCE between all S segments of the two views, where the other segments of the same
    sequence are left out of the denominator (or counted as negatives, or as positives);
    :math:`L_{\mathrm{global}}` is InfoNCE between the sequences' weighted means of segments.
    Called without offsets every row is a sequence, and the loss is SimCSE's.

    Args:
        temperature: τ > 0 of both losses.
        local_weight: α ≥ 0; without ``global_weight`` at most 1.
        global_weight: β ≥ 0; default 1 − α. One of the two is above 0.
        same_sequence: what segments of the row's own sequence are in the local loss: ``"exclude"`` (the paper's
            choice), ``"negative"`` or ``"positive"``.
        pooling: ``"length"`` weights a segment by its tokens, ``"mean"`` weights all alike.
        hard_negative_mixing: HNCSE's mixtures of hard negatives, in the global loss.
        positive_mixing: HNCSE's mixing of positives, in the global loss.
        queue_size: rows of earlier batches kept as negatives of the global loss; 0 keeps none. They keep their sequences'
            groups; see :class:`FusedInfoNCELoss`.
        precision: ``None``, ``"float32"`` or ``"bf16"``; see :func:`hicl_fast.functional.info_nce`.
        backend: ``"auto"``, ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.
        gather: both losses over the sequences of all ranks, each rank with sequences and segments of its own number:
            ``True``, or ``"ring"``; see :class:`FusedInfoNCELoss`. The mean over the ranks is the joined batch's loss.
        process_group: the ranks; default: all. Giving one means ``gather=True``.

    Attributes:
        last: after a call, detached scalars for logging: ``loss``, ``positive_similarity``,
            ``hardest_negative_similarity`` (both of the sequences; the latter absent where no sequence has a negative)
            and, with offsets, ``local`` and ``global``.

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
        gather: Gather = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check.one_of("same_sequence", same_sequence, ("exclude", "negative", "positive"))
        self.local_weight, self.global_weight = _weights(local_weight, global_weight)
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
            gather=gather,
            process_group=process_group,
        )
        self.gather, self.process_group = self.global_loss.gather, process_group
        if self.gather == "ring" and same_sequence == "positive":
            raise ValueError(
                'same_sequence: expected "exclude" or "negative" with gather="ring", which keeps a log-sum-exp of '
                "other ranks' segments and not their logits"
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
        *,
        sequence_group: Tensor | None = None,
    ) -> Tensor:
        """The loss of two views of the same segments.

        Args:
            segments: (S, D) embeddings of the segments.
            segments_positive: (S, D) the same segments under another dropout mask.
            offsets: (B + 1,) int64; sequence b owns rows ``offsets[b]:offsets[b + 1]``. ``None``: every row is one.
            lengths: (S,) tokens of each segment, for ``pooling="length"``.
            sequence_group: (B,) int64 group of each sequence, as its number in the data: what is of one group is one
                sequence to the local loss, and in the global loss and its queue nobody's negative there.

        Returns:
            A scalar, float32 (float64 where an input is float64).
        """
        if offsets is None:
            # With gather all ranks have to hear of what is wrong, and do in the global loss.
            if sequence_group is not None and not self.gather:
                check.floating_matrix("segments", segments, "(S, D)")
                check.index_vector(
                    "sequence_group", sequence_group, len(segments), "a group for each sequence", segments
                )
            loss = self.global_loss(segments, segments_positive, query_group=sequence_group, key_group=sequence_group)
            self._parts = {}
            return loss
        if self.gather and (ranks := ranks_of(self.process_group)).size > 1:
            return self._forward_joined(segments, segments_positive, offsets, lengths, sequence_group, ranks)
        pooled, pooled_positive = self._pool(segments, segments_positive, offsets, lengths, sequence_group)
        global_loss = self.global_loss(pooled, pooled_positive, query_group=sequence_group, key_group=sequence_group)
        sequence = sequence_of_segments(offsets, segments.shape[0])
        if sequence_group is not None:
            sequence = sequence_group[sequence]
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
        parts = {"loss": loss, "local": local_loss, "global": global_loss}
        self._parts = {name: unwrapped(part) for name, part in parts.items()}
        return loss

    def _pool(
        self,
        segments: Tensor,
        segments_positive: Tensor,
        offsets: Tensor,
        lengths: Tensor | None,
        sequence_group: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Both views' sequences, (B, D) each."""
        check.floating_matrix("segments", segments, "(S, D)")
        check.floating_matrix("segments_positive", segments_positive, "(S, D)", like=segments)
        if segments_positive.shape != segments.shape:
            raise ValueError(
                f"segments_positive: expected shape {tuple(segments.shape)}, as segments has, "
                f"got {check.describe(segments_positive)}"
            )
        pooled = self.pool(segments, offsets, lengths)  # checks the offsets
        if sequence_group is not None:
            check.index_vector("sequence_group", sequence_group, len(pooled), "a group for each sequence", pooled)
        return pooled, self.pool(segments_positive, offsets, lengths)

    @torch.compiler.disable
    def _forward_joined(
        self,
        segments: Tensor,
        segments_positive: Tensor,
        offsets: Tensor,
        lengths: Tensor | None,
        sequence_group: Tensor | None,
        ranks: Ranks,
    ) -> Tensor:
        pooled, failure = attempt(lambda: self._pool(segments, segments_positive, offsets, lengths, sequence_group))
        rows: dict[str, int] = {}
        terms: dict[str, object] = {}
        if pooled is not None:
            rows = {"sequences": len(pooled[0]), "segments": len(segments)}
            terms = {
                "loss": type(self).__name__,
                "segments": describe_rows(segments),
                "segments_positive": describe_rows(segments_positive),
                "options": self.extra_repr(),
                "groups": sequence_group is not None,
                "global loss": self.global_loss.terms(),
            }
        shares = agree(ranks, rows, terms, failure)
        assert pooled is not None  # else agree has raised

        sequences, own_segments = shares["sequences"], shares["segments"]
        global_loss = self.global_loss.joined(
            Given(*pooled, query_group=sequence_group, key_group=sequence_group),
            ranks,
            {"query": sequences, "key": sequences},
        )
        sequence = sequence_of_segments(offsets, len(segments))
        sequence = sequences.first + sequence if sequence_group is None else sequence_group[sequence]
        local = joined_info_nce(
            Part(segments, own_segments, sequence),
            Part(segments_positive, own_segments, sequence),
            None,
            ranks,
            gather=self.gather,
            temperature=self.temperature,
            same_group=self.same_sequence,
            precision=self.precision,
            backend=self.backend,
        )
        parts = {
            "local": joined_means(local, own_segments, ranks)["loss"],
            "global": self.global_loss.last["loss"],
        }
        self._parts = {"loss": self.local_weight * parts["local"] + self.global_weight * parts["global"], **parts}
        return self.local_weight * local.loss + self.global_weight * global_loss

    def extra_repr(self) -> str:
        return f"local_weight={self.local_weight}, global_weight={self.global_weight}, same_sequence={self.same_sequence!r}"


def _weights(local: float, global_: float | None) -> tuple[float, float]:
    """α and β. A negative one would drive apart what belongs together, and without either there is nothing to learn."""
    check.non_negative_number("local_weight", local)
    if global_ is None:
        if local > 1.0:
            raise ValueError(
                f"local_weight: expected at most 1 where global_weight, by default 1 - local_weight, is not given, "
                f"got {check.shown(local)}"
            )
        return local, 1.0 - local
    check.non_negative_number("global_weight", global_)
    if local == global_ == 0.0:
        raise ValueError("global_weight: expected a number above 0 where local_weight is 0, got 0")
    return local, global_
