"""``python -m hicl_fast.mine``: the hard negatives of every query, out of a corpus of any size.

Query and corpus are files of sentences, one a line (or a column of a table, as :mod:`hicl_fast.text_files` reads them),
which ``--model_name_or_path`` embeds, or .npy files of embeddings, which are read from the disk as they are needed.

What is mined is never the query's own text or that of one of its positives, wherever in the corpus it stands again, and
no text twice. A query that comes several times, with a positive each, has all of them. Texts are the same where they
differ in white space, case or Unicode's forms alone; rows of a .npy where all their numbers are equal.

Writes JSON Lines. Of sentences: {"anchor", "positive", "negative_1", ...}, which the trainer and sentence-transformers
train on as they stand; without ``--positives`` a query is its own positive, as SimCSE has it, and with them a query of
which none is known is left out. Of .npy: {"query", "positive", "negatives", "similarities"} with line numbers counted
from 0, and null for no positive. A query left with fewer than k negatives is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import unicodedata
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from hicl_fast import _checks as check
from hicl_fast._command import (
    Parser,
    backend,
    check_backend,
    check_output_file,
    command,
    device,
    usage,
    whole,
)
from hicl_fast.text_files import read_lines, read_rows

if TYPE_CHECKING:
    from torch import Tensor

    from hicl_fast.trainer.encoder import SentenceEncoder

QUERIES_AT_A_TIME = 1024
ROWS_AT_A_TIME = 4096  # of a file of embeddings, to tell which are the same
MOST = 128  # negatives that one search finds for a query
NO_POSITIVE = -1
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff"))


@dataclass(frozen=True)
class Side:
    """Queries or corpus: embeddings, and the sentences where there are any."""

    embeddings: Tensor  # (n, D)
    sentences: list[str] | None


@dataclass(frozen=True)
class Mined:
    """One query's negatives, the most similar first."""

    query: int
    positive: int  # NO_POSITIVE where there is none
    negatives: list[int]
    similarities: list[float]


def mine(
    query: Tensor,  # (N, D)
    corpus: Tensor,  # (M, D)
    k: int,
    *,
    positive: Tensor | None = None,  # (N,) int64, NO_POSITIVE where a query has none
    query_text: Tensor | None = None,  # (N,) int64
    corpus_text: Tensor | None = None,  # (M,) int64
    skip: int = 0,
    max_similarity: float | None = None,
    false_negative_margin: float | None = None,
    false_negative_ratio: float | None = None,
    device: str | None = None,
    backend: str = "auto",
) -> Iterator[Mined]:
    """The k negatives of each query after the first ``skip``, none above its limits.

    Neither the query's own text nor that of any positive of the same query is a candidate, wherever it stands in the
    corpus, and of equal texts in the corpus the first alone is. A query may have fewer than k: there are no more, or with
    a limit none among its 128 most similar rows, which are all that is looked at.

    Args:
        max_similarity: the limit of all queries.
        false_negative_margin: m: a limit of the query's similarity with its positive plus m, where it has one.
        false_negative_ratio: ρ: a limit of ρ times that similarity, where it has one and that is above 0.
        query_text, corpus_text: numbers that are equal where texts are; default: where all of a row's numbers are.
    """
    import torch

    if query_text is None or corpus_text is None:
        query_text, corpus_text = text_numbers(row_keys(query), row_keys(corpus))
    if positive is None:
        positive = torch.full((len(query),), NO_POSITIVE)
    avoided = _avoided(query_text, corpus_text, positive)
    own, text, its_positive = query_text.tolist(), corpus_text.tolist(), positive.tolist()
    is_copy = _is_copy(corpus_text)
    num_texts = len(text) - int(is_copy.sum())
    limits = (max_similarity, false_negative_margin, false_negative_ratio)
    is_limited = any(limit is not None for limit in limits)
    wanted = MOST if is_limited else skip + k
    corpus = corpus if device is None else corpus.to(device)
    for first in range(0, len(query), QUERIES_AT_A_TIME):
        block = query[first : first + QUERIES_AT_A_TIME].to(corpus.device)
        most_avoided = max(len(avoided[number]) for number in own[first : first + len(block)])
        num_found = min(wanted + most_avoided, MOST, num_texts)
        similarity, index = _nearest(block, corpus, num_found, is_copy, backend)
        _check_finite(block, similarity, first)
        limit = _limits(block, corpus, positive[first : first + len(block)], *limits)
        rows = zip(index.tolist(), similarity.tolist(), limit, strict=True)
        for at, (columns, values, most_similar) in enumerate(rows, start=first):
            avoid = avoided[own[at]]
            candidates = [pair for pair in zip(columns, values, strict=True) if text[pair[0]] not in avoid]
            if len(candidates) < wanted and num_found == MOST and not is_limited:
                left_out = is_copy | torch.isin(corpus_text, torch.tensor(sorted(avoid)))
                candidates = _alone(block[at - first], corpus, wanted, left_out, backend)
            kept = [pair for pair in candidates[skip:] if not pair[1] > most_similar][:k]
            yield Mined(at, its_positive[at], [column for column, _ in kept], [value for _, value in kept])


