"""A loss for GradCache (github.com/luyug/GradCache, arXiv 2101.06983), which hands it the whole batch's representations.

GradCache calls ``loss_fn(*representations, **loss_kwargs)`` with leaves that require a gradient, and calls ``backward`` on
what comes back: any of this library's losses fits. What this module adds is GradCache's rule for hard negatives, which
stand among the keys, and joining all processes' rows. No package is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hicl_fast import _checks as check
from hicl_fast import functional as HF
from hicl_fast.distributed import Ranks, attempt, ranks_of
from hicl_fast.distributed.gathering import describe_rows
from hicl_fast.integrations.gathering import join
from hicl_fast.ops.backends import registry
from hicl_fast.ops.common.constants import Reduction

__all__ = ["FusedContrastiveLoss"]


class FusedContrastiveLoss(nn.Module):
    """InfoNCE of queries against their own keys and everyone else's, as GradCache's ``SimpleContrastiveLoss``.

    With N queries and (1 + n) · N keys, key (1 + n) · i is query i's positive and the n after it are its hard negatives.
    GradCache's losses are of dot products; this one's are of cosines divided by a temperature.

    Args:
        temperature: τ > 0.
        gather: join the rows of all processes first, as GradCache's ``DistributedContrastiveLoss`` does: every process
            computes the loss of the joined batch, and has gradients for its own rows. Processes may have different
            numbers of rows, with as many keys for each query. Without a process group it has no effect.
        backend: ``"auto"``, ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Example:
        >>> cache = GradCache(models=[encoder, encoder], chunk_sizes=32, loss_fn=FusedContrastiveLoss(0.05))
        >>> cache(queries, passages)
    """

    def __init__(self, temperature: float = 0.05, *, gather: bool = False, backend: str = "auto") -> None:
        super().__init__()
        check.positive_number("temperature", temperature)
        check.flag("gather", gather)
        registry.check_name(backend)
        self.temperature, self.gather, self.backend = temperature, gather, backend

    def forward(
        self, query: Tensor, key: Tensor, target: Tensor | None = None, reduction: Reduction = "mean"
    ) -> Tensor:
        """The loss of ``query`` (N, D) against ``key`` (M, D).

        Args:
            query: (N, D).
            key: (M, D).
            target: (N,) int64, each query's key in the place of the rule. With ``gather`` that of all processes' queries
                among all processes' keys.
            reduction: ``"mean"``, ``"sum"`` or ``"none"``.

        Raises:
            ValueError: M is no multiple of N and no target is given; or as :func:`hicl_fast.functional.info_nce` says.
                With ``gather`` on every process, with each one's words.
        """
        if self.gather and (ranks := ranks_of()).size > 1:
            query, key = self._joined(query, key, target is not None, ranks)
        if target is None:
            target = self._positives(query, key)
        return HF.info_nce(
            query, key, target=target, temperature=self.temperature, reduction=reduction, backend=self.backend
        )

    def _joined(self, query: Tensor, key: Tensor, has_target: bool, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """All processes' queries and keys, of which this one's keep their gradients."""

        def describe() -> tuple[dict[str, int], dict[str, object]]:
            check.floating_matrix("query", query, "(N, D)")
            check.floating_matrix("key", key, "(M, D)", like=query)
            check.row_length("key", key, query.shape[1])
            terms = {"query": describe_rows(query), "key": describe_rows(key), "loss": self, "target": has_target}
            if not has_target:  # else the rule would find another process's keys
                self._positives(query, key)
                terms["keys for each query"] = len(key) // len(query)
            return {"query": len(query), "key": len(key)}, terms

        told, failure = attempt(describe)
        joined = join(ranks, *(told or ({}, {})), failure)
        return joined.own_rows("query", query), joined.own_rows("key", key)

    @staticmethod
    def _positives(query: Tensor, key: Tensor) -> Tensor:
        if len(query) == 0 or len(key) == 0 or len(key) % len(query):
            raise ValueError(f"key: expected a multiple of {len(query)} rows, or a target; got {check.describe(key)}")
        return torch.arange(len(query), device=query.device) * (len(key) // len(query))

    def extra_repr(self) -> str:
        return f"{self.temperature}, gather={self.gather}"
