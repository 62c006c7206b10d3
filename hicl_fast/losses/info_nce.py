"""InfoNCE as a module."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hicl_fast import _checks as check
from hicl_fast import functional as HF
from hicl_fast.distributed import Gather, Ranks, Shares, agree, attempt, check_gather, joined_means, ranks_of
from hicl_fast.distributed.gathering import describe_rows, gather_rows
from hicl_fast.distributed.info_nce import Part, joined_info_nce, mean_or_none, of_rows_with_negatives
from hicl_fast.losses import hncse
from hicl_fast.losses.hncse import Groups, HardNegativeMixing, Mixtures, PositiveMixing
from hicl_fast.losses.queue import NegativeQueue
from hicl_fast.losses.temperature import MAX_LOGIT_SCALE, Temperature
from hicl_fast.ops.common.autograd import unwrapped
from hicl_fast.ops.common.constants import Reduction, SameGroup
from hicl_fast.ops.info_nce.arguments import (
    OPTIONS,
    check_in_batch,
    check_options,
    check_own_negatives,
    columns_of,
    own_of,
    problem_of,
)

_NOT_SHOWN = ("hard_negative_weight", "precision", "backend")  # of the options, in a loss's representation


def mean_of_rows(loss: Tensor, positive: Tensor, hardest: Tensor) -> dict[str, Tensor]:
    """What a loss logs of its rows (N,); rows without a negative don't count towards the hardest."""
    total, count = (x.sum() for x in of_rows_with_negatives(hardest))
    return {
        "loss": loss.mean(),
        "positive_similarity": positive.mean(),
        "hardest_negative_similarity": mean_or_none(total, count),
    }


