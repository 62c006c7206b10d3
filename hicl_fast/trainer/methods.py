"""The training methods: one class each, and the table that names them. A new method is a class and a line here."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from hicl_fast import FusedHiCLLoss, FusedInfoNCELoss, reference
from hicl_fast.distributed import Gather
from hicl_fast.trainer import mixing
from hicl_fast.trainer.paradigm import GradientParadigm

if TYPE_CHECKING:
    from hicl_fast.trainer.arguments import MethodArguments


class Views(NamedTuple):
    """A batch's embeddings; document b owns the segments ``offsets[b]:offsets[b + 1]``."""

    anchor: Tensor  # (S, D)
    positive: Tensor  # (S, D)
    negative: Tensor | None  # (P, D), each hard negative's column after the other; P = S where there is one
    offsets: Tensor  # (B + 1,) int64
    lengths: Tensor  # (S,) int64, tokens of each segment
    groups: Tensor | None = None  # (B,) int64, the same for documents of the same text


class Method(Protocol):
    """What the trainer asks of a method."""

    segmented: ClassVar[bool]  # cut documents into segments?
    most_columns: ClassVar[int | None]  # of the text: 1 sentence, 2 and positive, None and any number of hard negatives
    max_seq_length: ClassVar[int]  # default of the argument
    options: ClassVar[frozenset[str]]  # which of the options that not all methods have: groups in arguments.py
    fused: Any  # the loss module: ``last`` holds scalars for the log, ``state_dict`` what a checkpoint must keep

    def __init__(self, args: MethodArguments, seed: int = 0) -> None:
        """``seed`` is that of whatever the method draws itself."""
        ...

    def loss(self, views: Views) -> Tensor:
        """The scalar to minimise."""
        ...

    def reference(self, views: Views) -> Tensor:
        """The same in plain PyTorch, in the type of the views: what ``--check_every`` compares with."""
        ...


class SimCSE:
    """A sentence against itself under another dropout mask, or its labelled positive and hard negatives."""

    segmented: ClassVar[bool] = False
    most_columns: ClassVar[int | None] = None
    max_seq_length: ClassVar[int] = 32
    options: ClassVar[frozenset[str]] = frozenset({"pairs"})
    mixes: ClassVar[mixing.Mixes] = mixing.Mixes()

    def __init__(self, args: MethodArguments, seed: int = 0) -> None:
        self.temperature, self.hard_negative_weight = args.temp, args.hard_negative_weight
        self.fused: FusedInfoNCELoss = FusedInfoNCELoss(
            args.temp,
            hard_negative_weight=args.hard_negative_weight,
            backend=args.backend,
            gather=GATHER[args.gather],
            **mixing.modules(self.mixes, args, seed),
        )

    def loss(self, views: Views) -> Tensor:
        return self.fused(
            views.anchor, views.positive, views.negative, query_group=views.groups, key_group=views.groups
        )

    def reference(self, views: Views) -> Tensor:
        return mixing.reference_info_nce(
            self.fused,
            views.anchor,
            views.positive,
            temperature=self.temperature,
            negatives=views.negative,
            hard_negative_weight=self.hard_negative_weight,
            query_group=views.groups,
            key_group=views.groups,
        )


class HNCSENegatives(SimCSE):
    """SimCSE with mixtures of hard negatives."""

    options: ClassVar[frozenset[str]] = SimCSE.options | {"mixed negatives"}
    mixes: ClassVar[mixing.Mixes] = mixing.Mixes(negatives=True)


class HNCSEPositives(SimCSE):
    """SimCSE with positives mixed with hard negatives."""

    options: ClassVar[frozenset[str]] = SimCSE.options | {"mixed positives"}
    mixes: ClassVar[mixing.Mixes] = mixing.Mixes(positives=True)


class HNCSE(SimCSE):
    """Both."""

    options: ClassVar[frozenset[str]] = HNCSENegatives.options | HNCSEPositives.options
    mixes: ClassVar[mixing.Mixes] = mixing.Mixes(negatives=True, positives=True)


class HiCL:
    """Segments against themselves (local) and the documents pooled from them (global)."""

    segmented: ClassVar[bool] = True
    most_columns: ClassVar[int | None] = 1  # a pair's segments don't match
    max_seq_length: ClassVar[int] = 512
    options: ClassVar[frozenset[str]] = frozenset({"segments"})
    mixes: ClassVar[mixing.Mixes] = mixing.Mixes()

    def __init__(self, args: MethodArguments, seed: int = 0) -> None:
        self.settings = {
            "temperature": args.temp,
            "local_weight": args.local_weight,
            "global_weight": args.global_weight,
            "same_sequence": args.same_sequence,
            "pooling": args.segment_pooling,
        }
        self.fused: FusedHiCLLoss = FusedHiCLLoss(
            **self.settings,  # type: ignore[arg-type]
            backend=args.backend,
            gather=GATHER[args.gather],
            **mixing.modules(self.mixes, args, seed),
        )

    def loss(self, views: Views) -> Tensor:
        return self.fused(views.anchor, views.positive, views.offsets, views.lengths, sequence_group=views.groups)

    def reference(self, views: Views) -> Tensor:
        global_loss = functools.partial(mixing.reference_info_nce, self.fused.global_loss)
        return reference.hicl_loss(
            views.anchor,
            views.positive,
            views.offsets,
            views.lengths,
            **self.settings,  # type: ignore[arg-type]
            sequence_group=views.groups,
            global_loss=global_loss,
        )


class HiCLHNCSE(HiCL):
    """HiCL with both of HNCSE's mixings in the global loss."""

    options: ClassVar[frozenset[str]] = HiCL.options | {"mixed negatives", "mixed positives"}
    mixes: ClassVar[mixing.Mixes] = mixing.Mixes(negatives=True, positives=True)


GATHER: dict[str, Gather] = {"none": False, "all": True, "ring": "ring"}

METHODS: dict[str, type[Method]] = {
    "simcse": SimCSE,
    "hncse-hnm": HNCSENegatives,
    "hncse-pm": HNCSEPositives,
    "hncse": HNCSE,
    "hicl": HiCL,
    "hicl+hncse": HiCLHNCSE,
    "paradigm": GradientParadigm,
}