def _limits(
    query: Tensor,  # (N, D)
    corpus: Tensor,  # (M, D)
    positive: Tensor,  # (N,) int64, NO_POSITIVE where a query has none
    max_similarity: float | None,
    margin: float | None,
    ratio: float | None,
) -> list[float]:
    """What each query's negatives may be similar at most."""
    import torch

    from hicl_fast.ops.common.unit_rows import UnitRows, row_dot

    limit = torch.full((len(query),), math.inf if max_similarity is None else max_similarity, dtype=torch.float64)
    if margin is None and ratio is None:
        return limit.tolist()
    positive = positive.to(corpus.device)
    with_positive = torch.where(positive == NO_POSITIVE, 0, positive)
    unit_query, unit = (UnitRows.of(x, torch.float32).rows for x in (query, corpus[with_positive]))
    similarity = row_dot(unit_query, unit).double().cpu()
    from_positive = torch.full_like(limit, math.inf)
    if margin is not None:
        from_positive = similarity + margin
    if ratio is not None:
        from_positive = torch.where(similarity > 0, torch.minimum(from_positive, similarity * ratio), from_positive)
    from_positive[positive.cpu() == NO_POSITIVE] = math.inf
    return torch.minimum(limit, from_positive).tolist()


def _nearest(
    query: Tensor,  # (N, D)
    corpus: Tensor,  # (M, D)
    k: int,
    left_out: Tensor,  # (M,) bool
    backend: str,
) -> tuple[Tensor, Tensor]:  # (N, k), (N, k) int64
    """The most similar rows of the corpus, but for those left out."""
    import torch

    import hicl_fast.functional as HF

    if not left_out.any():
        return HF.hard_negatives(query, corpus, k, exclude_target=False, backend=backend)
    group = (~left_out).to(torch.int64).to(corpus.device)  # 0 is the queries' own, whose keys are no candidates
    return HF.hard_negatives(
        query,
        corpus,
        k,
        query_group=group.new_zeros(len(query)),
        key_group=group,
        exclude_target=False,
        backend=backend,
    )


def _alone(
    query: Tensor, corpus: Tensor, k: int, left_out: Tensor, backend: str
) -> list[tuple[int, float]]:  # (D,), (M, D), (M,) bool
    """The nearest rows of a query that has more to avoid than one search finds."""
    k = min(k, int((~left_out).sum()))
    if k == 0:
        return []
    similarity, index = _nearest(query[None], corpus, k, left_out, backend)
    return list(zip(index[0].tolist(), similarity[0].tolist(), strict=True))


def _avoided(query_text: Tensor, corpus_text: Tensor, positive: Tensor) -> dict[int, set[int]]:
    """For each query's text: itself and the texts of all the positives that it has anywhere. (N,), (M,), (N,)"""
    text = corpus_text.tolist()
    avoided: dict[int, set[int]] = {}
    for number, its_positive in zip(query_text.tolist(), positive.tolist(), strict=True):
        texts = avoided.setdefault(number, {number})
        if its_positive != NO_POSITIVE:
            texts.add(text[its_positive])
    return avoided


