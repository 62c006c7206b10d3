"""Subclasses of sentence-transformers' losses, and their methods for the original classes."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers import util
from torch import Tensor, nn

from hicl_fast._checks import FLOATING
from hicl_fast.integrations.sentence_transformers.gist import Embeddings, GistOptions, gist_loss
from hicl_fast.integrations.sentence_transformers.ranking import Batch, Rules, ranking_loss
from hicl_fast.integrations.similarity import Similarity, loss_type

try:
    from sentence_transformers.sentence_transformer import losses as original
except ImportError:  # before 6.0
    from sentence_transformers import losses as original  # type: ignore[attr-defined,no-redef]

Method = Callable[..., Tensor]

_SIMILARITIES: dict[Any, Similarity] = {util.cos_sim: "cosine", util.pytorch_cos_sim: "cosine", util.dot_score: "dot"}


# --- multiple negatives ranking --------------------------------------------------------------------------------------


def _rules(loss: Any) -> Rules | None:
    """The loss's options as they stand now; ``None`` for a similarity that has no fused form.

    Releases before 5.3 have neither directions nor hardness.
    """
    with suppress(TypeError):  # a similarity function that can't be hashed is not one of these
        similarity = _SIMILARITIES.get(loss.similarity_fct)
        if similarity is not None:
            return Rules(
                float(loss.scale),
                similarity,
                tuple(getattr(loss, "directions", Rules.directions)),
                getattr(loss, "partition_mode", Rules.partition_mode),
                getattr(loss, "hardness_mode", Rules.hardness_mode),
                getattr(loss, "hardness_strength", Rules.hardness_strength),
            )
    return None


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
    rules = _rules(loss)
    if rules is None or rules.refusal() or len(embeddings) < 2 or not _are_matrices(embeddings):
        return None
    count, first, dtype = embeddings[0].shape[0], 0, loss_type(loss.similarity_fct, _mean_log_sum, *embeddings)
    if getattr(loss, "gather_across_devices", False):  # not before 5.1
        module = sys.modules[parent.__module__]
        embeddings = [module.all_gather_with_grad(x) for x in embeddings]
        first = module.get_rank() * count
    return ranking_loss(Batch(embeddings[0], embeddings[1:], first, count), rules).to(dtype)


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
        if not _compares_cosines(self):
            return fallback(self, sentence_features, labels)
        features = list(sentence_features)
        guide_features = [dict(feature) for feature in features]  # the model writes into what it is given
        embeddings = _embed(parent, self.model, features)
        with torch.no_grad():
            if self.must_retokenize:
                guide_features = [_retokenised(self, feature) for feature in features]
            guides = _embed(parent, self.guide, guide_features)
        if len(embeddings) not in (2, 3):
            raise ValueError(f"Expected 2 or 3 embeddings, got {len(embeddings)}")
        gather = functools.partial(_candidates_of_all, self, sys.modules[parent.__module__])
        return gist_loss(gather(embeddings), gather(guides), _gist_options(self))

    return forward


def _fuse_cached_gist(parent: Any) -> Method:
    """``calculate_loss`` by products in chunks of rows, where the original broadcasts rows × candidates × dimensions."""
    fallback: Method = parent.calculate_loss

    @functools.wraps(fallback)
    def calculate_loss(
        self: Any, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        if not _compares_cosines(self) or len(reps) != len(reps_guided):
            return fallback(self, reps, reps_guided, with_backward=with_backward)
        gather = functools.partial(_candidates_of_all, self, sys.modules[parent.__module__])
        student, guide = (gather([torch.cat(column) for column in columns]) for columns in (reps, reps_guided))
        loss = gist_loss(student, guide, _gist_options(self))
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    return calculate_loss


def _compares_cosines(loss: Any) -> bool:
    similarity = loss.similarity_fct
    return type(similarity) is nn.CosineSimilarity and similarity.dim in (-1, 2)


def _gist_options(loss: Any) -> GistOptions:
    return GistOptions(
        loss.temperature,
        loss.margin,
        loss.margin_strategy == "relative",
        getattr(loss, "contrast_anchors", True),  # always, before 5.1
        getattr(loss, "contrast_positives", True),
        getattr(loss, "cross_entropy_loss", F.cross_entropy),
    )


def _candidates_of_all(loss: Any, module: Any, embeddings: list[Tensor]) -> Embeddings:
    """Candidates of all processes; the anchors are this one's. ``module``: where the original is and finds its gather."""
    anchor, *candidates = embeddings
    first = 0
    if getattr(loss, "gather_across_devices", False):
        candidates = [module.all_gather_with_grad(x) for x in candidates]
        first = module.get_rank() * len(anchor)
    return Embeddings(anchor, candidates[0], tuple(candidates[1:]), first)


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
