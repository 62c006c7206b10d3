"""The training methods: one class each, and the table that names them. A new method is a class and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from hicl_fast import FusedHiCLLoss, FusedInfoNCELoss, reference

if TYPE_CHECKING:
    from hicl_fast.trainer.arguments import MethodArguments


class Views(NamedTuple):
    """A batch's embeddings; document b owns the segments ``offsets[b]:offsets[b + 1]``."""

    anchor: Tensor  # (S, D)
    positive: Tensor  # (S, D)
    negative: Tensor | None  # (S, D)
    offsets: Tensor  # (B + 1,) int64
    lengths: Tensor  # (S,) int64, tokens of each segment


class Method(Protocol):
    """What the trainer asks of a method."""

    segmented: ClassVar[bool]  # cut documents into segments?
    max_seq_length: ClassVar[int]  # default of the argument
    fused: nn.Module  # has ``last``, scalars for the log

    def __init__(self, args: MethodArguments) -> None: ...

    def loss(self, views: Views) -> Tensor:
        """The scalar to minimise."""
        ...

    def reference(self, views: Views) -> Tensor:
        """The same in plain PyTorch, in the type of the views: what ``--check_every`` compares with."""
        ...


class SimCSE:
    """A sentence against itself under another dropout mask, or its labelled positive and hard negative."""

    segmented: ClassVar[bool] = False
    max_seq_length: ClassVar[int] = 32

    def __init__(self, args: MethodArguments) -> None:
        self.temperature, self.hard_negative_weight = args.temp, args.hard_negative_weight
        self.fused: nn.Module = FusedInfoNCELoss(
            args.temp, hard_negative_weight=args.hard_negative_weight, backend=args.backend
        )

    def loss(self, views: Views) -> Tensor:
        return self.fused(views.anchor, views.positive, views.negative)

    def reference(self, views: Views) -> Tensor:
        return reference.info_nce(
            views.anchor,
            views.positive,
            temperature=self.temperature,
            negatives=views.negative,
            hard_negative_weight=self.hard_negative_weight,
        )


class HiCL:
    """Segments against themselves (local) and the documents pooled from them (global)."""

    segmented: ClassVar[bool] = True
    max_seq_length: ClassVar[int] = 512

    def __init__(self, args: MethodArguments) -> None:
        self.settings = {
            "temperature": args.temp,
            "local_weight": args.local_weight,
            "global_weight": args.global_weight,
            "same_sequence": args.same_sequence,
            "pooling": args.segment_pooling,
        }
        self.fused: nn.Module = FusedHiCLLoss(**self.settings, backend=args.backend)  # type: ignore[arg-type]

    def loss(self, views: Views) -> Tensor:
        return self.fused(views.anchor, views.positive, views.offsets, views.lengths)

    def reference(self, views: Views) -> Tensor:
        return reference.hicl_loss(views.anchor, views.positive, views.offsets, views.lengths, **self.settings)  # type: ignore[arg-type]


METHODS: dict[str, type[Method]] = {"simcse": SimCSE, "hicl": HiCL}
