"""``python -m hicl_fast.mine``: the hard negatives of every query, out of a corpus of any size.

Query and corpus are text files with one sentence a line, which ``--model_name_or_path`` embeds, or .npy files of
embeddings, which are read from the disk as they are needed. Writes JSON Lines: for text the columns that
sentence-transformers trains on, {"anchor", "positive", "negative_1", ...}; for .npy
{"query", "positive", "negatives", "similarities"} with line numbers counted from 0. A query left with fewer than k
negatives is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
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

if TYPE_CHECKING:
    from torch import Tensor

    from hicl_fast.trainer.encoder import SentenceEncoder

QUERIES_AT_A_TIME = 1024
MOST = 128  # negatives that one search finds for a query
NO_POSITIVE = -1


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
    skip: int = 0,
    max_similarity: float | None = None,
    device: str | None = None,
    backend: str = "auto",
) -> Iterator[Mined]:
    """The k negatives of each query after the first ``skip``, none above ``max_similarity``, nor its positive.

    A query may have fewer than k: with ``max_similarity`` its 128 most similar rows are looked at, and no more.
    """
    import torch

    import hicl_fast.functional as HF

    num_candidates = corpus.shape[0] - (positive is not None)
    wanted = min(MOST if max_similarity is not None else skip + k, num_candidates)
    corpus = corpus if device is None else corpus.to(device)
    for first in range(0, query.shape[0], QUERIES_AT_A_TIME):
        block = query[first : first + QUERIES_AT_A_TIME].to(corpus.device)
        target = None if positive is None else positive[first : first + len(block)].to(corpus.device)
        similarity, index = HF.hard_negatives(
            block, corpus, wanted, target=target, exclude_target=target is not None, backend=backend
        )
        _check_finite(block, similarity, first)
        own = torch.full((len(block),), NO_POSITIVE) if target is None else target.cpu()
        rows = zip(own.tolist(), similarity.tolist(), index.tolist(), strict=True)
        for at, (its_positive, values, columns) in enumerate(rows, start=first):
            allowed = [
                (column, value)
                for column, value in zip(columns[skip:], values[skip:], strict=True)
                if max_similarity is None or value <= max_similarity
            ][:k]
            yield Mined(at, its_positive, [column for column, _ in allowed], [value for _, value in allowed])


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
    written, left_out = _run(args)
    print(f"{args.output}: {written} queries with {args.k} negatives each", end="", file=sys.stderr)
    print(f"; {left_out} had fewer and were left out" if left_out else "", file=sys.stderr)


def _run(args: argparse.Namespace) -> tuple[int, int]:
    """How many queries were written and left out."""
    from tqdm import tqdm

    encoder = None if _is_array(args.query) else _encoder(args)
    query, corpus = _side("query", args.query, encoder), _side("corpus", args.corpus, encoder)
    if query.embeddings.shape[1] != corpus.embeddings.shape[1]:
        raise ValueError(
            f"corpus: expected rows of length {query.embeddings.shape[1]}, as query has, "
            f"got {corpus.embeddings.shape[1]}"
        )
    positive = _positives(args.positives, len(query.embeddings), len(corpus.embeddings))
    num_candidates = len(corpus.embeddings) - (positive is not None)
    if args.skip + args.k > num_candidates:
        raise ValueError(f"corpus: expected at least skip + k = {args.skip + args.k} candidates, got {num_candidates}")
    mined = mine(
        query.embeddings,
        corpus.embeddings,
        args.k,
        positive=positive,
        skip=args.skip,
        max_similarity=args.max_similarity,
        device=args.device,
        backend=args.backend,
    )
    written = 0
    with _written_at_once(args.output) as file:
        for found in tqdm(mined, total=len(query.embeddings), unit=" queries", file=sys.stderr):
            if len(found.negatives) == args.k:
                file.write(json.dumps(_record(found, query, corpus, positive is not None), ensure_ascii=False) + "\n")
                written += 1
    return written, len(query.embeddings) - written


def _record(found: Mined, query: Side, corpus: Side, has_positives: bool) -> dict[str, Any]:
    has_positive = found.positive != NO_POSITIVE
    if query.sentences is None or corpus.sentences is None:
        return {
            "query": found.query,
            "positive": found.positive if has_positive else None,
            "negatives": found.negatives,
            "similarities": found.similarities,
        }
    record: dict[str, Any] = {"anchor": query.sentences[found.query]}
    if has_positives:
        record["positive"] = corpus.sentences[found.positive] if has_positive else None
    for number, column in enumerate(found.negatives, start=1):
        record[f"negative_{number}"] = corpus.sentences[column]
    return record


def _is_array(path: Path) -> bool:
    return path.suffix.lower() == ".npy"


def _side(name: str, path: Path, encoder: SentenceEncoder | None) -> Side:
    if encoder is None:
        return Side(_read_array(name, path), None)
    sentences = _read_lines(name, path)
    return Side(encoder.encode(sentences), sentences)


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


def _read_lines(name: str, path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")  # and at no other separator
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected UTF-8 text, got byte 0x{error.object[error.start]:02x} in {path}") from None
    if lines == [""]:
        raise ValueError(f"{name}: expected one sentence a line, got an empty file, {path}")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(f"{name}: expected one sentence a line, got an empty line, {path}:{number}")
    return lines


def _positives(path: Path | None, num_queries: int, num_corpus: int) -> Tensor | None:  # (N,) int64
    if path is None:
        return None
    import torch

    lines = path.read_text(encoding="utf-8").split()
    if len(lines) != num_queries:
        raise ValueError(f"positives: expected {num_queries} lines, one for each query, got {len(lines)} in {path}")
    for number, line in enumerate(lines, start=1):
        if line != "-" and not (line.isascii() and line.isdigit() and int(line) < num_corpus):
            raise ValueError(
                f'positives: expected a line number of the corpus, 0 to {num_corpus - 1}, or "-", '
                f"got {check.shown(line)}, {path}:{number}"
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


@contextmanager
def _written_at_once(path: Path) -> Iterator[TextIO]:
    """A file that takes its name when it is complete, and otherwise leaves nothing behind."""
    descriptor, temporary = tempfile.mkstemp(dir=path.resolve().parent, prefix=f".{path.name}.")
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
    add("--query", required=True, type=Path, help="sentences, one a line, or a .npy file of embeddings")
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
    add("--model_name_or_path", help="a folder the trainer wrote, or any encoder transformers can load; for text")
    add("--pooler_type", help="default: what the model's config records, otherwise avg")
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
