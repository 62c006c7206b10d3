r"""GISTEmbed's loss (arXiv 2402.16829) in chunks of rows: a guide model says which candidates are no negatives.

.. math:: \mathrm{loss}_i = -\log \frac{e^{\cos(a_i, p_i)/\tau}}{\sum_{c} e^{\cos(\cdot, c)/\tau}}, \qquad
          \text{over candidates with } g(\cdot, c) \le g(a_i, p_i) - \text{margin}

The candidates are all positives against a_i, all anchors against a_i, all positives against p_i and all hard negatives
against a_i; g is the guide's cosine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hicl_fast import _checks as check
from hicl_fast.integrations.sentence_transformers.chunks import mean_over_chunks
from hicl_fast.integrations.similarity import unit

CHUNK_BYTES = 64 << 20  # of one chunk's scores
_NEAR = 64  # roundings, within which a product may decide otherwise than the guide's own similarity


class Embeddings(NamedTuple):
    """Of one model. Positives and negatives are those of all processes, W rows; row i's positive is ``first + i``."""

    anchor: Tensor  # (B, D)
    positive: Tensor  # (W, D)
    negatives: tuple[Tensor, ...]  # (W, D) each, columns of hard negatives
    first: int


@dataclass(frozen=True)
class GistOptions:
    """The options of sentence-transformers' loss."""

    temperature: float | Tensor  # a tensor of one number is learned, or may be
    margin: float
    is_relative: bool  # margin · |g(a_i, p_i)| instead of margin
    contrast_anchors: bool
    contrast_positives: bool
    cross_entropy: Callable[[Tensor, Tensor], Tensor]

    def words(self) -> str:
        """The options without what is learned."""
        temperature = "learned" if isinstance(self.temperature, Tensor) else self.temperature
        margin = f"margin={check.describe(self.margin)}, is_relative={self.is_relative}"
        contrast = f"contrast_anchors={self.contrast_anchors}, contrast_positives={self.contrast_positives}"
        return f"temperature={temperature}, {margin}, {contrast}"


class _Pairing(NamedTuple):
    """A block of columns: the rows' own side against all candidates. ``first``: where row i's own side stands."""

    row: Tensor  # (·, D)
    first: int
    column: Tensor  # (C, D)


def gist_loss(student: Embeddings, guide: Embeddings, options: GistOptions) -> Tensor:
    """Mean over the anchors (B,); a scalar in the type of the student's products."""
    guided = _pairings(guide, options)
    threshold = _threshold(guide, options)  # (B, 1)
    unit_guided = [_Pairing(unit(pair.row), pair.first, unit(pair.column)) for pair in guided]

    learned = [options.temperature] if isinstance(options.temperature, Tensor) else []

    def loss_of_rows(rows: slice, anchor: Tensor, positive: Tensor, *others: Tensor) -> Tensor:
        temperature = others[-1] if learned else options.temperature
        embeddings = Embeddings(anchor, positive, others[: len(student.negatives)], student.first)
        logits = []
        for block, pair in enumerate(_pairings(embeddings, options)):
            suppressed = _above(threshold[rows], guided[block], unit_guided[block], rows)
            if block == 0:
                suppressed.diagonal(student.first + rows.start).fill_(False)
            similarity = pair.row[_shifted(rows, pair.first)] @ pair.column.T
            # Masked last: what is suppressed must not reach the gradient of a learned temperature as 0 · ∞.
            logits.append((similarity / temperature).masked_fill(suppressed, -torch.inf))
        first = student.first + rows.start
        target = torch.arange(first, first + rows.stop - rows.start, device=anchor.device)
        return options.cross_entropy(torch.cat(logits, dim=1), target)

    embedded = (unit(x) for x in (student.anchor, student.positive, *student.negatives))
    return mean_over_chunks(loss_of_rows, student.anchor.shape[0], _chunk_rows(guided), *embedded, *learned)


def _chunk_rows(guided: list[_Pairing]) -> int:
    columns = sum(pair.column.shape[0] for pair in guided)
    # In a half-precision type most of a row may be near the threshold, and is then computed again pair by pair.
    is_half = guided[0].row.dtype in (torch.bfloat16, torch.float16)
    return max(1, CHUNK_BYTES // (4 * columns * (guided[0].row.shape[1] if is_half else 1)))


def _pairings(embeddings: Embeddings, options: GistOptions) -> list[_Pairing]:
    """The blocks of columns in the original's order."""
    anchor, positive, negatives, first = embeddings
    pairs = [_Pairing(anchor, 0, positive)]
    if options.contrast_anchors:
        pairs.append(_Pairing(anchor, 0, anchor))
    if options.contrast_positives:
        pairs.append(_Pairing(positive, first, positive))
    return pairs + [_Pairing(anchor, 0, negative) for negative in negatives]


def _threshold(guide: Embeddings, options: GistOptions) -> Tensor:  # (B, 1)
    """What a candidate may be similar at most."""
    own = guide.positive[guide.first : guide.first + guide.anchor.shape[0]]
    similarity = F.cosine_similarity(guide.anchor, own, dim=-1)[:, None]
    return similarity - (similarity.abs() * options.margin if options.is_relative else options.margin)


def _above(threshold: Tensor, exact: _Pairing, unit: _Pairing, rows: slice) -> Tensor:  # (R, C) bool
    """Where the guide's similarity exceeds the threshold, as its own cosine similarity and not its product says.

    Texts that occur twice make ties; a product may round them apart. Only what is near is computed again.
    """
    similarity = unit.row[_shifted(rows, unit.first)] @ unit.column.T
    above = similarity > threshold
    near = (similarity - threshold).abs() <= _NEAR * torch.finfo(similarity.dtype).eps
    row, column = near.nonzero(as_tuple=True)
    again = F.cosine_similarity(exact.row[_shifted(rows, exact.first)][row], exact.column[column], dim=-1)
    above[row, column] = again > threshold[row, 0]
    return above


def _shifted(rows: slice, first: int) -> slice:
    return slice(first + rows.start, first + rows.stop)