def without_missing(means: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the hardest negative's similarity where no row had a negative, which a device is asked for."""
    hardest = means.get("hardest_negative_similarity")
    if hardest is None or not hardest.isneginf():
        return dict(means)
    return {name: value for name, value in means.items() if value is not hardest}


class Given(NamedTuple):
    """What a loss is called with."""

    query: Tensor  # (N, D)
    key: Tensor | HF.Columns  # (M, D)
    negatives: Tensor | HF.Columns | None = None  # (P, D)
    target: Tensor | None = None  # (N,) int64
    query_group: Tensor | None = None  # (N,) or (N, G) int64
    key_group: Tensor | None = None  # (M,) or (M, G) int64
    own_negatives: Tensor | HF.OwnNegatives | None = None
    target_offsets: Tensor | None = None  # (N + 1,) int64; then target is (T,)

    @property
    def columns(self) -> dict[str, HF.Columns]:
        found = {"key": columns_of("key", self.key, self.key_group)}
        if self.negatives is not None:
            found["negatives"] = columns_of("negatives", self.negatives)
        return found

    def check(self, loss: FusedInfoNCELoss) -> None:
        """What :func:`hicl_fast.functional.info_nce` would refuse, found out before anything is mixed or exchanged."""
        mixing = "hard_negative_mixing" if loss.hard_negative_mixing is not None else "positive_mixing"
        if getattr(loss, mixing) is not None:
            if self.target is not None:
                raise ValueError(f"target: expected None with {mixing}, which takes key i for query i's positive")
            if self.query_group is not None and self.query_group.dim() > 1:
                raise ValueError(f"query_group: expected one relation, (N,), with {mixing}, which knows of one")
        options = loss._options(self.negatives, self.own_negatives)
        check_own_negatives(options["hard_negative_weight"], self.query, self.negatives)
        problem = problem_of(
            self.query,
            self.key,
            target=self.target,
            target_offsets=self.target_offsets,
            negatives=self.negatives,
            own_negatives=self.own_negatives,
            query_group=self.query_group,
            key_group=self.key_group,
            **loss._queued(self.query, self.query_group),
            **options,
        )
        problem.check_values()
        if (own := own_of(problem, self.own_negatives)) is not None:
            own.check_values()
        if not loss.in_batch:
            check_in_batch(problem, own)

    def described(self, loss: FusedInfoNCELoss) -> tuple[dict[str, int], dict[str, object]]:
        """How many rows there are, and what has to be the same on all ranks."""
        self.check(loss)
        columns = self.columns
        negatives = columns["negatives"].rows if "negatives" in columns else None
        matrices = {"query": self.query, "key": columns["key"].rows, "negatives": negatives}
        rows = {name: 0 if matrix is None else len(matrix) for name, matrix in matrices.items()}
        terms: dict[str, object] = {name: describe_rows(matrix) for name, matrix in matrices.items()}
        groups = {name: _relations(one.group) for name, one in columns.items()}
        terms |= {"groups": self.query_group is not None, "relations": groups}
        terms |= {f"{name} hardness": one.hardness for name, one in columns.items()}
        return rows, {**terms, **loss.terms()}


def _relations(group: Tensor | None) -> int:
    return 0 if group is None else group.shape[1] if group.dim() == 2 else 1


class FusedInfoNCELoss(nn.Module):
    r"""Temperature-scaled softmax cross entropy over cosine similarities (SimCSE, arXiv 2104.08821, eq. 1 and 5).

    .. math:: \mathrm{loss} = \frac{1}{N} \sum_i -\log \frac{e^{\cos(q_i, k_i)/\tau}}
              {\sum_j e^{\cos(q_i, k_j)/\tau} + \sum_p e^{\cos(q_i, n_p)/\tau}}

    No N×M matrix is built; see :func:`hicl_fast.functional.info_nce` for exactly what is computed.

    Args:
        temperature: τ > 0; where it is learned, its first value.
        learnable_temperature: learn log(1/τ), as CLIP does.
        max_logit_scale: the largest 1/τ that is learned, CLIP's by default; ``None``: no bound. A first value beyond it is
            kept to, and is the bound then. After a step beyond it the parameter is put back to it when the loss is next
            called in training, and comes back from there as soon as the gradient asks for it.
        margin: ArcCon's angular margin in radians.
        symmetric: average with the loss of queries and keys exchanged.
        hard_negative_weight: added to the logit of row i's own negative among ``negatives``, ``negatives[i]`` (SimCSE's rule).
        false_negative_margin: m: columns that are more similar to a query than its positive plus m are taken for false
            negatives and left out (Qwen3-Embedding, arXiv 2506.05176: 0.1).
        false_negative_ratio: ρ: those more similar than ρ times its positive (NV-Retriever, arXiv 2407.15831: 0.95).
        in_batch: ``False``: keys are positives alone, not the other queries' negatives (NV-Embed's second stage; with a queue
            alone, MoCo, whose first step has a loss of 0).
        same_group: what keys of a row's own group are: ``"exclude"``, ``"negative"`` or ``"positive"``; keys of the queue
            as well as the batch's.
        queue_size: rows of earlier batches' keys kept as further negatives; 0 keeps none. They join while training only.
            They keep the groups that they came with: without groups, a text's own key of the last epoch is its negative
            in this one. What came without a group, or meets queries without one, is everybody's negative.
        hard_negative_mixing: adds mixtures of each row's hard negatives (HNCSE). Not with ``symmetric``.
        positive_mixing: mixes the positives first (HNCSE); everything after it sees the mixed keys. Not with ``symmetric``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        precision: ``None``, ``"float32"`` or ``"bf16"``; see :func:`hicl_fast.functional.info_nce`.
        backend: ``"auto"``, ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.
        gather: score this rank's queries against the keys and negatives of all ranks of ``torch.distributed``, with
            gradients to all of them. ``True`` gathers them; ``"ring"`` passes them from rank to rank, so that no rank
            holds more than three ranks' rows. See below for what is returned.
        process_group: the ranks; default: all. Giving one means ``gather=True``.

    With ``gather`` the joined batch is that of the ranks one after the other, however many rows each has. A rank
    returns its part, weighted such that the **mean over the ranks** is the joined batch's loss: under DDP or FSDP, which
    take the mean of the ranks' gradients, parameters get exactly the gradients of one process with the joined batch.
    (``reduction="none"`` returns the rank's own rows' losses, unweighted.) ``last`` is the joined batch's, the same on
    every rank. The queue takes the keys of all ranks in the order of ranks, so that every rank's is the same. All ranks
    call the loss, and its backward pass, equally often; if one has a bad batch or other options, all of them raise.
    Without an initialised process group there is one rank.

    Attributes:
        last: after a call, detached scalars for logging: ``loss``, ``positive_similarity`` and
            ``hardest_negative_similarity``, the mean of the rows that have a negative and absent where none has, as in a
            batch of one. Computed when it is read, which waits for the device; with ``gather``, in the call.

    Example:
        >>> loss_fn = FusedInfoNCELoss(temperature=0.05)
        >>> loss_fn(encoder(batch), encoder(batch)).backward()
    """

    # As the constructor takes them, beside the other names in OPTIONS.
    symmetric: bool
    same_group: SameGroup
    hard_negative_weight: float

    def __init__(
        self,
        temperature: float = 0.05,
        *,
        learnable_temperature: bool = False,
        max_logit_scale: float | None = MAX_LOGIT_SCALE,
        margin: float = 0.0,
        symmetric: bool = False,
        hard_negative_weight: float = 0.0,
        false_negative_margin: float | None = None,
        false_negative_ratio: float | None = None,
        in_batch: bool = True,
        same_group: SameGroup = "exclude",
        queue_size: int = 0,
        hard_negative_mixing: HardNegativeMixing | None = None,
        positive_mixing: PositiveMixing | None = None,
        reduction: Reduction = "mean",
        precision: str | None = None,
        backend: str = "auto",
        gather: Gather = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check.flag("learnable_temperature", learnable_temperature)
        options = check_options(
            margin=margin,
            symmetric=symmetric,
            same_group=same_group,
            reduction=reduction,
            hard_negative_weight=hard_negative_weight,
            false_negative_margin=false_negative_margin,
            false_negative_ratio=false_negative_ratio,
            in_batch=in_batch,
            precision=precision,
            backend=backend,
        )
        check.whole_number("queue_size", queue_size, 0)
        check.instance("hard_negative_mixing", hard_negative_mixing, HardNegativeMixing)
        check.instance("positive_mixing", positive_mixing, PositiveMixing)
        for name, mixing in (("hard_negative_mixing", hard_negative_mixing), ("positive_mixing", positive_mixing)):
            if symmetric and mixing is not None:
                raise ValueError(f"{name}: expected None with symmetric=True, since a mixture has one direction")
        if hard_negative_mixing is not None and (false_negative_margin, false_negative_ratio, in_batch) != (
            None,
            None,
            True,
        ):
            raise ValueError(
                "hard_negative_mixing: expected None with a limit or in_batch=False, which leave out the keys that it mixes"
            )
        self.temperature = Temperature(temperature, learnable_temperature, max_logit_scale)
        vars(self).update(options)
        self.queue = NegativeQueue(queue_size) if queue_size else None
        self.hard_negative_mixing, self.positive_mixing = hard_negative_mixing, positive_mixing
        self.gather, self.process_group = check_gather(gather, process_group), process_group
        self._refuse_with_gather()
        self._rows: tuple[Tensor, Tensor, Tensor] | None = None
        self._joined: dict[str, Tensor] = {}

    @property
    def last(self) -> dict[str, Tensor]:
        return without_missing(self._joined if self._rows is None else mean_of_rows(*self._rows))

    def forward(
        self,
        query: Tensor,
        key: Tensor | HF.Columns,
        negatives: Tensor | HF.Columns | None = None,
        *,
        target: Tensor | None = None,
        target_offsets: Tensor | None = None,
        own_negatives: Tensor | HF.OwnNegatives | None = None,
        query_group: Tensor | None = None,
        key_group: Tensor | None = None,
    ) -> Tensor:
        """The loss of ``query`` (N, D) against ``key`` (M, D), ``negatives`` (P, D) and the queue.

        Args:
            query: (N, D) one view of the batch.
            key: (M, D) the other view; key i is query i's positive, unless ``target`` says otherwise. Keys and negatives
                may be :class:`hicl_fast.functional.Columns`, which have groups and hardness beside their rows.
            negatives: (P, D) hard negatives.
            target: (N,) int64, the key that is query i's positive: of passages that stand by query, a positive and G − 1
                hard negatives each, ``torch.arange(N) * G``. Not with mixing, which takes key i for it.
            target_offsets: (N + 1,) int64, where queries have several positives: those of query i are the keys
                ``target[target_offsets[i] : target_offsets[i + 1]]``; target is (T,) then.
            own_negatives: (N, K, D) hard negatives that one query each is compared with, or
                :class:`hicl_fast.functional.OwnNegatives`, as many for each as it has. With ``gather`` they stay where
                they are.
            query_group: (N,) int64 group of each query (a text's number in the data, a label); with ``key_group`` (M,). Or
                (N, G) and (M, G), for G relations.
            key_group: (M,) or (M, G) int64 group of each key.

        Returns:
            A scalar, or (N,) with ``reduction="none"``; float32, or float64 where an input is float64.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came; with ``gather``, ValueError on
                every rank, with the words of those that failed.
        """
        columns = Given(query, key, negatives, target, query_group, key_group, own_negatives, target_offsets)
        if self.gather and (ranks := ranks_of(self.process_group)).size > 1:
            return self._forward_joined(columns, ranks)
        mixes = self.hard_negative_mixing is not None or self.positive_mixing is not None
        if mixes:
            columns.check(self)  # mixing comes before info_nce's own checks
        else:
            check_own_negatives(self.hard_negative_weight, query, negatives)
        temperature, keys = self.temperature(), columns_of("key", key, key_group)
        groups = self._groups(query_group, keys.group)
        if self.positive_mixing is not None:
            keys = replace(keys, rows=self.positive_mixing(query, keys.rows, groups))
        mixtures = Mixtures()
        if self.hard_negative_mixing is not None:
            mixtures = self.hard_negative_mixing(query, keys.rows, temperature, groups)
        has_columns = isinstance(key, HF.Columns)  # as it came, so that errors name what was given
        result = HF.info_nce_with_statistics(
            query,
            keys if has_columns else keys.rows,
            target=target,
            target_offsets=target_offsets,
            temperature=temperature,
            negatives=negatives,
            own_negatives=own_negatives,
            extra_logits=mixtures.extra_logits,
            mixing=mixtures.mixing,
            query_group=query_group,
            key_group=None if has_columns else keys.group,
            **self._queued(query, query_group),
            **self._options(negatives, own_negatives),
        )
        if self.queue is not None and self.training:
            self.queue.push(keys.rows, keys.group)
        if self.hard_negative_mixing is not None:
            self.hard_negative_mixing.remember(mixtures, result.hard_negatives)
        self._rows = (unwrapped(result.loss), unwrapped(result.positive), unwrapped(result.hardest))
        return result.loss

    def _options(self, negatives: object | None, own_negatives: object | None) -> dict[str, Any]:
        """What :func:`hicl_fast.functional.info_nce` is asked for beside its tensors."""
        options = {name: getattr(self, name) for name in OPTIONS}
        if negatives is not None:
            return options
        if self.hard_negative_weight and own_negatives is not None:
            raise ValueError(
                "hard_negative_weight: expected 0 with own_negatives and no negatives, since it is for negatives[i], "
                f"got {self.hard_negative_weight}"
            )
        return {**options, "hard_negative_weight": 0.0}

    def _queued(self, query: Tensor, query_group: Tensor | None) -> dict[str, Any]:
        """The queue's rows as a bank, and their groups where the queries have groups."""
        if self.queue is None or not self.training:
            return {}
        self.queue.check_fits("query", query, query_group)
        rows, groups = self.queue.rows(), self.queue.groups()
        if rows is None and not self.in_batch:  # the first step, which has nothing to tell its positives from yet
            rows = query.detach()[:0] if isinstance(query, Tensor) else None
        return {"bank": rows, "bank_group": None if query_group is None else groups}

    def _groups(self, query_group: Tensor | None, key_group: Tensor | None) -> Groups | None:
        """The groups as far as they decide what can be a hard negative."""
        if query_group is None or key_group is None or self.same_group == "negative":
            return None
        return Groups(query_group, key_group)

    @torch.compiler.disable
    def _forward_joined(self, columns: Given, ranks: Ranks) -> Tensor:
        told, failure = attempt(lambda: columns.described(self))
        shares = agree(ranks, *(told or ({}, {})), failure)
        return self.joined(columns, ranks, shares)

    def terms(self) -> dict[str, object]:
        """The options that have to be the same on all ranks."""
        return {
            "loss": type(self).__name__,
            "gather": self.gather,
            "temperature": self.temperature.extra_repr(),
            "options": self.extra_repr(),
            "hard_negative_weight": self.hard_negative_weight,
            "queue_size": None if self.queue is None else self.queue.size,
            "hard_negative_mixing": self.hard_negative_mixing,
            "positive_mixing": self.positive_mixing,
            "training": self.training,
        }

    def joined(self, given: Given, ranks: Ranks, shares: dict[str, Shares]) -> Tensor:
        """The loss over the joined batch once the ranks have agreed on their ``shares`` of query, key and negatives."""
        mixtures = Mixtures()
        query, query_group = given.query, given.query_group

        def mix(keys: Tensor, keys_group: Tensor | None, first: int) -> tuple[Tensor, dict[str, Any]]:
            nonlocal mixtures
            groups = self._groups(query_group, keys_group)
            fewest = ranks.smallest(hncse.fewest_candidates(query, keys, groups, first))
            part = hncse.Part(first, fewest, ranks.smallest)
            if self.positive_mixing is not None:
                own = self.positive_mixing(query, keys, groups, part)[shares["key"].slices[ranks.rank]]
                keys = gather_rows(own, shares["key"], ranks)
            if self.hard_negative_mixing is not None:
                mixtures = self.hard_negative_mixing(query, keys, self.temperature(), groups, part)
            return keys, mixtures._asdict()

        mixes = self.hard_negative_mixing is not None or self.positive_mixing is not None
        parts = {
            name: Part(one.rows, shares[name], one.group, float(one.hardness)) for name, one in given.columns.items()
        }
        result = joined_info_nce(
            Part(query, shares["query"], query_group),
            parts["key"],
            parts.get("negatives"),
            ranks,
            target=given.target,
            target_offsets=given.target_offsets,
            own_negatives=given.own_negatives,
            gather=self.gather,
            mix=mix if mixes else None,
            temperature=self.temperature(),
            **self._queued(query, query_group),
            **self._options(given.negatives, given.own_negatives),
        )
        if self.queue is not None and self.training and result.keys is not None:
            self.queue.push(result.keys, result.key_group)
        if self.hard_negative_mixing is not None:
            self.hard_negative_mixing.remember(mixtures, result.hard_negatives)
        self._rows, self._joined = None, joined_means(result, shares["query"], ranks)
        return result.loss

    def _refuse_with_gather(self) -> None:
        """What can't be had with ``gather``, or not with a ring."""
        if not self.gather:
            return
        for name in ("hard_negative_mixing", "positive_mixing"):
            if self.gather == "ring" and getattr(self, name) is not None:
                raise ValueError(f'{name}: expected None with gather="ring", since it looks at all keys')
        if self.gather == "ring" and not self.in_batch:
            raise ValueError('in_batch: expected True with gather="ring", which is for the other ranks\' keys')
        if self.positive_mixing is not None and self.positive_mixing.weights == "search":
            raise ValueError(
                "positive_mixing: expected a pair of weights with gather, since their search looks at all rows, got 'search'"
            )
        if self.gather == "ring" and self.queue is not None:
            raise ValueError('queue_size: expected 0 with gather="ring", since a queue takes the keys of all ranks')
        if self.gather == "ring" and self.same_group == "positive":
            raise ValueError(
                'same_group: expected "exclude" or "negative" with gather="ring", which keeps a log-sum-exp of other '
                "ranks' keys and not their logits"
            )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in OPTIONS if name not in _NOT_SHOWN)
