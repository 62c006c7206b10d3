"""Subclasses of sentence-transformers' losses, and their methods for the original classes."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers import util
from torch import Tensor, nn

from hicl_fast._checks import FLOATING
from hicl_fast.distributed import Ranks, Shares, ranks_of
from hicl_fast.distributed.gathering import describe_rows
from hicl_fast.integrations.gathering import Joined, join, refuse_unequal
from hicl_fast.integrations.sentence_transformers.gist import Embeddings, GistOptions, gist_loss
from hicl_fast.integrations.sentence_transformers.ranking import Batch, Rules, ranking_loss
from hicl_fast.integrations.similarity import Similarity, in_sum_type, is_one_number, loss_type

try:
    from sentence_transformers.sentence_transformer import losses as original
except ImportError:  # before 6.0
    from sentence_transformers import losses as original  # type: ignore[attr-defined,no-redef]

Method = Callable[..., Tensor]

_SIMILARITIES: dict[Any, Similarity] = {util.cos_sim: "cosine", util.pytorch_cos_sim: "cosine", util.dot_score: "dot"}


# --- many processes --------------------------------------------------------------------------------------------------


def _join(loss: Any, embeddings: list[Tensor], terms: dict[str, object], is_fused: bool) -> Joined:
    """The processes among whose rows the loss's are. They agree on this even where the original computes the loss.

    Raises:
        ValueError: on every process, where one has other columns, or other numbers of rows and the original computes.
    """
    gathers = getattr(loss, "gather_across_devices", False)  # not before 5.1
    ranks = ranks_of() if gathers else Ranks(None, 0, 1)
    if ranks.size == 1:
        return Joined(ranks, {"rows": Shares((len(embeddings[0]),), 0)})
    described = [describe_rows(x) if is_fused else f"{x.dtype} on {x.device.type}" for x in embeddings]
    computed_by = "hicl_fast" if is_fused else "sentence-transformers"
    terms = {"loss": type(loss).__name__, "embeddings": ", ".join(described), "computed by": computed_by, **terms}
    joined = join(ranks, {"rows": len(embeddings[0])}, terms)
    if not is_fused:
        refuse_unequal(joined, "gather_across_devices", computed_by)
    return joined


def _gathering(loss: Any, joined: Joined, parent: Any) -> tuple[Callable[[Tensor], Tensor], int]:
    """What makes all processes' rows of this one's, and where this one's begin among them."""
    if not getattr(loss, "gather_across_devices", False):
        return lambda rows: rows, 0
    if joined.ranks.size == 1:  # the original's gather says that there is nothing to gather
        module = sys.modules[parent.__module__]
        return module.all_gather_with_grad, module.get_rank() * joined.shares["rows"].own
    return functools.partial(joined.rows, "rows"), joined.first("rows")


def _weighted(mean: Tensor, joined: Joined) -> Tensor:
    """This process's share of the joined batch's loss, for the mean over the processes that data parallelism takes."""
    weight = joined.weight("rows")
    return mean if weight == 1.0 else mean * weight


# --- multiple negatives ranking --------------------------------------------------------------------------------------


def _rules(loss: Any) -> Rules | None:
    """The loss's options as they stand now; ``None`` for what has no fused form.

    Releases before 5.3 have neither directions nor hardness.
    """
    scale = loss.scale
    _check_positive("scale", scale)
    with suppress(TypeError):  # a similarity function that can't be hashed is not one of these
        similarity = _SIMILARITIES.get(loss.similarity_fct)
        if similarity is not None and is_one_number(scale):
            return Rules(
                scale if isinstance(scale, Tensor) else float(scale),
                similarity,
                tuple(getattr(loss, "directions", Rules.directions)),
                getattr(loss, "partition_mode", Rules.partition_mode),
                getattr(loss, "hardness_mode", Rules.hardness_mode),
                getattr(loss, "hardness_strength", Rules.hardness_strength),
            )
    return None


