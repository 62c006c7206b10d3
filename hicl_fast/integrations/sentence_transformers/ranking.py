r"""Multiple-negatives ranking as sentence-transformers defines it, composed of fused row losses.

Row i has the query q_i, its positive p_i and the logit s_i = scale · sim(q_i, p_i). Each direction adds columns:

=================  ========  =================================================================================
direction          row       columns
=================  ========  =================================================================================
query_to_doc       q_i       all documents: positives and hard negatives of all rows
query_to_query     q_i       all queries but q_i
doc_to_query       p_i       all queries; s_i is among them a second time, and is counted twice in one softmax
doc_to_doc         p_i       all documents but those of row i
=================  ========  =================================================================================

One softmax over all columns (``joint``) is :math:`\log(e^{L_1} + e^{L_2})` of two row losses, one for the columns seen
from q_i and one for those seen from p_i: the N×N matrices are never there.

Hardness (arXiv 2503.04812, eq. 5) adds strength · sim, without gradient, to logits of query_to_doc: those columns have the
larger scale, and their log-sum-exp the gradient of the smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hicl_fast import functional as HF
from hicl_fast.integrations.similarity import Similarity, as_cosines, pairwise

_NOBODY = -1  # the group of keys that are nobody's own


@dataclass(frozen=True)
class Rules:
    """The options of sentence-transformers' loss; its constructor has checked them."""

    scale: float | Tensor = 20.0  # a tensor () is learned, or may be
    similarity: Similarity = "cosine"
    directions: tuple[str, ...] = ("query_to_doc",)
    partition_mode: str = "joint"
    hardness_mode: str | None = None
    hardness_strength: float = 0.0

    def hardens_in_batch(self) -> bool:
        """Whether other rows' documents are weighted by hardness."""
        return self.hardness_mode in ("in_batch_negatives", "all_negatives") and self.hardness_strength > 0

    def hardens_own(self) -> bool:
        """Whether a row's own hard negatives are weighted by hardness."""
        return self.hardness_mode in ("hard_negatives", "all_negatives") and self.hardness_strength > 0

    def hardened_scale(self) -> tuple[float | Tensor, float | Tensor]:
        """The larger scale, and the share of its gradient that embeddings get.

        Only the embeddings: a learned scale has its gradient divided by the share here, since it is multiplied by it there.
        """
        scale = self.scale + self.hardness_strength
        if not isinstance(scale, Tensor):
            return scale, self.scale / scale
        now = scale.detach()
        share = (torch.as_tensor(self.scale) / scale).detach()
        return now + (scale - now) / share, share

    def words(self) -> str:
        """The options without what is learned."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ", ".join(f"{name}={'learned' if isinstance(value, Tensor) else value}" for name, value in named)


@dataclass(frozen=True)
class Batch:
    """All rows of all processes, of which this one's are ``first`` to ``first + count``."""

    queries: Tensor  # (W, D)
    documents: Sequence[Tensor]  # (W, D) each: positives, then columns of hard negatives
    first: int
    count: int  # B

    @property
    def own(self) -> slice:
        return slice(self.first, self.first + self.count)

    def index(self) -> Tensor:  # (B,) int64
        return torch.arange(self.first, self.first + self.count, device=self.queries.device)

    def groups(self, *, own: bool) -> Tensor:  # (W,) int64
        """Of one column's rows: their row's number where a row's own is to be left out, else nobody's."""
        rows = self.queries.shape[0]
        if own:
            return torch.arange(rows, device=self.queries.device)
        return torch.full((rows,), _NOBODY, device=self.queries.device)


def ranking_loss(batch: Batch, rules: Rules) -> Tensor:
    """Mean over the own rows of log Z_i − s_i; float32, or float64 where an input is."""
    if _is_symmetric(batch, rules):
        query, key, temperature = as_cosines(batch.queries, batch.documents[0], rules.scale, rules.similarity)
        return HF.info_nce(query, key, temperature=temperature, symmetric=True)
    from_document = {"doc_to_query", "doc_to_doc"} & set(rules.directions)
    if not from_document:
        return _from_query(batch, rules, "mean")
    if rules.partition_mode == "per_direction":
        return (_from_query(batch, rules, "mean") + _from_document(batch, rules, "mean")) / 2
    return torch.logaddexp(_from_query(batch, rules, "none"), _from_document(batch, rules, "none")).mean()


def _is_symmetric(batch: Batch, rules: Rules) -> bool:
    """Both directions from one sweep."""
    both = set(rules.directions) == {"query_to_doc", "doc_to_query"} and rules.partition_mode == "per_direction"
    local = len(batch.documents) == 1 and batch.count == batch.queries.shape[0]
    return both and local and not rules.hardens_in_batch()


