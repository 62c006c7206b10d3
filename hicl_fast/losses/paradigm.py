"""The gradient paradigm as a module."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hicl_fast import _checks as check
from hicl_fast import functional as HF
from hicl_fast.analysis.terms import gradient_terms
from hicl_fast.distributed import Ranks, Shares, agree, attempt, gather_rows, ranks_of, share_rows
from hicl_fast.distributed.gathering import describe_rows
from hicl_fast.distributed.info_nce import Part, joined_info_nce, joined_means
from hicl_fast.distributed.ranks import check_process_group
from hicl_fast.losses.info_nce import mean_of_rows, without_missing
from hicl_fast.ops.backends import registry
from hicl_fast.ops.common.autograd import unwrapped
from hicl_fast.ops.paradigm.settings import Dissipation, Modification, Objective, Ratio, Weight


class GradientParadigmLoss(nn.Module):
    r"""A loss of the gradient paradigm (arXiv 2402.18281): dissipation, weight and ratio.

    .. math:: \frac{\partial L_i}{\partial u_i} = \mathrm{GD}_i \sum_{j \ne i} W_{ij} \, (v_j - R_{ij} \, v_i)

    No N×N matrix is built; see :func:`hicl_fast.functional.paradigm` for exactly what is computed.

    Args:
        objective: ``"info_nce"``, ``"arccon"``, ``"mpt"``, ``"met"``, ``"mat"``, ``"custom"``, ``"mhe"``, ``"mhs"``,
            ``"vicreg"`` or ``"barlow_twins"``.
        modified: of the last four, what is replaced by the paper's: any of ``"gd"``, ``"w"``, ``"r"``.
        margin: the objective's angle, distance or similarity; default: the paper's.
        temperature: τ > 0, of every softmax.
        strength: λ > 0, of what drives the rows apart in the last four.
        dissipation: of ``"custom"``: ``"softmax"``, a margin, ``None`` or a function of row statistics.
        weight: of ``"custom"``: ``"softmax"``, ``"uniform"``, ``"hardest"``, ``("power", p)`` or a function.
        ratio: of ``"custom"`` and of the modification ``"r"``; the paper takes 1.75 for mhe and mhs, 1.5 for the others.
        log_gradient_terms: whether ``last`` has the gradient's parts too
            (:func:`hicl_fast.analysis.gradient_terms`); reading them takes two to four products.
        backend: ``"auto"``, ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"`` (the first two objectives alone).
        gather: with several processes, the loss of the batch that they have together (docs/distributed.md): of
            ``"info_nce"`` and ``"arccon"`` a rank computes its own rows' part, of the others every rank computes all.
            Not with functions as parts of ``"custom"`` that differ between ranks.
        process_group: which processes; one alone means ``gather=True``.

    Attributes:
        last: after a call, detached scalars for logging: ``loss``, ``positive_similarity``, where the objective looks
            at negatives ``hardest_negative_similarity``, and with ``log_gradient_terms`` the means over rows of
            ``dissipation``, ``weight_entropy``, ``hardest_share`` and ``ratio``; of a batch of one row, which has no
            negatives, the first two alone. Computed when it is read.

    Example:
        >>> loss_fn = GradientParadigmLoss("vicreg", modified=("gd", "w", "r"), ratio=1.5)
        >>> loss_fn(encoder(batch), encoder(batch)).backward()
    """

    def __init__(
        self,
        objective: Objective,
        *,
        modified: Collection[Modification] = (),
        margin: float | None = None,
        temperature: float = 0.05,
        strength: float = 1.0,
        dissipation: Dissipation = "softmax",
        weight: Weight = "softmax",
        ratio: Ratio = 1.0,
        log_gradient_terms: bool = False,
        backend: str = "auto",
        gather: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        settings = HF.paradigm_settings(
            objective, modified, margin, temperature, strength, dissipation=dissipation, weight=weight, ratio=ratio
        )
        self.objective: Objective = objective
        self.modified, self.margin = settings.modified, settings.margin
        self.temperature, self.strength = temperature, strength
        self.dissipation, self.weight, self.ratio, self.backend = dissipation, weight, ratio, backend
        self.log_gradient_terms = log_gradient_terms
        check.flag("log_gradient_terms", log_gradient_terms)
        registry.check_name(backend)
        if not isinstance(gather, bool):
            raise ValueError(
                f"gather: expected True or False, since most objectives look at all rows, got {check.describe(gather)}"
            )
        check_process_group(process_group)
        self.gather, self.process_group = gather or process_group is not None, process_group
        self._rows: tuple[Tensor, Tensor, Tensor] | None = None
        self._joined: dict[str, Tensor] = {}
        self._views: tuple[Tensor, Tensor] | None = None

    @property
    def last(self) -> dict[str, Tensor]:
        known = dict(self._joined)
        if self._rows is not None:
            known = mean_of_rows(*self._rows)
        known = without_missing(known)
        return known if self._views is None else known | self._gradient_terms(*self._views)

    def _gradient_terms(self, u: Tensor, v: Tensor) -> dict[str, Tensor]:
        return gradient_terms(
            u,
            v,
            self.objective,
            modified=self.modified,  # type: ignore[arg-type]
            margin=self.margin,
            temperature=self.temperature,
            strength=self.strength,
            dissipation=self.dissipation,
            weight=self.weight,
            ratio=self.ratio,
        ).means()

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """The loss of two views.

        Args:
            u: (N, D) one view of the batch. A single row has no negatives: what drives rows apart is 0 then.
            v: (N, D) the other view; row i is u_i's positive.

        Returns:
            A scalar; float32, or float64 where an input is float64. With ``gather``: the mean over the ranks is the
            loss of the joined batch.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came; with ``gather``, ValueError on
                every rank, with the words of those that failed.
        """
        if self.gather and (ranks := ranks_of(self.process_group)).size > 1:
            return self._forward_joined(u, v, ranks)
        return self._score(u, v)

    def _score(self, u: Tensor, v: Tensor) -> Tensor:
        loss, positive, hardest, _ = HF.paradigm_with_statistics(
            u,
            v,
            self.objective,
            modified=self.modified,  # type: ignore[arg-type]
            margin=self.margin,
            temperature=self.temperature,
            strength=self.strength,
            dissipation=self.dissipation,
            weight=self.weight,
            ratio=self.ratio,
            backend=self.backend,
        )
        self._rows = (unwrapped(loss), unwrapped(positive), unwrapped(hardest))
        self._log_terms_of(u, v)
        return loss

    def _log_terms_of(self, u: Tensor, v: Tensor) -> None:
        has_negatives = len(v) > 1
        self._views = (unwrapped(u), unwrapped(v)) if self.log_gradient_terms and has_negatives else None

    @torch.compiler.disable
    def _forward_joined(self, u: Tensor, v: Tensor, ranks: Ranks) -> Tensor:
        def describe() -> tuple[dict[str, int], dict[str, object]]:
            HF.check_views(u, v)
            return {"rows": len(u)}, {"u": describe_rows(u), "v": describe_rows(v), **self._terms()}

        told, failure = attempt(describe)
        shares = agree(ranks, *(told or ({"rows": 0}, {})), failure)["rows"]
        if self.objective in ("info_nce", "arccon"):
            return self._own_part(u, v, shares, ranks)
        return self._score(share_rows(u, shares, ranks), share_rows(v, shares, ranks))

    def _own_part(self, u: Tensor, v: Tensor, shares: Shares, ranks: Ranks) -> Tensor:
        result = joined_info_nce(
            Part(u, shares),
            Part(v, shares),
            None,
            ranks,
            temperature=self.temperature,
            margin=self.margin,
            backend=self.backend,
        )
        self._joined = joined_means(result, shares, ranks)
        if self.log_gradient_terms and result.keys is not None:
            self._log_terms_of(gather_rows(u.detach(), shares, ranks), result.keys)
        return result.loss

    def _terms(self) -> dict[str, Any]:
        """The options that have to be the same on all ranks; of a function, that there is one."""
        parts = {"dissipation": self.dissipation, "weight": self.weight, "ratio": self.ratio}
        return {
            "loss": type(self).__name__,
            "options": self.extra_repr(),
            "strength": self.strength,
            "log_gradient_terms": self.log_gradient_terms,
            **{name: "a function" if callable(part) else part for name, part in parts.items()},
        }

    def extra_repr(self) -> str:
        shown = f"{self.objective!r}, margin={self.margin:.4g}, temperature={self.temperature}"
        return f"{shown}, modified={self.modified}" if self.modified else shown
