"""HNCSE's two ways of making harder examples, as parts of a loss (arXiv 2411.12156)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from hicl_fast import _checks as check
from hicl_fast import functional as HF
from hicl_fast.losses.queue import NegativeQueue
from hicl_fast.losses.state import Stateful
from hicl_fast.ops.backends import registry
from hicl_fast.ops.common.arguments import MOST_NEGATIVES
from hicl_fast.ops.common.autograd import unwrapped
from hicl_fast.ops.positive_mixing.api import check_options as check_positive_mixing_options
from hicl_fast.ops.positive_mixing.operator import Weights

DEFAULT_K = 10  # the paper's, and what "auto" stands for

logger = logging.getLogger("hicl_fast")


class Part(NamedTuple):
    """Which rows of a larger batch the queries are, where the keys are those of all of it."""

    first: int  # query i's positive is key first + i
    fewest: int  # keys that every row of the batch has for negatives
    smallest: Callable[[int], int]  # of all ranks' numbers


class Groups(NamedTuple):
    """Keys of a query's own group are nobody's hard negatives for it."""

    query: Tensor  # (N,) int64
    key: Tensor  # (M,) int64


class Mixtures(NamedTuple):
    """Mixtures as further columns of a softmax: the two arguments of ``info_nce`` that can bring them."""

    mixing: HF.Mixing | None = None  # of the keys: chosen and mixed while the loss goes through its similarities
    extra_logits: Tensor | None = None  # (N, m), of previous batches' keys


@dataclass(frozen=True)
class Mixed:
    """What the last call mixed: enough to compute the same logits again."""

    bank: Tensor | None  # (B, D); None: the keys
    index: Tensor  # (N, k) int64, rows of the bank
    pairs: Tensor  # (N, m, 2) int64, places in index


class HardNegativeMixing(Stateful):
    r"""Mixtures of each row's hard negatives as further negatives of that row.

    .. math:: g = \alpha\, n_a + (1 - \alpha)\, n_b, \qquad \ell = \frac{1}{\tau} \frac{q \cdot g}{\|q\| \|g\|}

    :math:`n_a, n_b` are two of the row's k most similar negatives, not normalised, drawn anew in every training step
    from (seed, step, row): a resumed run draws what it would have drawn. Gradients reach the query and, with
    ``bank="batch"``, the keys that were mixed.

    Args:
        k: how many of a row's hardest negatives are mixed, or as many as every row of the batch has, where that is fewer:
            any batch trains, also an epoch's last and smallest one, and fewer are said once in the log of ``hicl_fast``.
            Where some row has fewer than two, nothing is mixed. ``"auto"`` is 10.
        num_mixed: m, mixtures for each row.
        alpha: α.
        bank: where hard negatives are looked for: ``"batch"`` (the authors' code), the keys the row is compared with
            but its own positive and its group's; or ``"previous"`` (the paper), the keys of previous batches, none of
            which is anyone's positive; with groups, but those of the row's group.
        queue_size: rows of previous batches that are kept, with ``bank="previous"``. While it fills up there are fewer
            than k.
        require_k: raise where a row has fewer than k negatives, rather than mix what there is. Not with
            ``bank="previous"``.
        seed: of the pairs; default: PyTorch's initial seed.
        backend: with ``bank="previous"``: ``"auto"``, ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"``. The batch's own
            keys are mixed by the loss's backend.

    Attributes:
        mixed: what the last call of the loss mixed, or ``None``.
    """

    STATE = ("step",)

    step: int  # calls so far, in training
    mixed: Mixed | None

    def __init__(
        self,
        k: int | Literal["auto"] = DEFAULT_K,
        num_mixed: int = 40,
        alpha: float = 0.5,
        *,
        bank: Literal["batch", "previous"] = "batch",
        queue_size: int = 1024,
        require_k: bool = False,
        seed: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check.one_of("bank", bank, ("batch", "previous"))
        _check_k(k)
        check.whole_number("num_mixed", num_mixed, 1)
        check.share("alpha", alpha)
        check.whole_number("queue_size", queue_size, 2)  # two are mixed
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise TypeError(f"seed: expected a whole number or None, got {check.describe(seed)}")
        registry.check_name(backend)
        check.flag("require_k", require_k)
        if require_k and bank == "previous":
            raise ValueError('require_k: expected False with bank="previous", which fills up as batches come')
        self.k, self.num_mixed, self.alpha, self.bank, self.backend = k, num_mixed, alpha, bank, backend
        self.require_k = require_k
        self.seed = torch.initial_seed() if seed is None else seed
        self.queue = NegativeQueue(queue_size) if bank == "previous" else None
        self.step = 0
        self.mixed = None
        self._has_said_fewer = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        temperature: float | Tensor,
        groups: Groups | None = None,
        part: Part | None = None,
    ) -> Mixtures:
        """The mixtures for ``query`` (N, D) and ``key`` (M, D), key i being query i's positive or that of its ``part``.

        Empty where some row has fewer than two negatives, so that there is nothing to mix.
        """
        self.mixed = None
        if self.queue is None:
            mixtures = self._of_keys(query, key, groups, part)
        else:
            mixtures = self._of_previous_batches(query, temperature, groups, part)
        if self.training:
            self._advance()
            if self.queue is not None:
                self.queue.push(key, None if groups is None else groups.key)
        return mixtures

    def remember(self, mixtures: Mixtures, hard_negatives: Tensor | None) -> None:
        """Set ``mixed`` once the loss has chosen ``hard_negatives`` (N, k) int64 among the keys."""
        if mixtures.mixing is not None and hard_negatives is not None:
            self.mixed = Mixed(None, unwrapped(hard_negatives), unwrapped(mixtures.mixing.pairs))

    def _of_keys(self, query: Tensor, key: Tensor, groups: Groups | None, part: Part | None) -> Mixtures:
        k = self._as_many_as(fewest_candidates(query, key, groups) if part is None else part.fewest)
        if k < 2:
            return Mixtures()
        return Mixtures(mixing=HF.Mixing(k, self._pairs(query, k, part), self.alpha))

    def _of_previous_batches(
        self, query: Tensor, temperature: float | Tensor, groups: Groups | None, part: Part | None
    ) -> Mixtures:
        assert self.queue is not None
        bank, bank_group = self.queue.rows(), self.queue.groups()
        if bank is None:
            return Mixtures()
        fewest, grouping = len(bank), {}
        if groups is not None and bank_group is not None:
            grouping = {"query_group": groups.query, "key_group": bank_group}
            fewest = fewest_outside(groups.query, bank_group)
            fewest = fewest if part is None else part.smallest(fewest)
        k = min(self._most(), fewest)
        if k < 2:
            return Mixtures()
        _, index = HF.hard_negatives(query, bank, k, exclude_target=False, backend=self.backend, **grouping)
        pairs = self._pairs(query, k, part)
        self.mixed = Mixed(unwrapped(bank), unwrapped(index), unwrapped(pairs))
        logits = HF.mixed_negative_logits(
            query, bank, index, pairs, alpha=self.alpha, temperature=temperature, backend=self.backend
        )
        return Mixtures(extra_logits=logits)

    def _most(self) -> int:
        return DEFAULT_K if self.k == "auto" else int(self.k)

    def _as_many_as(self, fewest: int) -> int:
        """k, or as many as every row has."""
        k = self._most()
        if k <= fewest:
            return k
        if self.require_k:
            raise ValueError(f"k: expected at most {fewest}, the negatives that every row has, got {k}")
        self._say_fewer(k, fewest)
        return fewest

    @torch.compiler.disable
    def _say_fewer(self, k: int, fewest: int) -> None:
        if not self._has_said_fewer:
            self._has_said_fewer = True
            done = f"{fewest} of each row's are mixed" if fewest > 1 else "nothing is mixed"
            logger.warning(
                "hard-negative mixing: in this batch a row has %d negatives, fewer than k = %d: %s (said once)",
                fewest,
                k,
                done,
            )

    @torch.compiler.disable
    def _pairs(self, query: Tensor, k: int, part: Part | None) -> Tensor:
        first_row = 0 if part is None else part.first
        seed = self.seed + (self.step << 32)
        return HF.random_pairs(len(query), self.num_mixed, k, seed, query.device, first_row=first_row)

    @torch.compiler.disable
    def _advance(self) -> None:
        self.step += 1

    def extra_repr(self) -> str:
        required = ", require_k=True" if self.require_k else ""
        return f"k={self.k}, num_mixed={self.num_mixed}, alpha={self.alpha}, bank={self.bank!r}, seed={self.seed}{required}"


class PositiveMixing(nn.Module):
    """Each row's positive mixed with its hardest negative where the two are near each other.

    With d₁ and d₂ the query's similarities to its positive p and its hardest negative n: where d₁ > d₂ by at most
    ``threshold`` · d₁, p becomes w₁ p + w₂ n; where d₁ ≤ d₂, it becomes (d₁ p + d₂ n) / (d₁ + d₂); elsewhere, and where
    a similarity has no sense as a weight (d₁ ≤ 0), it stays. Gradients reach p and n; the weights are constants.

    Args:
        threshold: how much smaller than d₁, relative to it, d₂ may be.
        weights: (w₁, w₂), or ``"search"``: the best of a grid; see :func:`hicl_fast.functional.positive_mixing`.
        backend: ``"auto"``, ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Attributes:
        hardest: (N,) int64, the key that the last call took for each row's hardest negative; or ``None``.
    """

    hardest: Tensor | None

    def __init__(self, threshold: float = 0.1, weights: Weights = (1.0, 0.1), *, backend: str = "auto") -> None:
        super().__init__()
        check_positive_mixing_options(threshold, weights)
        registry.check_name(backend)
        self.threshold, self.weights, self.backend = threshold, weights, backend
        self.hardest = None

    def forward(self, query: Tensor, key: Tensor, groups: Groups | None = None, part: Part | None = None) -> Tensor:
        """The keys (M, D) with the positives of ``query`` (N, D), the first N of them or those of its ``part``, mixed.

        Where a row has no negative, all rows keep their positives.
        """
        self.hardest = None
        if (fewest_candidates(query, key, groups) if part is None else part.fewest) < 1:
            return key
        first = 0 if part is None else part.first
        query_group, key_group = (None, None) if groups is None else groups
        _, index = HF.hard_negatives(
            query,
            key,
            1,
            target=torch.arange(first, first + len(query), device=query.device) if first else None,
            query_group=query_group,
            key_group=key_group,
            backend=self.backend,
        )
        hardest = index[:, 0]
        self.hardest = unwrapped(hardest)
        before, positive, after = key.tensor_split([first, first + len(query)])
        mixed = HF.positive_mixing(query, positive, key[hardest], threshold=self.threshold, weights=self.weights)
        return mixed if len(mixed) == len(key) else torch.cat([before, mixed, after])

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, weights={self.weights}"


def _check_k(k: object) -> None:
    if isinstance(k, str) and k == "auto":
        return
    if isinstance(k, bool) or not isinstance(k, int) or not 2 <= k <= MOST_NEGATIVES:
        raise ValueError(
            f"k: expected 'auto' or at least 2 negatives, of which two are mixed, and at most {MOST_NEGATIVES}, "
            f"got {check.describe(k)}"
        )


def fewest_candidates(query: Tensor, key: Tensor, groups: Groups | None, first: int = 0) -> int:
    """The smallest number of negatives that a row has among the keys, of which key ``first`` is row 0's positive."""
    if groups is None:
        return len(key) - 1
    own_is_counted = groups.key[first : first + len(query)] == groups.query
    return len(key) - int((_in_group(groups.query, groups.key) + (~own_is_counted).long()).max())


def fewest_outside(query_group: Tensor, bank_group: Tensor) -> int:  # (N,), (B,)
    """The smallest number of bank rows that are outside a row's group."""
    return len(bank_group) - int(_in_group(query_group, bank_group).max())


def _in_group(query_group: Tensor, key_group: Tensor) -> Tensor:  # (N,), (M,) -> (N,) int64
    """How many keys are of each query's group."""
    values, counts = torch.unique(key_group, return_counts=True)
    at = torch.searchsorted(values, query_group).clamp_max(len(values) - 1)
    return torch.where(values[at] == query_group, counts[at], 0)
