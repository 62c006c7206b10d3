"""InfoNCE as a module."""

from __future__ import annotations

from torch import Tensor, nn

from hicl_fast import functional as HF
from hicl_fast.losses.hncse import Groups, HardNegativeMixing, Mixtures, PositiveMixing
from hicl_fast.losses.queue import NegativeQueue
from hicl_fast.losses.temperature import Temperature
from hicl_fast.reference.info_nce import Reduction, SameGroup


def mean_of_rows(loss: Tensor, positive: Tensor, hardest: Tensor) -> dict[str, Tensor]:
    """What a loss logs of its rows (N,); rows without a negative don't count towards the hardest."""
    has_negative = hardest > -float("inf")
    return {
        "loss": loss.mean(),
        "positive_similarity": positive.mean(),
        "hardest_negative_similarity": hardest.masked_fill(~has_negative, 0.0).sum() / has_negative.sum(),
    }


class FusedInfoNCELoss(nn.Module):
    r"""Temperature-scaled softmax cross entropy over cosine similarities (SimCSE, arXiv 2104.08821, eq. 1 and 5).

    .. math:: \mathrm{loss} = \frac{1}{N} \sum_i -\log \frac{e^{\cos(q_i, k_i)/\tau}}
              {\sum_j e^{\cos(q_i, k_j)/\tau} + \sum_p e^{\cos(q_i, n_p)/\tau}}

    No N×M matrix is built; see :func:`hicl_fast.functional.info_nce` for exactly what is computed.

    Args:
        temperature: τ > 0; where it is learned, its first value.
        learnable_temperature: learn log(1/τ), with 1/τ at most 100, as CLIP does.
        margin: ArcCon's angular margin in radians.
        symmetric: average with the loss of queries and keys exchanged.
        hard_negative_weight: added to the logit of row i's own negative (SimCSE's rule).
        same_group: what keys of a row's own group are: ``"exclude"``, ``"negative"`` or ``"positive"``.
        queue_size: rows of earlier batches' keys kept as further negatives; 0 keeps none. They join while training only.
        hard_negative_mixing: adds mixtures of each row's hard negatives (HNCSE). Not with ``symmetric``.
        positive_mixing: mixes the positives first (HNCSE); everything after it sees the mixed keys. Not with ``symmetric``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        precision: ``None``, ``"float32"`` or ``"bf16"``; see :func:`hicl_fast.functional.info_nce`.
        backend: ``"auto"``, ``"torch"``, ``"cpp"`` or ``"triton"``.

    Attributes:
        last: after a call, detached scalars for logging: ``loss``, ``positive_similarity``,
            ``hardest_negative_similarity``. Computed when it is read.

    Example:
        >>> loss_fn = FusedInfoNCELoss(temperature=0.05)
        >>> loss_fn(encoder(batch), encoder(batch)).backward()
    """

    def __init__(
        self,
        temperature: float = 0.05,
        *,
        learnable_temperature: bool = False,
        margin: float = 0.0,
        symmetric: bool = False,
        hard_negative_weight: float = 0.0,
        same_group: SameGroup = "exclude",
        queue_size: int = 0,
        hard_negative_mixing: HardNegativeMixing | None = None,
        positive_mixing: PositiveMixing | None = None,
        reduction: Reduction = "mean",
        precision: str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, mixing in (("hard_negative_mixing", hard_negative_mixing), ("positive_mixing", positive_mixing)):
            if symmetric and mixing is not None:
                raise ValueError(f"{name}: expected None with symmetric=True, since a mixture has one direction")
        self.temperature = Temperature(temperature, learnable_temperature)
        self.margin, self.symmetric, self.same_group = margin, symmetric, same_group
        self.hard_negative_weight = hard_negative_weight
        self.queue = NegativeQueue(queue_size) if queue_size else None
        self.hard_negative_mixing, self.positive_mixing = hard_negative_mixing, positive_mixing
        self.reduction, self.precision, self.backend = reduction, precision, backend
        self._rows: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def last(self) -> dict[str, Tensor]:
        return {} if self._rows is None else mean_of_rows(*self._rows)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None = None,
        *,
        query_group: Tensor | None = None,
        key_group: Tensor | None = None,
    ) -> Tensor:
        """The loss of ``query`` (N, D) against ``key`` (M, D), ``negatives`` (P, D) and the queue.

        Args:
            query: (N, D) one view of the batch.
            key: (M, D) the other view; key i is query i's positive.
            negatives: (P, D) hard negatives.
            query_group: (N,) int64 group of each query; with ``key_group`` (M,).
            key_group: (M,) int64 group of each key.

        Returns:
            A scalar, or (N,) with ``reduction="none"``; float32, or float64 where an input is float64.
        """
        use_queue = self.queue is not None and self.training
        temperature = self.temperature()
        groups = None
        if query_group is not None and key_group is not None and self.same_group != "negative":
            groups = Groups(query_group, key_group)
        if self.positive_mixing is not None:
            key = self.positive_mixing(query, key, groups)
        mixtures = Mixtures()
        if self.hard_negative_mixing is not None:
            mixtures = self.hard_negative_mixing(query, key, temperature, groups)
        result = HF.info_nce_with_statistics(
            query,
            key,
            temperature=temperature,
            negatives=negatives,
            hard_negative_weight=self.hard_negative_weight if negatives is not None else 0.0,
            bank=self.queue.rows() if use_queue and self.queue is not None else None,
            extra_logits=mixtures.extra_logits,
            mixing=mixtures.mixing,
            query_group=query_group,
            key_group=key_group,
            same_group=self.same_group,
            margin=self.margin,
            symmetric=self.symmetric,
            reduction=self.reduction,
            precision=self.precision,
            backend=self.backend,
        )
        if use_queue and self.queue is not None:
            self.queue.push(key)
        if self.hard_negative_mixing is not None:
            self.hard_negative_mixing.remember(mixtures, result.hard_negatives)
        self._rows = (result.loss.detach(), result.positive, result.hardest)
        return result.loss

    def extra_repr(self) -> str:
        return f"margin={self.margin}, symmetric={self.symmetric}, same_group={self.same_group!r}, reduction={self.reduction!r}"
