"""open_clip's contrastive loss without its matrices of logits.

The classes are subclasses of open_clip's and bear their names. Features that aren't normalised are fused as well, by two
more dimensions (:func:`hicl_fast.integrations.similarity.lift`). open_clip's other losses are as they were.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hicl_fast import functional as HF
from hicl_fast.integrations._requires import missing
from hicl_fast.integrations.similarity import as_cosines, loss_type

try:
    from open_clip import loss as original
except ImportError as error:
    raise missing("open_clip", "open_clip_torch>=2.20") from error

__all__ = ["ClipLoss", "CoCaLoss"]


class ClipLoss(original.ClipLoss):
    """:class:`open_clip.ClipLoss`, whose arguments it takes: ``local_loss``, ``gather_with_grad``, ``cache_labels``, ...

    Both directions come from one sweep where a process compares the same rows both ways. A ``logit_bias`` is the same for
    every column, so that it cancels: it stays in the graph, with the gradient 0 that it has.

    Example:
        >>> loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
        >>> loss(image_features, text_features, logit_scale.exp()).backward()
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:
        """The loss of features (N, D); a scalar in the type that open_clip's has, or a dictionary with it."""
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
        horovod = {"use_horovod": self.use_horovod} if hasattr(self, "use_horovod") else {}  # before 3.4
        all_image, all_text = original.gather_features(
            image,
            text,
            local_loss=self.local_loss,
            gather_with_grad=self.gather_with_grad,
            rank=self.rank,
            world_size=self.world_size,
            **horovod,
        )
        if not self.local_loss:
            return _symmetric(all_image, all_text, scale)
        target = self.get_ground_truth(image.device, image.shape[0])
        return (_one_direction(image, all_text, scale, target) + _one_direction(text, all_image, scale, target)) / 2


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