def _is_copy(text: Tensor) -> Tensor:  # (M,) int64 -> (M,) bool
    """Whether an earlier row has the same text."""
    import numpy
    import torch

    is_copy = torch.ones(len(text), dtype=torch.bool)
    is_copy[torch.from_numpy(numpy.unique(text.numpy(), return_index=True)[1])] = False
    return is_copy


def text_numbers(*columns: Iterable[Hashable]) -> list[Tensor]:
    """For each column (n,) int64: numbers that are equal where two keys of any columns are."""
    import torch

    numbers: dict[Hashable, int] = {}
    return [torch.tensor([numbers.setdefault(key, len(numbers)) for key in column]) for column in columns]


def sentence_key(sentence: str) -> str:
    """What a sentence has in common with those that differ in white space, case or Unicode's forms alone."""
    folded = unicodedata.normalize("NFKC", sentence.translate(_INVISIBLE)).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def row_keys(rows: Tensor) -> Iterator[bytes]:  # (n, D)
    """What a row has in common with those of the same numbers, in whatever type."""
    from hashlib import blake2b

    for first in range(0, len(rows), ROWS_AT_A_TIME):
        numbers = rows[first : first + ROWS_AT_A_TIME].cpu().double() + 0.0  # -0 is 0
        yield from (blake2b(row.tobytes(), digest_size=16).digest() for row in numbers.numpy())


def _check_finite(query: Tensor, similarity: Tensor, first: int) -> None:
    """NaN comes before all numbers; it would be mined."""
    wrong = similarity[:, 0].isnan().nonzero()
    if len(wrong):
        row = int(wrong[0])
        name = "corpus" if query[row].isfinite().all() else f"query: row {first + row}"
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")


@command("evaluation")
def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    with usage():
        _check_numbers(args)
        _check_files(args)
    counts = _run(args)
    said = [f"{args.output}: {counts.written} queries with {args.k} negatives each"]
    said += [f"{counts.fewer} had fewer and were left out"] * bool(counts.fewer)
    said += [f"{counts.without} without a positive were left out"] * bool(counts.without)
    print("; ".join(said), file=sys.stderr)


@dataclass
class Counts:
    """What became of the queries."""

    written: int = 0
    fewer: int = 0  # than k negatives
    without: int = 0  # a positive, where a row of sentences needs one


def _run(args: argparse.Namespace) -> Counts:
    from tqdm import tqdm

    # All that is to be read is read before anything is embedded, which may take hours.
    read = _read_array if _is_array(args.query) else _read_sentences
    query_rows, corpus_rows = read("query", args.query), read("corpus", args.corpus)
    positive = _positives(args.positives, len(query_rows), len(corpus_rows))
    num_candidates = len(corpus_rows) - (positive is not None)
    if args.skip + args.k > num_candidates:
        raise ValueError(f"corpus: expected at least skip + k = {args.skip + args.k} candidates, got {num_candidates}")
    encoder = None if _is_array(args.query) else _encoder(args)
    query, corpus = _side(query_rows, encoder), _side(corpus_rows, encoder)
    if query.embeddings.shape[1] != corpus.embeddings.shape[1]:
        raise ValueError(
            f"corpus: expected rows of length {query.embeddings.shape[1]}, as query has, "
            f"got {corpus.embeddings.shape[1]}"
        )
    query_text, corpus_text = _text_numbers(query, corpus)
    mined = mine(
        query.embeddings,
        corpus.embeddings,
        args.k,
        positive=positive,
        query_text=query_text,
        corpus_text=corpus_text,
        skip=args.skip,
        max_similarity=args.max_similarity,
        false_negative_margin=args.false_negative_margin,
        false_negative_ratio=args.false_negative_ratio,
        device=args.device,
        backend=args.backend,
    )
    counts = Counts()
    with _written_at_once(args.output) as file:
        for found in tqdm(mined, total=len(query.embeddings), unit=" queries", file=sys.stderr):
            if query.sentences is not None and positive is not None and found.positive == NO_POSITIVE:
                counts.without += 1
            elif len(found.negatives) < args.k:
                counts.fewer += 1
            else:
                file.write(json.dumps(_record(found, query, corpus), ensure_ascii=False) + "\n")
                counts.written += 1
    return counts