def _check_positive(name: str, value: float | Tensor) -> None:
    """As far as it is in host memory: a device isn't waited for."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or value.numel() != 1:
            return
        value = value.item()
    if not value > 0:
        raise ValueError(f"{name}: expected a number above 0, got {value!r}")


def _are_matrices(embeddings: list[Tensor]) -> bool:
    """Dense (B, D) matrices of one shape on one device, not empty: what the fused loss computes on."""
    first = embeddings[0]
    return all(
        type(x) is Tensor
        and x.layout == torch.strided
        and x.dim() == 2
        and x.dtype in FLOATING
        and x.shape == first.shape
        and x.numel() > 0
        and x.device == first.device
        for x in embeddings
    )


def _fused_ranking(loss: Any, embeddings: list[Tensor], parent: type[nn.Module]) -> Tensor | None:
    """The loss of (B, D) columns; ``None`` where the original has to compute it."""
    if len(embeddings) < 2:
        return None
    rules = _rules(loss)
    is_fused = rules is not None and _are_matrices(embeddings)
    joined = _join(loss, embeddings, {"options": None if rules is None else rules.words()}, is_fused)
    if rules is None or not is_fused:
        return None
    gather, first = _gathering(loss, joined, parent)
    queries, *documents = (gather(x) for x in embeddings)
    batch = Batch(queries, documents, first, len(embeddings[0]))
    rules = replace(rules, scale=in_sum_type(rules.scale, *embeddings))
    return _weighted(ranking_loss(batch, rules), joined).to(_type_of_ranking(loss, embeddings))


def _type_of_ranking(loss: Any, embeddings: list[Tensor]) -> torch.dtype:
    similarity = loss.similarity_fct
    if isinstance(loss.scale, Tensor):
        similarity = _scaled(similarity, loss.scale.dtype, loss.scale.dim())
    return loss_type(similarity, _mean_log_sum, *embeddings)


@functools.cache
def _scaled(similarity: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, dim: int) -> Method:
    """A scale that is a tensor can change the type of the logits, by its own and by its number of dimensions."""
    return lambda a, b: similarity(a, b) * torch.ones((1,) * dim, dtype=dtype, device=a.device)


def _mean_log_sum(similarities: Tensor) -> Tensor:
    return torch.logsumexp(similarities, dim=1).mean()


def _fuse_ranking(parent: Any) -> Method:
    """``compute_loss_from_embeddings`` without N×N matrices."""
    fallback: Method = parent.compute_loss_from_embeddings

    @functools.wraps(fallback)
    def compute_loss_from_embeddings(self: Any, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        loss = _fused_ranking(self, embeddings, parent)
        return fallback(self, embeddings, labels) if loss is None else loss

    return compute_loss_from_embeddings


def _fuse_cached_ranking(parent: Any) -> Method:
    """``calculate_loss`` without N×N matrices, and so without chunks: the whole batch's gradients in one sweep."""
    fallback: Method = parent.calculate_loss

    @functools.wraps(fallback)
    def calculate_loss(
        self: Any, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        loss = _fused_ranking(self, [torch.cat(column) for column in reps], parent)
        if loss is None:
            return fallback(self, reps, with_backward=with_backward)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    return calculate_loss


_ranking = _fuse_ranking(original.MultipleNegativesRankingLoss)
_cached_ranking = _fuse_cached_ranking(original.CachedMultipleNegativesRankingLoss)


class FusedMultipleNegativesRankingLoss(original.MultipleNegativesRankingLoss):
    """:class:`sentence_transformers.losses.MultipleNegativesRankingLoss`, whose arguments it takes.

    Example:
        >>> loss = FusedMultipleNegativesRankingLoss(model, scale=20.0)
        >>> SentenceTransformerTrainer(model=model, train_dataset=pairs, loss=loss).train()
    """

    compute_loss_from_embeddings = _ranking


class FusedCachedMultipleNegativesRankingLoss(original.CachedMultipleNegativesRankingLoss):
    """:class:`sentence_transformers.losses.CachedMultipleNegativesRankingLoss`, whose arguments it takes.

    ``mini_batch_size`` bounds what the encoder holds; the loss itself is computed for the whole batch at once.
    """

    calculate_loss = _cached_ranking


if issubclass(original.MultipleNegativesSymmetricRankingLoss, original.MultipleNegativesRankingLoss):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the originals; whoever makes one of these hears of it

        class FusedMultipleNegativesSymmetricRankingLoss(original.MultipleNegativesSymmetricRankingLoss):
            """:class:`sentence_transformers.losses.MultipleNegativesSymmetricRankingLoss`, whose arguments it takes."""

            compute_loss_from_embeddings = _ranking

        class FusedCachedMultipleNegativesSymmetricRankingLoss(original.CachedMultipleNegativesSymmetricRankingLoss):
            """:class:`sentence_transformers.losses.CachedMultipleNegativesSymmetricRankingLoss`, whose arguments it takes."""

            calculate_loss = _cached_ranking


# --- GIST ------------------------------------------------------------------------------------------------------------


def _fuse_gist(parent: Any) -> Method:
    """``forward`` in chunks of rows, with the gradients of a chunk taken while it is there."""
    fallback: Method = parent.forward

    @functools.wraps(fallback)
    def forward(self: Any, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        features = list(sentence_features)
        if not _compares_cosines(self):
            _join(self, [_first_tensor(feature) for feature in features], {}, is_fused=False)
            return fallback(self, features, labels)
        guide_features = [dict(feature) for feature in features]  # the model writes into what it is given
        embeddings = _embed(parent, self.model, features)
        with torch.no_grad():
            if self.must_retokenize:
                guide_features = [_retokenised(self, feature) for feature in features]
            guides = _embed(parent, self.guide, guide_features)
        if len(embeddings) not in (2, 3):
            raise ValueError(f"Expected 2 or 3 embeddings, got {len(embeddings)}")
        return _fused_gist(self, embeddings, guides, parent)

    return forward


def _fuse_cached_gist(parent: Any) -> Method:
    """``calculate_loss`` by products in chunks of rows, where the original broadcasts rows × candidates × dimensions."""
    fallback: Method = parent.calculate_loss

    @functools.wraps(fallback)
    def calculate_loss(
        self: Any, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        student, guide = ([torch.cat(column) for column in columns] for columns in (reps, reps_guided))
        if not _compares_cosines(self) or len(student) != len(guide):
            _join(self, student, {}, is_fused=False)
            return fallback(self, reps, reps_guided, with_backward=with_backward)
        loss = _fused_gist(self, student, guide, parent)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    return calculate_loss


def _compares_cosines(loss: Any) -> bool:
    """As the original's constructor made it; a similarity of other dimensions or another ε is somebody's own."""
    similarity = loss.similarity_fct
    if type(similarity) is not nn.CosineSimilarity or similarity.dim not in (-1, 2) or similarity.eps != 1e-8:
        return False
    return is_one_number(loss.temperature)


def _fused_gist(loss: Any, student: list[Tensor], guide: list[Tensor], parent: Any) -> Tensor:
    """The loss of (B, D) columns: this process's anchors against the candidates of all."""
    options = _gist_options(loss)
    joined = _join(loss, student, {"guide": len(guide), "options": options.words()}, is_fused=True)
    gather, first = _gathering(loss, joined, parent)

    def side(anchor: Tensor, *candidates: Tensor) -> Embeddings:
        positive, *negatives = (gather(x) for x in candidates)
        return Embeddings(anchor, positive, tuple(negatives), first)

    return _weighted(gist_loss(side(*student), side(*guide), options), joined)


def _gist_options(loss: Any) -> GistOptions:
    return GistOptions(
        loss.temperature,
        loss.margin,
        loss.margin_strategy == "relative",
        getattr(loss, "contrast_anchors", True),  # always, before 5.1
        getattr(loss, "contrast_positives", True),
        getattr(loss, "cross_entropy_loss", F.cross_entropy),
    )


def _first_tensor(feature: dict[str, Tensor]) -> Tensor:
    """Something that has a row for each text, or is as long as there are texts."""
    if "cu_seq_lens_q" in feature:  # all texts in one row
        return feature["cu_seq_lens_q"][1:]
    return next(value for value in feature.values() if isinstance(value, Tensor) and value.dim() > 1)


def _embed(parent: Any, model: Any, features: list[dict[str, Tensor]]) -> list[Tensor]:
    """Columns as the original embeds them: releases from 6.0 put columns of like width into one forward pass."""
    embed_columns = getattr(sys.modules[parent.__module__], "embed_columns", None)
    if embed_columns is not None:
        return embed_columns(model, features)
    return [model(feature)["sentence_embedding"] for feature in features]


def _retokenised(loss: Any, feature: dict[str, Tensor]) -> dict[str, Tensor]:
    """The guide's tokens for the model's: decoded, and tokenised again."""
    ids: Any = feature["input_ids"]
    if "cu_seq_lens_q" in feature:  # all rows in one, for attention without padding
        bounds = feature["cu_seq_lens_q"].tolist()
        ids = [ids[0][begin:end] for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]
    texts = loss.tokenizer.batch_decode(ids, skip_special_tokens=True)
    tokenise = getattr(loss.guide, "preprocess", None) or loss.guide.tokenize
    return util.batch_to_device(tokenise(texts), loss.guide.device)


_gist = _fuse_gist(original.GISTEmbedLoss)
_cached_gist = _fuse_cached_gist(original.CachedGISTEmbedLoss)


class FusedGISTEmbedLoss(original.GISTEmbedLoss):
    """:class:`sentence_transformers.losses.GISTEmbedLoss`, whose arguments it takes.

    Which negatives the guide suppresses is decided on the same numbers as the original's, ties included.
    """

    forward = _gist


class FusedCachedGISTEmbedLoss(original.CachedGISTEmbedLoss):
    """:class:`sentence_transformers.losses.CachedGISTEmbedLoss`, whose arguments it takes.

    ``mini_batch_size`` bounds what the encoders hold; the loss itself is computed in chunks of its own.
    """

    calculate_loss = _cached_gist


# --- code that can't be edited ---------------------------------------------------------------------------------------

_METHODS: tuple[tuple[type[nn.Module], Method], ...] = (
    (original.MultipleNegativesRankingLoss, _ranking),
    (original.CachedMultipleNegativesRankingLoss, _cached_ranking),
    (original.GISTEmbedLoss, _gist),
    (original.CachedGISTEmbedLoss, _cached_gist),
)


def patch() -> None:
    """Give sentence-transformers' own classes the fused losses, also where they were imported or made before.

    Calling it twice is calling it once; :func:`unpatch` takes it back.
    """
    for owner, method in _METHODS:
        setattr(owner, method.__name__, method)


def unpatch() -> None:
    """Give sentence-transformers' classes their own losses back."""
    for owner, method in _METHODS:
        setattr(owner, method.__name__, method.__wrapped__)  # type: ignore[attr-defined]
