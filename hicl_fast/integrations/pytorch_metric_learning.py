"""pytorch-metric-learning's NTXentLoss and SupConLoss without their N×M matrices, and its wrappers for them.

The classes are subclasses of the originals and bear their names, since wrappers such as ``SelfSupervisedLoss`` go by a
loss's name. Fused are calls with labels and a cosine or dot-product similarity; reducers, regularisers and wrappers work
as they do. Other distances, distances with ``power`` or ``p`` changed or with statistics, and calls with an
``indices_tuple`` (a miner's pairs) take the original's matrix of distances; what NTXentLoss makes of it is linear in the
pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hicl_fast import _checks as check
from hicl_fast import functional as HF
from hicl_fast._checks import FLOATING
from hicl_fast.distributed import Ranks, gather_labels, ranks_of
from hicl_fast.integrations._requires import missing
from hicl_fast.integrations.gathering import Joined, join, refuse_unequal
from hicl_fast.integrations.similarity import (
    Similarity,
    as_cosines,
    in_sum_type,
    loss_type,
    pairwise,
    unit,
)
from hicl_fast.ops.common.autograd import without_autocast
from hicl_fast.ops.common.numbers import sum_type

try:
    from pytorch_metric_learning import distances
    from pytorch_metric_learning import losses as original
    from pytorch_metric_learning.utils import distributed as original_distributed
    from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
except ImportError as error:
    raise missing("pytorch_metric_learning", "pytorch-metric-learning>=2") from error

__all__ = ["CrossBatchMemory", "DistributedLossWrapper", "NTXentLoss", "SupConLoss"]


class AllPairs(NamedTuple):
    """In the place of an ``indices_tuple``: every pair that labels make, but a row with itself."""

    own: Tensor | None  # (N,) int64, where among the references a row is itself; None: nowhere


class NTXentLoss(original.NTXentLoss):
    """:class:`pytorch_metric_learning.losses.NTXentLoss`, whose arguments it takes; a temperature may be learned.

    One loss for each positive pair, log(1 + Σ over the anchor's negatives of e^((s_n − s_p)/τ)): that sum is the same for
    all of an anchor's positives and computed once.
    """

    def __init__(self, temperature: float | Tensor = 0.07, **options: Any) -> None:
        _check_temperature(temperature)
        super().__init__(temperature, **options)

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> dict[str, Any]:
        problem = _problem(self, embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if problem is None:
            pairs = _as_tuple(indices_tuple, labels, ref_labels)
            return _in_float32(super().compute_loss, embeddings, labels, pairs, ref_emb, ref_labels)
        anchor, positive = problem.positive_pairs()
        num_negatives = problem.num_negatives()
        if len(anchor) == 0 or num_negatives == 0 or (len(anchor) == 1 and num_negatives == 1):
            return self.zero_losses()
        losses = problem.pair_losses(anchor, positive, self.temperature)
        return _result(problem.as_original(losses), (anchor, positive), "pos_pair")

    def _compute_loss(
        self,
        pos_pairs: Tensor,  # (P,)
        neg_pairs: Tensor,  # (Q,)
        indices_tuple: tuple[Tensor, Tensor, Tensor, Tensor],  # (P,), (P,), (Q,), (Q,) int64
    ) -> dict[str, Any]:
        """Of given pairs, a miner's or another distance's: an anchor's negatives are summed once here too, not P × Q."""
        anchor, positive, anchor_of_negative, _ = indices_tuple
        if len(anchor) == 0 or len(anchor_of_negative) == 0:
            return self.zero_losses()
        sign = 1.0 if self.distance.is_inverted else -1.0
        positive_logit, logit = (x.to(sum_type(x)) * sign / self.temperature for x in (pos_pairs, neg_pairs))
        num_rows = int(torch.maximum(anchor.max(), anchor_of_negative.max())) + 1
        losses = F.softplus(_log_sum_exp(logit, anchor_of_negative, num_rows)[anchor] - positive_logit)
        return _result(losses.to(neg_pairs.dtype), (anchor, positive), "pos_pair")


class SupConLoss(original.SupConLoss):
    """:class:`pytorch_metric_learning.losses.SupConLoss`, whose arguments it takes; a temperature may be learned."""

    def __init__(self, temperature: float | Tensor = 0.1, **options: Any) -> None:
        _check_temperature(temperature)
        super().__init__(temperature, **options)

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> dict[str, Any]:
        problem = _problem(self, embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if problem is None:
            pairs = _as_tuple(indices_tuple, labels, ref_labels)
            return _in_float32(super().compute_loss, embeddings, labels, pairs, ref_emb, ref_labels)
        num_positives, num_negatives = int(problem.classes().num_positives.sum()), problem.num_negatives()
        if num_positives == 0 or num_negatives == 0 or (num_positives == 1 and num_negatives == 1):
            return self.zero_losses()
        losses = problem.row_losses(self.temperature)
        return _result(problem.as_original(losses), torch.arange(len(losses), device=losses.device), "element")


class CrossBatchMemory(original.CrossBatchMemory):
    """:class:`pytorch_metric_learning.losses.CrossBatchMemory`, whose arguments it takes.

    Around a loss of this module and without a miner, no pair is written down; elsewhere it is the original.
    """

    def create_indices_tuple(
        self, embeddings: Tensor, labels: Tensor, E_mem: Tensor, L_mem: Tensor, given: Any, remove_self: bool
    ) -> Any:
        if self.miner is None and given is None and isinstance(self.loss, (NTXentLoss, SupConLoss)):
            return AllPairs(self.curr_batch_idx if remove_self else None)
        return super().create_indices_tuple(embeddings, labels, E_mem, L_mem, given, remove_self)


class DistributedLossWrapper(original_distributed.DistributedLossWrapper):
    """:class:`pytorch_metric_learning.utils.distributed.DistributedLossWrapper`, whose arguments it takes.

    Processes may have different numbers of rows: each computes the joined batch's loss, times their number, with gradients
    for its own rows. With ``efficient=True`` they may not, and unequal ones are refused on all of them.
    """

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Any:
        arguments = (embeddings, labels, indices_tuple, ref_emb, ref_labels, enqueue_mask)
        ranks = ranks_of()
        if ranks.size == 1:
            return super().forward(*arguments)
        joined = self._join(embeddings, labels, ref_emb, ref_labels, enqueue_mask, ranks)
        if self.efficient:
            refuse_unequal(joined, "efficient", "pytorch-metric-learning")
            return super().forward(*arguments)
        rows, labels = _own_first(joined, "embeddings", embeddings), _own_first(joined, "embeddings", labels)
        if isinstance(self.loss, original.CrossBatchMemory):
            if ref_emb is not None or ref_labels is not None:
                raise ValueError("ref_emb: expected None with CrossBatchMemory, which has references of its own")
            enqueue_mask = _own_first(joined, "embeddings", enqueue_mask)
            return self.loss(rows, labels, indices_tuple, enqueue_mask) * ranks.size
        references, ref_labels = _own_first(joined, "ref_emb", ref_emb), _own_first(joined, "ref_emb", ref_labels)
        return self.loss(rows, labels, indices_tuple, references, ref_labels) * ranks.size

    def _join(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
        enqueue_mask: Tensor | None,
        ranks: Ranks,
    ) -> Joined:
        matrices = {"embeddings": embeddings, "ref_emb": ref_emb}
        vectors = {"labels": labels, "enqueue_mask": enqueue_mask, "ref_labels": ref_labels}
        rows = {name: len(value) for name, value in matrices.items() if value is not None}
        types = {name: None if value is None else value.dtype for name, value in {**matrices, **vectors}.items()}
        failure = None
        for name, value in vectors.items():
            expected = rows.get("ref_emb" if name == "ref_labels" else "embeddings", 0)
            if value is not None and value.shape[:1] != (expected,):
                failure = ValueError(f"{name}: expected {expected} of them, got {check.describe(value)}")
        return join(ranks, rows, {"loss": type(self.loss).__name__, "efficient": self.efficient, **types}, failure)


def _own_first(joined: Joined, name: str, own: Any) -> Any:  # a tensor (N, ...) or None
    """All processes' rows or labels, this one's before the others', as the original's wrappers for miners have them."""
    if own is None:
        return None
    if own.is_floating_point():
        every = joined.own_rows(name, own)
    else:
        every = gather_labels(own.long(), joined.shares[name], joined.ranks).to(own.dtype)
    first = joined.first(name)
    before, own, after = every.tensor_split([first, first + len(own)])
    return torch.cat([own, before, after])


def _check_temperature(temperature: float | Tensor) -> None:
    if not isinstance(temperature, Tensor):
        check.positive_number("temperature", temperature)
    elif temperature.numel() != 1:
        raise ValueError(f"temperature: expected a number or a tensor of one, got {check.describe(temperature)}")


def _problem(
    loss: Any, embeddings: Tensor, labels: Tensor | None, pairs: Any, ref_emb: Tensor, ref_labels: Tensor | None
) -> _Problem | None:
    """The call, where it can be fused."""
    similarity = _similarity(loss.distance)
    all_pairs = pairs is None or isinstance(pairs, AllPairs)
    if similarity is None or not all_pairs or labels is None or ref_labels is None or labels.dim() != 1:
        return None
    if any(x.dim() != 2 or x.dtype not in FLOATING or len(x) == 0 for x in (embeddings, ref_emb)):
        return None
    if isinstance(pairs, AllPairs):
        own = pairs.own
    else:  # the original's rule: rows meet themselves unless the references are these very labels
        own = torch.arange(len(labels), device=labels.device) if ref_labels is labels else None
    return _Problem(embeddings, labels.long(), ref_emb, ref_labels.to(labels.device).long(), own, similarity)


def _similarity(distance: Any) -> Similarity | None:
    if type(distance) not in (distances.CosineSimilarity, distances.DotProductSimilarity):
        return None
    if distance.p != 2 or distance.power != 1 or distance.collect_stats:
        return None
    return "cosine" if distance.normalize_embeddings else "dot"


def _as_tuple(pairs: Any, labels: Tensor, ref_labels: Tensor) -> Any:
    """What the original understands."""
    if not isinstance(pairs, AllPairs):
        return pairs
    a1, p, a2, n = lmu.get_all_pairs_indices(labels, ref_labels)
    if pairs.own is not None:
        other = pairs.own[a1] != p
        a1, p = a1[other], p[other]
    return a1, p, a2, n


def _in_float32(
    compute_loss: Callable[..., dict[str, Any]],
    embeddings: Tensor,
    labels: Tensor,
    pairs: Any,
    ref_emb: Tensor,
    ref_labels: Tensor,
) -> dict[str, Any]:
    """The original's result, by way of float32 where rows are shorter: given pairs lose no digits that labels keep."""
    rows, references = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (embeddings, ref_emb))
    with without_autocast(embeddings.device.type):
        found = compute_loss(rows, labels, pairs, references, ref_labels)
    losses = found["loss"]["losses"]
    if isinstance(losses, Tensor):  # else the 0 of no pairs
        found["loss"]["losses"] = losses.to(torch.promote_types(embeddings.dtype, ref_emb.dtype))
    return found


def _result(losses: Tensor, indices: Any, reduction_type: str) -> dict[str, Any]:
    return {"loss": {"losses": losses, "indices": indices, "reduction_type": reduction_type}}


class _Classes(NamedTuple):
    """References sorted by label; those of row i's label stand at ``begin[i]:end[i]`` of ``order``."""

    order: Tensor  # (M,) int64
    begin: Tensor  # (N,) int64
    end: Tensor  # (N,) int64
    num_positives: Tensor  # (N,) int64, without the row itself


class _Problem:
    """N rows against M references, with labels in the place of pairs."""

    def __init__(
        self,
        rows: Tensor,  # (N, D)
        labels: Tensor,  # (N,) int64
        references: Tensor,  # (M, D)
        reference_labels: Tensor,  # (M,) int64
        own: Tensor | None,  # (N,) int64
        similarity: Similarity,
    ) -> None:
        self.rows, self.labels = rows, labels
        self.references, self.reference_labels = references, reference_labels
        self.own, self.similarity = own, similarity
        self._classes = self._sort()

    def _sort(self) -> _Classes:
        values, order = torch.sort(self.reference_labels, stable=True)
        begin = torch.searchsorted(values, self.labels)
        end = torch.searchsorted(values, self.labels, right=True)
        num_positives = end - begin
        if self.own is not None:
            num_positives = num_positives - (self.reference_labels[self.own] == self.labels).long()
        return _Classes(order, begin, end, num_positives)

    def classes(self) -> _Classes:
        return self._classes

    def num_negatives(self) -> int:
        """Pairs of different labels."""
        same = self._classes.end - self._classes.begin
        return len(self.labels) * len(self.reference_labels) - int(same.sum())

    def as_original(self, losses: Tensor) -> Tensor:
        return losses.to(loss_type(torch.matmul, torch.Tensor.sum, self.rows, self.references))

    def positive_pairs(self) -> tuple[Tensor, Tensor]:  # (P,) int64 each
        """Rows and references of one label, row by row."""
        order, begin, end, _ = self._classes
        counts = end - begin
        anchor = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        first = (counts.cumsum(0) - counts)[anchor]  # where the anchor's pairs begin
        place = begin[anchor] + torch.arange(len(anchor), device=anchor.device) - first
        positive = order[place]
        if self.own is not None:
            other = positive != self.own[anchor]
            anchor, positive = anchor[other], positive[other]
        return anchor, positive

    def pair_losses(self, anchor: Tensor, positive: Tensor, temperature: float | Tensor) -> Tensor:  # (P,)
        """NT-Xent of each positive pair."""
        temperature = in_sum_type(temperature, self.rows, self.references)
        logit = pairwise(self.rows[anchor], self.references[positive], self.similarity) / temperature
        row, row_of_pair = torch.unique(anchor, return_inverse=True)  # rows that have a positive
        target = positive[_first_of(row_of_pair, len(row))]  # any positive: all are of the row's group, and left out
        query, key, tau = as_cosines(self.rows[row], self.references, 1.0 / temperature, self.similarity)
        negatives = HF.log_sum_exp(
            query,
            key,
            target=target,
            temperature=tau,
            query_group=self.labels[row],
            key_group=self.reference_labels,
        ).negative
        return F.softplus(negatives[row_of_pair] - logit)

    def row_losses(self, temperature: float | Tensor) -> Tensor:  # (N,)
        """SupCon of each row: 0 for those without a positive."""
        temperature = in_sum_type(temperature, self.rows, self.references)
        order, begin, _, num_positives = self._classes
        row = num_positives.nonzero()[:, 0]
        target = order[begin[row]]
        if self.own is not None:
            is_itself = target == self.own[row]
            target = torch.where(is_itself, order[(begin[row] + 1).clamp_max(len(order) - 1)], target)
        rows = self.rows[row]
        query, key, tau = as_cosines(rows, self.references, 1.0 / temperature, self.similarity)
        loss = HF.info_nce(
            query,
            key,
            target=target,
            temperature=tau,
            query_group=None if self.own is None else self.own[row],
            key_group=None if self.own is None else torch.arange(len(key), device=key.device),
            reduction="none",
        )
        logit = pairwise(rows, self.references[target], self.similarity) / temperature
        found = loss + logit - self._mean_positive(row) / temperature
        return found.new_zeros(len(self.rows)).index_put((row,), found)

    def _mean_positive(self, row: Tensor) -> Tensor:  # (R,) int64 -> (R,)
        """Mean similarity of rows to their positives, by the sum of a label's references."""
        rows, references = self.rows[row], self.references
        dtype = torch.promote_types(torch.promote_types(rows.dtype, references.dtype), torch.float32)
        rows, references = rows.to(dtype), references.to(dtype)
        if self.similarity == "cosine":
            rows, references = unit(rows), unit(references)
        values, place = torch.unique(self.reference_labels, return_inverse=True)
        sums = references.new_zeros(len(values), references.shape[1]).index_add(0, place, references)
        total = (rows * sums[torch.searchsorted(values, self.labels[row])]).sum(dim=1)
        if self.own is not None:
            own = self.own[row]
            is_counted = self.reference_labels[own] == self.labels[row]
            total = total - is_counted * (rows * references[own]).sum(dim=1)
        return total / self._classes.num_positives[row]


def _first_of(row: Tensor, num_rows: int) -> Tensor:  # (P,) int64 -> (num_rows,) int64
    """The place of each row's first pair."""
    place = torch.arange(len(row), device=row.device)
    return place.new_full((num_rows,), len(row)).scatter_reduce(0, row, place, "amin")


def _log_sum_exp(logit: Tensor, row: Tensor, num_rows: int) -> Tensor:  # (Q,), (Q,) int64 -> (num_rows,)
    """Over each row's logits; −inf, with gradient 0, where it has none."""
    high = logit.new_full((num_rows,), -torch.inf).scatter_reduce(0, row, logit.detach(), "amax")
    total = logit.new_zeros(num_rows).index_add(0, row, (logit - high[row]).exp())
    some = total != 0  # NaN stays NaN
    return torch.where(some, torch.where(some, total, 1.0).log() + high, -torch.inf)