def _text_numbers(query: Side, corpus: Side) -> list[Tensor]:  # (N,), (M,) int64
    if query.sentences is None or corpus.sentences is None:
        return text_numbers(row_keys(query.embeddings), row_keys(corpus.embeddings))
    return text_numbers(map(sentence_key, query.sentences), map(sentence_key, corpus.sentences))


def _record(found: Mined, query: Side, corpus: Side) -> dict[str, Any]:
    has_positive = found.positive != NO_POSITIVE
    if query.sentences is None or corpus.sentences is None:
        return {
            "query": found.query,
            "positive": found.positive if has_positive else None,
            "negatives": found.negatives,
            "similarities": found.similarities,
        }
    anchor = query.sentences[found.query]
    # The columns' order is what trainers go by: whatever comes second is trained on as the positive.
    record = {"anchor": anchor, "positive": corpus.sentences[found.positive] if has_positive else anchor}
    for number, column in enumerate(found.negatives, start=1):
        record[f"negative_{number}"] = corpus.sentences[column]
    return record


def _is_array(path: Path) -> bool:
    return path.suffix.lower() == ".npy"


def _side(rows: Tensor | list[str], encoder: SentenceEncoder | None) -> Side:
    if isinstance(rows, list):
        assert encoder is not None
        return Side(encoder.encode(rows), rows)
    return Side(rows, None)


