"""Reads training text: one document a line, or a table of sentences, positives and hard negatives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from hicl_fast.text_files import Row, check_file, read_rows

__all__ = ["Row", "TrainingText", "read_training_text"]


@dataclass(frozen=True)
class TrainingText:
    """Rows to train on, all of the same width, and the number of empty ones that were left out.

    A row is (document,), (sentence, positive) or (sentence, positive, hard negative, ...).
    """

    rows: list[Row]
    skipped: int

    @property
    def columns(self) -> int:
        return len(self.rows[0])


def read_training_text(path: str | Path, max_rows: int | None = None) -> TrainingText:
    """Reads the first ``max_rows`` rows that are not empty, as :mod:`hicl_fast.text_files` has them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is malformed or of no kind that is known (with the line), or one without text.
    """
    path = Path(path)
    check_file("train_file", path)
    skipped = 0

    def filled() -> Iterator[Row]:
        nonlocal skipped
        for _, row in read_rows(path):
            if row:
                yield row
            else:
                skipped += 1

    rows = list(islice(filled(), max_rows))
    if not rows:
        raise ValueError(f"train_file: expected text, but {path} has no line that is not empty")
    return TrainingText(rows, skipped)