def _from_query(batch: Batch, rules: Rules, reduction: Literal["mean", "none"]) -> Tensor:
    """log Z − s over query_to_doc and query_to_query."""
    if rules.hardens_in_batch():
        rows = _from_query_hardened(batch, rules)
        return rows.mean() if reduction == "mean" else rows
    own_logits = _own_negative_logits(batch, rules) if rules.hardens_own() else None
    with_queries = "query_to_query" in rules.directions
    keys, groups = [*batch.documents], None
    if with_queries:
        keys.append(batch.queries)
    if with_queries or own_logits is not None:
        columns = [batch.groups(own=own_logits is not None)] * len(batch.documents)
        groups = torch.cat([*columns, batch.groups(own=True)] if with_queries else columns)
    query = batch.queries[batch.own]
    return _row_losses(
        query, keys, rules.scale, rules.similarity, batch.index(), batch.index(), groups, own_logits, reduction
    )


def _from_query_hardened(batch: Batch, rules: Rules) -> Tensor:  # (B,)
    """The same where hardness gives other rows' documents a larger scale than the positive has."""
    query, positive = batch.queries[batch.own], batch.documents[0][batch.own]
    similarity = pairwise(query, positive, rules.similarity)  # (B,)
    scale, share = rules.hardened_scale()
    terms = [_scale_gradient(_log_sum(query, batch.documents, batch, scale, rules.similarity), share)]
    if "query_to_query" in rules.directions:
        terms.append(_log_sum(query, [batch.queries], batch, rules.scale, rules.similarity))
    logits = torch.cat([torch.stack(terms, dim=1), _own_negative_logits(batch, rules)], dim=1)
    some = (logits != -torch.inf).any(dim=1)  # or there is nothing but the positive, which stays out of the sum
    log_sum = torch.logsumexp(torch.where(some[:, None], logits, 0.0), dim=1)
    return torch.where(some, F.softplus(log_sum - rules.scale * similarity), 0.0)


def _from_document(batch: Batch, rules: Rules, reduction: Literal["mean", "none"]) -> Tensor:
    """log Z − s over doc_to_query and doc_to_doc."""
    positive, index = batch.documents[0][batch.own], batch.index()
    own_documents = [batch.groups(own=True)] * len(batch.documents)
    if "doc_to_query" not in rules.directions:
        log_z = _log_sum(positive, batch.documents, batch, rules.scale, rules.similarity)
        rows = log_z - rules.scale * pairwise(batch.queries[batch.own], positive, rules.similarity)
        return rows.mean() if reduction == "mean" else rows
    keys, groups = [batch.queries], None
    if "doc_to_doc" in rules.directions:
        keys += batch.documents
        groups = torch.cat([batch.groups(own=False), *own_documents])
    return _row_losses(positive, keys, rules.scale, rules.similarity, index, index, groups, None, reduction)


def _own_negative_logits(batch: Batch, rules: Rules) -> Tensor:  # (B, columns of hard negatives)
    query = batch.queries[batch.own]
    columns = [pairwise(query, negative[batch.own], rules.similarity) for negative in batch.documents[1:]]
    if not columns:
        return query.new_empty(batch.count, 0)
    similarity = torch.stack(columns, dim=1)
    hardness = rules.hardness_strength * similarity.detach() if rules.hardens_own() else 0.0
    return rules.scale * similarity + hardness


# --- rows ------------------------------------------------------------------------------------------------------------


def _row_losses(
    query: Tensor,  # (B, D)
    keys: Sequence[Tensor],  # (·, D) each, M rows in all
    scale: float | Tensor,
    similarity: Similarity,
    target: Tensor,  # (B,) int64
    query_group: Tensor,  # (B,) int64
    key_group: Tensor | None,  # (M,) int64; None: every key counts
    extra_logits: Tensor | None,  # (B, E)
    reduction: Literal["mean", "none"],
) -> Tensor:
    """Log-sum-exp of a row's columns minus its target's logit, without the keys of its own group."""
    key = keys[0] if len(keys) == 1 else torch.cat(list(keys))
    query, key, temperature = as_cosines(query, key, scale, similarity)
    return HF.info_nce(
        query,
        key,
        target=target,
        temperature=temperature,
        extra_logits=extra_logits if extra_logits is not None and extra_logits.shape[1] else None,
        query_group=None if key_group is None else query_group,
        key_group=key_group,
        reduction=reduction,
    )


def _log_sum(
    query: Tensor,  # (B, D)
    keys: Sequence[Tensor],  # (W, D) each
    batch: Batch,
    scale: float | Tensor,
    similarity: Similarity,
) -> Tensor:  # (B,)
    """Log-sum-exp of the logits of other rows' keys; −inf where there are none."""
    groups = batch.groups(own=True).repeat(len(keys))
    query, key, temperature = as_cosines(query, torch.cat(list(keys)), scale, similarity)
    index = batch.index()
    return HF.log_sum_exp(
        query, key, target=index, temperature=temperature, query_group=index, key_group=groups
    ).negative


def _scale_gradient(x: Tensor, factor: float | Tensor) -> Tensor:
    """x, with its gradient times ``factor`` from 0 to 1."""
    return factor * x + (1.0 - factor) * x.detach()
