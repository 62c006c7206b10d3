"""Two views of a model's sentences, and how they lie on the sphere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hicl_fast.ops.paradigm import torch as engine
from hicl_fast.reference import normalise
from hicl_fast.text_files import check_file, read_rows

LONGEST = 64  # tokens of a sentence


def load_views(paths: Sequence[str | Path]) -> tuple[Tensor, Tensor]:
    """Two .npy files of shape (N, D).

    Raises:
        ValueError: what they hold is something else.
    """
    arrays = [_load(path) for path in paths]
    for path, array in zip(paths, arrays, strict=True):
        if array.ndim != 2 or array.shape != arrays[0].shape:
            raise ValueError(f"embeddings: expected two arrays of one shape (N, D), got {array.shape} in {path}")
    u, v = (torch.from_numpy(array).float() for array in arrays)
    return u, v


def _load(path: str | Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"embeddings: expected a .npy file of numbers, got {path}: {error}") from None
    if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"embeddings: expected a .npy file of floating-point numbers, got another in {path}")
    if not np.isfinite(array).all():
        raise ValueError(f"embeddings: expected finite numbers, got NaN or infinity in {path}")
    return array


def views_of_model(name_or_path: str, text_file: str | Path, count: int, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Each of the first ``count`` sentences under two dropout masks: SimCSE's positives. (count, D) twice.

    Raises:
        FileNotFoundError, ValueError: the text or the model is not as expected.
    """
    from hicl_fast.trainer.model import load_encoder, load_tokenizer, max_tokens
    from hicl_fast.trainer.slicing import slice_documents
    from hicl_fast.trainer.token_pooling import embed

    path = Path(text_file)
    check_file("text", path)
    lines = list(islice((row[0] for _, row in read_rows(path, max_columns=1) if row), count))
    if len(lines) < 2:
        raise ValueError(f"text: expected at least two lines in {text_file}, got {len(lines)}")
    encoder, pooler_type = load_encoder(name_or_path)
    tokenizer = load_tokenizer(name_or_path)
    longest = min(LONGEST, max_tokens(encoder, tokenizer))
    encoder.train()
    views: tuple[list[Tensor], list[Tensor]] = ([], [])
    with torch.no_grad():
        for begin in tqdm(range(0, len(lines), batch_size), desc="embedding", file=sys.stderr):
            batch = slice_documents(tokenizer, lines[begin : begin + batch_size], longest, 1)
            for view in views:
                view.append(embed(encoder, batch.input_ids, batch.attention_mask, pooler_type).float())
    return torch.cat(views[0]), torch.cat(views[1])


def alignment(u: Tensor, v: Tensor) -> float:
    """Wang & Isola's: the mean of ``‖û_i − v̂_i‖²``; smaller is better."""
    return float((normalise(u) - normalise(v)).square().sum(dim=1).mean())


def uniformity(u: Tensor) -> float:
    """Wang & Isola's: ``log mean_{i≠j} exp(−2 ‖û_i − û_j‖²)``; smaller is better. No N×N matrix."""
    unit, n = normalise(u), len(u)
    # ‖û_i − û_j‖² = 2 − 2s, so the exponent is 4s − 4: a softmax's log-sum-exp at τ = 1/4
    lse = torch.logsumexp(engine.statistics(unit, unit, 0.25, columns=False).lse, dim=0)
    return float(lse) - 4 - float(np.log(n * (n - 1)))


def histograms(u: Tensor, v: Tensor, bins: int = 100) -> tuple[Tensor, Tensor]:
    """How many similarities with negatives and with positives fall into equal bins of [−1, 1]: (bins,) twice."""
    unit_u, unit_v = normalise(u), normalise(v)
    negative = torch.zeros(bins)

    def count(s: Tensor, rows: slice) -> Tensor:
        s = s.clone()
        s.diagonal(rows.start).fill_(torch.nan)  # in no bin
        negative.add_(torch.histc(s[~s.isnan()].clamp(-1, 1), bins, -1, 1))
        return s

    engine.combine_by(unit_u, unit_v, unit_u.new_zeros(len(u), 1), count)
    return negative, torch.histc((unit_u * unit_v).sum(dim=1).clamp(-1, 1), bins, -1, 1)
