"""open_clip's contrastive loss without its matrices of logits.

The classes are subclasses of open_clip's and bear their names. Features that aren't normalised are fused as well, by two
more dimensions (:func:`hicl_fast.integrations.similarity.lift`). open_clip's other losses are as they were.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hicl_fast import _checks as check
from hicl_fast import functional as HF
from hicl_fast.distributed import attempt, ranks_of
from hicl_fast.distributed.gathering import describe_rows
from hicl_fast.integrations._requires import missing
from hicl_fast.integrations.gathering import join
from hicl_fast.integrations.similarity import as_cosines, loss_type

try:
    from open_clip import loss as original
except ImportError as error:
    raise missing("open_clip", "open_clip_torch>=2.20") from error

__all__ = ["ClipLoss", "CoCaLoss"]


class ClipLoss(original.ClipLoss):
    """:class:`open_clip.ClipLoss`, whose arguments it takes: ``local_loss``, ``gather_with_grad``, ``cache_labels``, ...

    Both directions come from one sweep where a process compares the same rows both ways. A ``logit_bias`` is the same for
    every column, so that it cancels: it stays in the graph, with the gradient 0 that it has. No labels are made, so that
    ``cache_labels`` changes nothing.

    Processes may have different numbers of rows. With ``local_loss`` a process's loss is weighted, so that the mean over
    the processes is the joined batch's: by its rows times the number of processes over the rows of all, 1 where all have
    equally many. Without ``local_loss`` every process computes the joined batch's loss. ``rank`` and ``world_size`` are
    those of the default process group.

    Example:
        >>> loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
        >>> loss(image_features, text_features, logit_scale.exp()).backward()
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for name in ("rank", "world_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected a whole number, got {check.describe(value)}")
        if not 0 <= self.rank < max(self.world_size, 1):
            raise ValueError(f"rank: expected 0 to {self.world_size - 1}, below world_size, got {self.rank}")

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:
        """The loss of features (N, D); a scalar in the type that open_clip's has, or a dictionary with it.

        Raises:
            TypeError, ValueError: naming the argument; between processes on every one of them, with each one's words.
        """
        loss = self._both_directions(image_features, text_features, logit_scale)
        loss = loss.to(loss_type(torch.matmul, _cross_entropy, image_features, text_features))
        if isinstance(logit_bias, Tensor) and logit_bias.requires_grad:
            loss = loss + 0.0 * logit_bias.sum()  # a parameter outside the graph would stop DistributedDataParallel
        return {"contrastive_loss": loss} if output_dict else loss

    def _both_directions(self, image: Tensor, text: Tensor, scale: float | Tensor) -> Tensor:
        if isinstance(scale, Tensor):
            scale = scale.reshape(())
        if self.world_size == 1:
            return _symmetric(image, text, scale)
        gathered = self._gather_horovod(image, text) if self._uses_horovod() else self._gather(image, text)
        if not self.local_loss:
            return _symmetric(gathered.image, gathered.text, scale)
        target = torch.arange(gathered.first, gathered.first + len(image), device=image.device)
        both = _one_direction(image, gathered.text, scale, target) + _one_direction(text, gathered.image, scale, target)
        return both * (gathered.weight / 2)

    def _gather(self, image: Tensor, text: Tensor) -> _Gathered:
        ranks = ranks_of()
        for name, expected in (("rank", ranks.rank), ("world_size", ranks.size)):
            if getattr(self, name) != expected:
                raise ValueError(f"{name}: expected {expected}, as the process group has it, got {getattr(self, name)}")

        def describe() -> tuple[dict[str, int], dict[str, object]]:
            check.floating_matrix("image_features", image, "(N, D)")
            check.floating_matrix("text_features", text, "(N, D)", like=image)
            if text.shape != image.shape:
                words = f"expected shape {tuple(image.shape)}, as image_features has, got {check.describe(text)}"
                raise ValueError(f"text_features: {words}")
            options = {name: getattr(self, name) for name in ("local_loss", "gather_with_grad")}
            return {"rows": len(image)}, {"image": describe_rows(image), "text": describe_rows(text), **options}

        told, failure = attempt(describe)
        joined = join(ranks, *(told or ({}, {})), failure)
        if self.local_loss and not self.gather_with_grad:
            image, text = image.detach(), text.detach()
        gather = joined.rows if self.gather_with_grad else joined.own_rows
        return _Gathered(gather("rows", image), gather("rows", text), joined.first("rows"), joined.weight("rows"))

    def _uses_horovod(self) -> bool:
        return getattr(self, "use_horovod", False)  # before 3.4

    def _gather_horovod(self, image: Tensor, text: Tensor) -> _Gathered:
        """By open_clip's own function, for as many rows on every process."""
        options = {name: getattr(self, name) for name in ("local_loss", "gather_with_grad", "rank", "world_size")}
        all_image, all_text = original.gather_features(image, text, use_horovod=True, **options)
        return _Gathered(all_image, all_text, first=self.rank * len(image), weight=1.0)


class _Gathered(NamedTuple):
    """All processes' rows, W of them."""

    image: Tensor  # (W, D)
    text: Tensor  # (W, D)
    first: int  # where this process's begin
    weight: float  # of its mean loss


class CoCaLoss(original.CoCaLoss, ClipLoss):
    """:class:`open_clip.loss.CoCaLoss`, with its contrastive part fused."""


def _symmetric(image: Tensor, text: Tensor, scale: float | Tensor) -> Tensor:
    query, key, temperature = as_cosines(image, text, scale, "dot")
    return HF.info_nce(query, key, temperature=temperature, symmetric=True)


def _one_direction(own: Tensor, all_others: Tensor, scale: float | Tensor, target: Tensor) -> Tensor:
    query, key, temperature = as_cosines(own, all_others, scale, "dot")
    return HF.info_nce(query, key, temperature=temperature, target=target)


def _cross_entropy(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))
