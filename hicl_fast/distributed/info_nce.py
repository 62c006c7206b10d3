"""InfoNCE of a rank's own queries against the keys of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hicl_fast import functional as HF
from hicl_fast.distributed.agreement import Shares
from hicl_fast.distributed.gathering import gather_labels, gather_rows
from hicl_fast.distributed.ranks import Gather, Ranks
from hicl_fast.distributed.ring import foreign_log_sum_exp
from hicl_fast.ops.common.constants import Reduction
from hicl_fast.ops.common.numbers import scale_of

# From the keys of all ranks, their groups and the place of the first own one among them: the keys to score, and further
# options of info_nce.
Mix = Callable[[Tensor, Tensor | None, int], tuple[Tensor, dict[str, Any]]]


class Part(NamedTuple):
    """One of the loss's matrices: this rank's rows of it, and how many every rank has."""

    rows: Tensor  # (N, D)
    shares: Shares
    group: Tensor | None = None  # (N,) int64


class JoinedLoss(NamedTuple):
    loss: Tensor  # () or (N,)
    positive: Tensor  # (N,) similarity of each own row's positive
    hardest: Tensor  # (N,) of its hardest negative; −inf where there is none
    keys: Tensor | None = None  # (M₀ + M₁ + …, D), where they were gathered
    key_group: Tensor | None = None  # (M₀ + M₁ + …,) int64, likewise
    hard_negatives: Tensor | None = None  # (N, k) int64, the keys that were mixed


def joined_info_nce(
    query: Part,
    key: Part,
    negatives: Part | None,
    ranks: Ranks,
    *,
    gather: Gather = True,
    symmetric: bool = False,
    reduction: Reduction = "mean",
    mix: Mix | None = None,
    **options: Any,
) -> JoinedLoss:
    """:func:`hicl_fast.functional.info_nce` of the joined batch, as far as it is this rank's to compute.

    With ``reduction="mean"`` and ``"sum"`` the *mean over the ranks* of what they return is the loss of the joined
    batch, however unequal their shares: DDP and FSDP take the mean of the ranks' gradients. With ``"none"`` a rank
    returns the losses of its own rows.

    Args:
        query: this rank's queries; query i's positive is the same rank's key i.
        key: this rank's keys, for everyone.
        negatives: this rank's explicit negatives, for everyone.
        ranks: the processes.
        gather: ``True`` gathers keys and negatives; ``"ring"`` lets them travel, and no rank holds all of them.
        symmetric: average with the loss of queries and keys exchanged, for which the queries are exchanged too.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        mix: HNCSE's mixing, with ``gather=True`` and without ``symmetric``.
        options: of :func:`hicl_fast.functional.info_nce`. Bank and extra logits are this rank's own.
    """
    score = _with_ring if gather == "ring" else _with_gathered
    if negatives is not None and gather is True:
        options["gathered_negatives"] = gather_rows(negatives.rows, negatives.shares, ranks)
    if mix is not None:
        options["mix"] = mix
    result = score(query, key, negatives, ranks, reduction=reduction, **options)
    if symmetric:
        columns = score(key, query, negatives, ranks, reduction=reduction, **options)
        result = result._replace(loss=(result.loss + columns.loss) / 2)
    weight = _weight(query.shares, ranks, reduction)
    return result if weight == 1.0 else result._replace(loss=result.loss * weight)


def joined_means(loss: JoinedLoss, shares: Shares, ranks: Ranks) -> dict[str, Tensor]:
    """What a loss logs, of the rows of all ranks: the same on every rank. One all-reduce of four numbers."""
    sums = torch.stack([x.detach().sum() for x in (loss.loss, loss.positive, *of_rows_with_negatives(loss.hardest))])
    dist.all_reduce(sums, group=ranks.process_group)
    return {
        "loss": sums[0] / (shares.total if loss.loss.dim() else ranks.size),
        "positive_similarity": sums[1] / shares.total,
        "hardest_negative_similarity": mean_or_none(sums[2], sums[3]),
    }


def of_rows_with_negatives(hardest: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's hardest negative (N,), 0 where it has none, and 1 where it has one."""
    has_negative = hardest != -torch.inf  # NaN is one
    return hardest.masked_fill(~has_negative, 0.0), has_negative.to(hardest.dtype)


