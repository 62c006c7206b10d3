"""InfoNCE of a rank's own queries against the keys of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hicl_fast import functional as HF
from hicl_fast.distributed.agreement import Shares
from hicl_fast.distributed.gathering import gather_labels, gather_rows
from hicl_fast.distributed.ranks import Gather, Ranks
from hicl_fast.distributed.ring import Settings, Travelling, foreign_log_sum_exp
from hicl_fast.ops.common.constants import Reduction, SameGroup
from hicl_fast.ops.common.numbers import scale_of
from hicl_fast.ops.info_nce.arguments import by_relation, problem_of
from hicl_fast.ops.info_nce.rows import limits_of

# From the keys of all ranks, their groups and the place of the first own one among them: the keys to score, and further
# options of info_nce.
Mix = Callable[[Tensor, Tensor | None, int], tuple[Tensor, dict[str, Any]]]


class Part(NamedTuple):
    """One of the loss's matrices: this rank's rows of it, and how many every rank has."""

    rows: Tensor  # (N, D)
    shares: Shares
    group: Tensor | None = None  # (N,) or (N, G) int64
    hardness: float = 0.0

    def gathered(self, ranks: Ranks) -> HF.Columns:
        """The rows of all ranks."""
        group = None if self.group is None else gather_labels(self.group, self.shares, ranks)
        return HF.Columns(gather_rows(self.rows, self.shares, ranks), group=group, hardness=self.hardness)

    def own(self) -> HF.Columns:
        return HF.Columns(self.rows, group=self.group, hardness=self.hardness)


class JoinedLoss(NamedTuple):
    loss: Tensor  # () or (N,)
    positive: Tensor  # (N,) similarity of each own row's positive
    hardest: Tensor  # (N,) of its hardest negative; −inf where there is none
    keys: Tensor | None = None  # (M₀ + M₁ + …, D), where they were gathered
    key_group: Tensor | None = None  # (M₀ + M₁ + …,) or (…, G) int64, likewise
    hard_negatives: Tensor | None = None  # (N, k) int64, the keys that were mixed


def joined_info_nce(
    query: Part,
    key: Part,
    negatives: Part | None,
    ranks: Ranks,
    *,
    target: Tensor | None = None,
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
        target: (N,) int64, the place among this rank's keys of each own query's positive; default: that of the query.
            (T,) with ``target_offsets`` among the options.
        gather: ``True`` gathers keys and negatives; ``"ring"`` lets them travel, and no rank holds all of them.
        symmetric: average with the loss of queries and keys exchanged, for which the queries are exchanged too.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        mix: HNCSE's mixing, with ``gather=True`` and without ``symmetric``.
        options: of :func:`hicl_fast.functional.info_nce`. Bank and extra logits are this rank's own.
    """
    score = _with_ring if gather == "ring" else _with_gathered
    if negatives is not None and gather is True:
        options["gathered_negatives"] = negatives.gathered(ranks)
    if mix is not None:
        options["mix"] = mix
    result = score(query, key, negatives, ranks, target=target, reduction=reduction, **options)
    if symmetric:
        exchanged = key._replace(hardness=0.0), query._replace(hardness=key.hardness)
        if key.group is None:  # then nothing is of a row's group
            exchanged = exchanged[0], exchanged[1]._replace(group=None)
            negatives = None if negatives is None else negatives._replace(group=None)
            for name in ("gathered_negatives", "own_negatives"):
                if isinstance(options.get(name), (HF.Columns, HF.OwnNegatives)):
                    options[name] = replace(options[name], group=None)
        columns = score(*exchanged, negatives, ranks, target=None, reduction=reduction, **options)
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
    target: Tensor | None,
    gathered_negatives: HF.Columns | None = None,
    hard_negative_weight: float = 0.0,
    mix: Mix | None = None,
    **options: Any,
) -> JoinedLoss:
    keys, first = key.gathered(ranks), key.shares.first
    if mix is not None:
        mixed_keys, mixtures = mix(keys.rows, keys.group, first)
        keys = replace(keys, rows=mixed_keys)
        options.update(mixtures)
    own = torch.arange(len(query.rows), device=keys.rows.device) if target is None else target
    if negatives is not None and gathered_negatives is not None and hard_negative_weight:
        gathered_negatives = _own_first(gathered_negatives, negatives.shares.slices[ranks.rank])
    loss, positive, hardest, hard_negatives = HF.info_nce_with_statistics(
        query.rows,
        keys,
        target=own + first,
        negatives=gathered_negatives,
        hard_negative_weight=hard_negative_weight,
        query_group=query.group,
        **options,
    )
    return JoinedLoss(loss, positive, hardest, keys.rows, keys.group, hard_negatives)


def _own_first(negatives: HF.Columns, own: slice) -> HF.Columns:
    """A weight is for row i's own negative i, which is looked for at place i."""

    def moved(x: Tensor) -> Tensor:
        return torch.cat([x[own], x[: own.start], x[own.stop :]])

    return replace(
        negatives, rows=moved(negatives.rows), group=None if negatives.group is None else moved(negatives.group)
    )


def _with_ring(
    query: Part,
    key: Part,
    negatives: Part | None,
    ranks: Ranks,
    *,
    target: Tensor | None,
    temperature: float | Tensor,
    same_group: SameGroup,
    target_offsets: Tensor | None = None,
    false_negative_margin: float | None = None,
    false_negative_ratio: float | None = None,
    precision: str | None = None,
    backend: str = "auto",
    **options: Any,
) -> JoinedLoss:
    """The rank's own keys by the operator, with all others' log-sum-exp as one more logit of each row."""
    positives: dict[str, Any] = {
        "target": target,
        "target_offsets": target_offsets,
        "false_negative_margin": false_negative_margin,
        "false_negative_ratio": false_negative_ratio,
    }
    foreign = [x for x in (negatives, key) if x is not None]
    block = torch.cat([x.rows for x in foreign]) if len(foreign) > 1 else key.rows
    travelling = {name: _travelling(x, ranks, same_group) for name, x in (("key", key), ("negatives", negatives))}
    has_groups = any(x is not None and x.group is not None for x in travelling.values())
    settings = Settings(
        ranks=ranks,
        **travelling,  # type: ignore[arg-type]
        query_group=by_relation(query.group) if has_groups else None,
        limit=limits_of(problem_of(query.rows, key.rows, **positives)),
        precision=precision or "default",
        backend=backend,
    )
    lse, foreign_hardest = foreign_log_sum_exp(query.rows, block, scale_of(temperature, query.rows, block), settings)
    loss, positive, hardest, _ = HF.info_nce_with_statistics(
        query.rows,
        key.own(),
        temperature=temperature,
        negatives=None if negatives is None else negatives.own(),
        extra_logits=lse[:, None],
        query_group=query.group,
        same_group=same_group,
        precision=precision,
        backend=backend,
        **positives,
        **options,
    )
    return JoinedLoss(loss, positive, torch.maximum(hardest, foreign_hardest))


def _travelling(part: Part | None, ranks: Ranks, same_group: SameGroup) -> Travelling | None:
    if part is None:
        return None
    group = None
    if part.group is not None and same_group == "exclude":
        group = by_relation(gather_labels(part.group, part.shares, ranks))
    return Travelling(part.shares, group, part.hardness)
