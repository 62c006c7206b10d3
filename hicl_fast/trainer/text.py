"""Reads training text: one document a line, or SimCSE's csv of sentences, positives and hard negatives."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

Row = tuple[str, ...]  # (document,), (sentence, positive) or (sentence, positive, hard negative)


@dataclass(frozen=True)
class TrainingText:
    """Rows to train on, all of the same width, and the number of empty ones that were left out."""

    rows: list[Row]
    skipped: int

    @property
    def columns(self) -> int:
        return len(self.rows[0])


def read_training_text(path: str | Path, max_rows: int | None = None) -> TrainingText:
    """Reads the first ``max_rows`` rows that are not empty; a name ending in ``.csv`` is read as csv with a heading.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a byte that is not UTF-8, a csv row of another width or with an empty cell (with the line), or a
            file without text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"train_file: expected a text file, but {path} {'is a folder' if path.is_dir() else 'does not exist'}"
        )
    all_rows = _csv_rows(path) if path.suffix.lower() == ".csv" else ((line,) for line in _lines(path))
    skipped = 0

    def filled() -> Iterator[Row]:
        nonlocal skipped
        for row in all_rows:
            if any(cell.strip() for cell in row):
                yield row
            else:
                skipped += 1

    rows = list(islice(filled(), max_rows))
    if not rows:
        raise ValueError(f"train_file: expected text, but {path} has no line that is not empty")
    return TrainingText(rows, skipped)


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                byte = f"0x{line[error.start]:02x}"
                raise ValueError(
                    f"{path}, line {number}: expected UTF-8 text, got byte {byte} at position {error.start + 1} of the line"
                ) from None


def _csv_rows(path: Path) -> Iterator[Row]:
    reader = csv.reader(line + "\n" for line in _lines(path))
    heading = next(reader, [])
    if not 1 <= len(heading) <= 3:
        raise ValueError(
            f"{path}, line 1: expected a heading of 1 to 3 columns (sentence, positive, hard negative), got {heading}"
        )
    for row in reader:
        cells = [cell.strip() for cell in row]
        if any(cells) and (len(cells) != len(heading) or not all(cells)):
            raise ValueError(f"{path}, line {reader.line_num}: expected {len(heading)} filled columns, got {row}")
        yield tuple(cells)