def mean_or_none(total: Tensor, count: Tensor) -> Tensor:
    """Their quotient; −inf, as the largest of no similarities, where there is nothing to take the mean of."""
    return torch.where(count > 0, total / count, -torch.inf)


def _weight(shares: Shares, ranks: Ranks, reduction: Reduction) -> float:
    if reduction == "none":
        return 1.0
    return float(ranks.size) if reduction == "sum" else ranks.size * shares.own / shares.total


def _with_gathered(
    query: Part,
    key: Part,
    negatives: Part | None,
    ranks: Ranks,
    *,
    gathered_negatives: Tensor | None = None,
    hard_negative_weight: float = 0.0,
    mix: Mix | None = None,
    **options: Any,
) -> JoinedLoss:
    keys = gather_rows(key.rows, key.shares, ranks)
    key_group = None if key.group is None else gather_labels(key.group, key.shares, ranks)
    first = key.shares.first
    if mix is not None:
        keys, mixtures = mix(keys, key_group, first)
        options.update(mixtures)
    columns, columns_group, own_negatives = keys, key_group, gathered_negatives
    if negatives is not None and gathered_negatives is not None and hard_negative_weight:
        # A weight is for row i's own negative i: the others' negatives are further keys, of nobody's group.
        own, own_negatives = negatives.shares.slices[ranks.rank], negatives.rows
        columns = torch.cat([keys, gathered_negatives[: own.start], gathered_negatives[own.stop :]])
        if query.group is not None and key_group is not None:
            columns_group = torch.cat([key_group, nobody(query.group).expand(len(columns) - len(keys))])
    loss, positive, hardest, hard_negatives = HF.info_nce_with_statistics(
        query.rows,
        columns,
        target=torch.arange(first, first + len(query.rows), device=keys.device),
        negatives=own_negatives,
        hard_negative_weight=hard_negative_weight,
        query_group=query.group,
        key_group=columns_group,
        **options,
    )
    return JoinedLoss(loss, positive, hardest, keys, key_group, hard_negatives)


def _with_ring(
    query: Part,
    key: Part,
    negatives: Part | None,
    ranks: Ranks,
    *,
    temperature: float | Tensor,
    same_group: str,
    precision: str | None = None,
    backend: str = "auto",
    **options: Any,
) -> JoinedLoss:
    """The rank's own keys by the operator, with all others' log-sum-exp as one more logit of each row."""
    groups: dict[str, Any] = {}
    if query.group is not None and key.group is not None and same_group == "exclude":
        groups["query_group"] = query.group
        groups["key_group"] = _block_groups(query.group, gather_labels(key.group, key.shares, ranks), key, negatives)
    block, shares = key.rows, key.shares
    if negatives is not None:
        block = torch.cat([key.rows, negatives.rows])
        counts = (sum(pair) for pair in zip(key.shares.counts, negatives.shares.counts, strict=True))
        shares = Shares(tuple(counts), ranks.rank)
    lse, foreign_hardest = foreign_log_sum_exp(
        query.rows,
        block,
        scale_of(temperature, query.rows, block),
        ranks=ranks,
        shares=shares,
        precision=precision or "default",
        backend=backend,
        **groups,
    )
    loss, positive, hardest, _ = HF.info_nce_with_statistics(
        query.rows,
        key.rows,
        temperature=temperature,
        negatives=None if negatives is None else negatives.rows,
        extra_logits=lse[:, None],
        query_group=query.group,
        key_group=key.group,
        same_group=same_group,  # type: ignore[arg-type]
        precision=precision,
        backend=backend,
        **options,
    )
    return JoinedLoss(loss, positive, torch.maximum(hardest, foreign_hardest))


def _block_groups(query_group: Tensor, key_group: Tensor, key: Part, negatives: Part | None) -> Tensor:
    """The groups of all blocks' rows: keys have theirs, explicit negatives nobody's."""
    if negatives is None:
        return key_group
    parts = []
    for rows, count in zip(key.shares.slices, negatives.shares.counts, strict=True):
        parts += [key_group[rows], nobody(query_group).expand(count)]
    return torch.cat(parts)


def nobody(query_group: Tensor) -> Tensor:
    """A group (1,) that none of the queries is in."""
    return (query_group.max() + 1)[None]
