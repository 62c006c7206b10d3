"""The gradient paradigm as a module."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from hicl_fast import functional as HF
from hicl_fast.analysis.terms import gradient_terms
from hicl_fast.losses.info_nce import mean_of_rows
from hicl_fast.reference.paradigm import MODIFIABLE, Dissipation, Modification, Objective, Ratio, Weight


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
        log_gradient_terms: whether ``last`` has the gradient's parts too; of the contrastive objectives and
            ``"custom"``; reading them takes two products.
        backend: ``"auto"``, ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Attributes:
        last: after a call, detached scalars for logging: ``loss``, ``positive_similarity``, where the objective looks
            at negatives ``hardest_negative_similarity``, and with ``log_gradient_terms`` the means over rows of
            ``dissipation``, ``weight_entropy``, ``hardest_share`` and ``ratio``. Computed when it is read.

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
    ) -> None:
        super().__init__()
        settings = HF.paradigm_settings(
            objective, modified, margin, temperature, strength, dissipation=dissipation, weight=weight, ratio=ratio
        )
        self.objective: Objective = objective
        self.modified, self.margin = settings.modified, settings.margin
        self.temperature, self.strength = temperature, strength
        self.dissipation, self.weight, self.ratio, self.backend = dissipation, weight, ratio, backend
        if log_gradient_terms and objective in MODIFIABLE:
            raise ValueError(f"log_gradient_terms: expected False with {objective!r}, whose weights have signs")
        self.log_gradient_terms = log_gradient_terms
        self._rows: tuple[Tensor, Tensor, Tensor] | None = None
        self._views: tuple[Tensor, Tensor] | None = None

    @property
    def last(self) -> dict[str, Tensor]:
        if self._rows is None:
            return {}
        loss, positive, hardest = self._rows
        known = mean_of_rows(loss, positive, hardest)
        if not hardest.numel():
            del known["hardest_negative_similarity"]
        return known if self._views is None else known | self._gradient_terms(*self._views)

    def _gradient_terms(self, u: Tensor, v: Tensor) -> dict[str, Tensor]:
        return gradient_terms(
            u,
            v,
            self.objective,
            margin=self.margin,
            temperature=self.temperature,
            dissipation=self.dissipation,
            weight=self.weight,
            ratio=self.ratio,
        ).means()

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """The loss of two views.

        Args:
            u: (N, D) one view of the batch, N ≥ 2.
            v: (N, D) the other view; row i is u_i's positive.

        Returns:
            A scalar; float32, or float64 where an input is float64.
        """
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
        self._rows = (loss.detach(), positive, hardest)
        if self.log_gradient_terms:
            self._views = (u.detach(), v.detach())
        return loss

    def extra_repr(self) -> str:
        shown = f"{self.objective!r}, margin={self.margin:.4g}, temperature={self.temperature}"
        return f"{shown}, modified={self.modified}" if self.modified else shown
