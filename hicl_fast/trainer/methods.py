"""The training methods: one class each, and the table that names them. A new method is a class and a line here."""

from __future__ import annotations

import functools
from typing import ClassVar

from torch import Tensor

from hicl_fast import FusedHiCLLoss, FusedInfoNCELoss, reference
from hicl_fast.trainer import mixing
from hicl_fast.trainer.method import GATHER, Arguments, Method, Views
from hicl_fast.trainer.paradigm import GradientParadigm


class SimCSE:
    """A sentence against itself under another dropout mask, or its labelled positive and hard negatives."""

    segmented: ClassVar[bool] = False
    most_columns: ClassVar[int | None] = None
    max_seq_length: ClassVar[int] = 32
    options: ClassVar[frozenset[str]] = frozenset({"pairs"})
    mixes: ClassVar[mixing.Mixes] = mixing.Mixes()

    def __init__(self, args: Arguments, seed: int = 0) -> None:
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

    def __init__(self, args: Arguments, seed: int = 0) -> None:
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


METHODS: dict[str, type[Method]] = {
    "simcse": SimCSE,
    "hncse-hnm": HNCSENegatives,
    "hncse-pm": HNCSEPositives,
    "hncse": HNCSE,
    "hicl": HiCL,
    "hicl+hncse": HiCLHNCSE,
    "paradigm": GradientParadigm,
}