def _read_array(name: str, path: Path) -> Tensor:  # (n, D)
    """On the disk until it is used."""
    import warnings

    import numpy
    import torch

    try:
        array = numpy.load(path, allow_pickle=False, mmap_mode="r")
    except ValueError as error:
        raise ValueError(f"{name}: expected a .npy file of numbers, got {path}: {error}") from None
    if array.ndim != 2 or 0 in array.shape or array.dtype.name not in ("float64", "float32", "float16"):
        raise ValueError(
            f"{name}: expected a float64, float32 or float16 array of shape (rows, dimensions), "
            f"got {array.dtype} of shape {array.shape} in {path}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the tensor can't be written to
        return torch.from_numpy(array)


def _read_sentences(name: str, path: Path) -> list[str]:
    sentences = []
    for number, row in read_rows(path, max_columns=1):
        if not row:
            raise ValueError(f"{name}: expected a sentence in each row, got an empty one, {path}, line {number}")
        sentences.append(row[0])
    if not sentences:
        raise ValueError(f"{name}: expected sentences, got an empty file, {path}")
    return sentences


def _positives(path: Path | None, num_queries: int, num_corpus: int) -> Tensor | None:  # (N,) int64
    if path is None:
        return None
    import torch

    lines = [line.strip() for _, line in read_lines(path)]
    if len(lines) != num_queries:
        raise ValueError(f"positives: expected {num_queries} lines, one for each query, got {len(lines)} in {path}")
    for number, line in enumerate(lines, start=1):
        if line != "-" and not (line.isascii() and line.isdigit() and len(line) < 20 and int(line) < num_corpus):
            raise ValueError(
                f'positives: expected a line number of the corpus, 0 to {num_corpus - 1}, or "-", got {check.shown(line)}, '
                f"{path}, line {number}"
            )
    return torch.tensor([NO_POSITIVE if line == "-" else int(line) for line in lines])


def _encoder(args: argparse.Namespace) -> SentenceEncoder:
    from hicl_fast.trainer.encoder import SentenceEncoder

    return SentenceEncoder.from_pretrained(
        args.model_name_or_path,
        pooler_type=args.pooler_type,
        max_seq_length=args.max_seq_length,
        batch_size=args.batch_size,
        device=args.device,
    )


def _check_numbers(args: argparse.Namespace) -> None:
    if not 1 <= args.k <= MOST:
        raise ValueError(f"k: expected 1 to {MOST}, got {args.k}")
    if not 0 <= args.skip <= MOST - args.k:
        raise ValueError(f"skip: expected 0 to {MOST - args.k}, so that skip + k is at most {MOST}, got {args.skip}")
    if args.max_similarity is not None and not -1 <= args.max_similarity <= 1:
        raise ValueError(f"max_similarity: expected a cosine, -1 to 1, got {args.max_similarity}")
    from hicl_fast.ops.info_nce.arguments import check_limits

    for name in ("false_negative_margin", "false_negative_ratio"):
        value = getattr(args, name)
        if value is not None and args.positives is None:
            raise ValueError(f"{name}: expected --positives, whose similarities it is measured by, got none")
    check_limits(args.false_negative_margin, args.false_negative_ratio)
    if args.pooler_type is not None:
        from hicl_fast.trainer.token_pooling import POOLERS

        check.one_of("pooler_type", args.pooler_type, POOLERS)
    check_backend(args.backend, "hard_negatives", args.device or "cpu")


def _check_files(args: argparse.Namespace) -> None:
    for name in ("query", "corpus", "positives"):
        path = getattr(args, name)
        if path is not None and not path.is_file():
            raise ValueError(
                f"{name}: expected a file, but {path} {'is a folder' if path.is_dir() else 'is not there'}"
            )
    if _is_array(args.query) != _is_array(args.corpus):
        raise ValueError(f"corpus: expected a file of query's kind, text or .npy, got {args.query} and {args.corpus}")
    if not _is_array(args.query) and args.model_name_or_path is None:
        raise ValueError(f"model_name_or_path: expected an encoder for the sentences of {args.query}, got none")
    check_output_file("output", args.output)
    if args.output.suffix == ".gz":
        raise ValueError(f"output: expected a name that is not a compressed file's, got {args.output}")
    for name in ("query", "corpus", "positives"):
        path = getattr(args, name)
        if path is not None and args.output.exists() and args.output.samefile(path):
            raise ValueError(f"output: expected another file than --{name}, which it would replace, got {args.output}")


@contextmanager
def _written_at_once(path: Path) -> Iterator[TextIO]:
    """A file that takes its name when it is complete, and otherwise leaves nothing behind.

    A pipe or a device (/dev/stdout, /dev/null) is written to as it stands, and what a link leads to takes the place of
    what it led to.
    """
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8") as file:
            yield file
        return
    path = path.resolve()
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m hicl_fast.mine", description=__doc__)
    add = parser.add_argument
    add("--query", required=True, type=Path, help="sentences, one a line or in a table, or a .npy file of embeddings")
    add("--corpus", required=True, type=Path, help="where the negatives come from; of the same kind")
    add("--output", required=True, type=Path, help="the JSON Lines file to write")
    add("--positives", type=Path, help='for each query the line of its positive in the corpus, from 0, or "-"')
    add("--k", type=int, default=5, help="negatives a query (default 5)")
    add("--skip", type=int, default=0, help="leave out this many of the most similar first, which may be positives")
    add(
        "--max_similarity",
        type=float,
        help="leave out what is more similar than this; a query's best 128 are looked at",
    )
    add(
        "--false_negative_margin",
        type=float,
        help="leave out what is more similar than the query's positive plus this (Qwen3-Embedding: 0.1); of the same 128, "
        "and not of a query without a positive",
    )
    add(
        "--false_negative_ratio",
        type=float,
        help="leave out what is more similar than this times the query's positive (NV-Retriever: 0.95); likewise",
    )
    add("--model_name_or_path", help="for text: a folder of sentence-transformers or of the trainer, or any encoder")
    add("--pooler_type", help="default: what the folder's modules.json or config says, otherwise avg")
    add("--max_seq_length", type=whole(1), help="tokens kept of a sentence; default: all the model takes")
    add("--batch_size", type=whole(1), default=64, help="sentences embedded at a time")
    add(
        "--device",
        type=device,
        help="where to embed and search; default: embed on a GPU where there is one, search on the CPU",
    )
    add("--backend", type=backend, default="auto", help="of the search: auto, torch, cpp, triton or cuda")
    return parser


if __name__ == "__main__":
    main()
