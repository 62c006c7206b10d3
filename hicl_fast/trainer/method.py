"""What a training method is, to the trainer that calls it and to the arguments that it is made from."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from hicl_fast.distributed import Gather

GATHER: dict[str, Gather] = {"none": False, "all": True, "ring": "ring"}  # --gather, and what the losses call it


# ``hicl_fast.trainer.arguments.MethodArguments``, which names the methods and so can't be named by them.
Arguments = Any


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

    def __init__(self, args: Arguments, seed: int = 0) -> None:
        """``seed`` is that of whatever the method draws itself."""
        ...

    def loss(self, views: Views) -> Tensor:
        """The scalar to minimise."""
        ...

    def reference(self, views: Views) -> Tensor:
        """The same in plain PyTorch, in the type of the views: what ``--check_every`` compares with."""
        ...
