"""Reads people's text as rows of cells, a line at a time: one sentence a line, CSV, TSV or JSON Lines; each also as .gz.

The file's name says what it is: .csv, .tsv, .jsonl; .lines is one sentence a line whatever it holds. Under any other
name it is one sentence a line too, unless its beginning looks like one of the others, which is refused: columns would be
trained on as if they were text. That is so where

- each of the first lines is a JSON object or array, or the first opens one that goes on;
- there are several lines and a tab inside each of the first;
- the first line is a heading of columns that have names as below;
- there are 8 lines or more, and each of the first 32 has the same number of commas that part columns, and no other.
  A comma within quotes, before a space or between digits parts none, so prose is no CSV.

CSV and TSV need a heading: without one the first row would be lost. Columns are taken by position, and their names must
say the same, as in sent0,sent1,hard_neg or anchor,positive,negative_1,negative_2: ``FIRST``, ``SECOND`` and ``NEGATIVE``.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

Row = tuple[str, ...]  # of a table: the same number in all rows; () for an empty line

FIRST = frozenset(
    "sent0 sentence sentence0 sentence1 text text0 text1 anchor query question premise document passage paragraph".split()
)
SECOND = frozenset(
    "sent1 sentence1 sentence2 text1 text2 positive pos answer passage document paraphrase hypothesis entailment".split()
)
NEGATIVE = re.compile(r"(hard_)?neg(ative)?_?\d*|contradiction")

_KINDS = {
    ".csv": "CSV",
    ".tsv": "TSV",
    ".tab": "TSV",
    ".jsonl": "JSON Lines",
    ".ndjson": "JSON Lines",
    ".json": "JSON Lines",
    ".lines": "lines",
}
_SUFFIXES = {"CSV": ".csv", "TSV": ".tsv", "JSON Lines": ".jsonl"}
_DELIMITERS = {"CSV": ",", "TSV": "\t"}

_SAMPLE = 32  # lines that are looked at to tell what a file is
_FEWEST_OF_CSV = 8  # lines with equally many commas that are no chance
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
_COMMA_BETWEEN_COLUMNS = re.compile(r",(?=\S)")


def check_file(argument: str, path: Path) -> None:
    """Raises FileNotFoundError where there is no such file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{argument}: expected a text file, but {path} {'is a folder' if path.is_dir() else 'does not exist'}"
        )


def read_rows(path: Path, max_columns: int | None = None) -> Iterator[tuple[int, Row]]:
    """The rows in order, each with the number of its (first) line.

    An empty line, and a row of empty cells, is the row (). One sentence a line is one column; a table's cells are stripped.

    Args:
        path: a file that is there.
        max_columns: 1 where only single sentences will do.

    Raises:
        ValueError: naming file and line: a byte that is not UTF-8, a file that is no text of its kind or has no heading,
            columns of other names, a row of another width, a cell that is empty, null or no text.
    """
    kind = _kind(path)
    if kind == "JSON Lines":
        yield from _json_rows(path, max_columns)
    elif kind in _DELIMITERS:
        yield from _separated_rows(path, kind, max_columns)
    else:
        for number, line in read_lines(path):
            yield number, (line,) if line.strip() else ()


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Each line's number and text. A line ends at a newline, and at no other separator that Unicode has."""
    for number, line in _raw_lines(path):
        yield number, line.rstrip("\r\n")


def _raw_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their ends, decoded; a byte order mark is no text."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1 and b"\r" in line.rstrip(b"\r\n"):
                    raise ValueError(
                        f"{path}, line 1: expected lines that end in newlines, got a carriage return alone"
                    )
                if b"\0" in line:
                    raise ValueError(f"{path}, line {number}: expected UTF-8 text, got byte 0x00")
                yield number, _decoded(path, number, line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}, line {number + 1}: expected a gzip file, got {error}") from None


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        byte = f"0x{line[error.start]:02x}"
        raise ValueError(
            f"{path}, line {number}: expected UTF-8 text, got byte {byte} at position {error.start + 1} of the line"
        ) from None


def _separated_rows(path: Path, kind: str, max_columns: int | None) -> Iterator[tuple[int, Row]]:
    records = _separated_records(path, kind)
    line, heading = next(((line, cells) for line, cells in records if any(cells)), (1, []))
    if heading:
        _check_columns(path, line, heading, max_columns)
    for line, cells in records:
        if any(cells):
            _check_cells(path, line, heading, cells)
        yield line, tuple(cells) if any(cells) else ()


def _separated_records(path: Path, kind: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader((line for _, line in _raw_lines(path)), delimiter=_DELIMITERS[kind], strict=True)
    while True:
        first = reader.line_num + 1  # a cell in quotes may go on over several lines
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}, line {first}: expected {kind}, got: {error}") from None
        if cells is None:
            return
        yield first, [cell.strip() for cell in cells]


def _check_cells(path: Path, line: int, heading: list[str], cells: list[str]) -> None:
    expected = f"{path}, line {line}: expected {len(heading)} filled columns, as the heading has"
    if len(cells) != len(heading):
        raise ValueError(f"{expected}, got {len(cells)}")
    if not all(cells):
        raise ValueError(f"{expected}, but {heading[cells.index('')]!r} is empty")


def _json_rows(path: Path, max_columns: int | None) -> Iterator[tuple[int, Row]]:
    columns: list[str] = []
    for number, line in _raw_lines(path):
        if not line.strip():
            yield number, ()
            continue
        record = _json_object(path, number, line)
        if not columns:
            columns = list(record)
            _check_columns(path, number, columns, max_columns)
        if record.keys() != set(columns):
            raise ValueError(
                f"{path}, line {number}: expected the columns {', '.join(columns)}, as the lines before, "
                f"got {_names(list(record))}"
            )
        cells = [_json_text(path, number, column, record[column]) for column in columns]
        if any(cells):
            _check_cells(path, number, columns, cells)
        yield number, tuple(cells) if any(cells) else ()


def _json_object(path: Path, number: int, line: str) -> dict[str, Any]:
    expected = f"{path}, line {number}: expected a JSON object on the line"

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            raise ValueError(f"{expected}, got one that names a column twice")
        return record

    try:
        record = json.loads(line, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"{expected}, got: {error.msg}, column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"{expected}, got too deep a one") from None
    if not isinstance(record, dict):
        raise ValueError(f"{expected}, got {_json_type(record)}")
    return record


def _json_text(path: Path, number: int, column: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{path}, line {number}: expected text in {column!r}, got {_json_type(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{path}, line {number}: expected text in {column!r}, got half a surrogate pair") from None
    return value.strip()


def _json_type(value: object) -> str:
    names = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        str: "a string",
    }
    return names.get(type(value), "an object")


def _check_columns(path: Path, line: int, columns: list[str], max_columns: int | None) -> None:
    if max_columns is not None and len(columns) > max_columns:
        raise ValueError(
            f"{path}, line {line}: expected one column, of sentences, since others would be ignored, got {_names(columns)}"
        )
    wrong = next((at for at in range(len(columns)) if not _is_column(at, columns[at])), None)
    if wrong is not None or len(set(columns)) != len(columns):
        raise ValueError(
            f"{path}, line {line}: expected a heading that names the columns in their order, as sentence; "
            "sent0,sent1,hard_neg; query,answer; or anchor,positive,negative_1,negative_2; without a column that would be "
            f"ignored, got {_names(columns)}"
            + ("" if wrong is None else f", of which the first unknown is no. {wrong + 1}")
        )


def _is_column(at: int, name: str) -> bool:
    name = name.strip().lower().replace(" ", "_")
    if at < 2:
        return name in (FIRST, SECOND)[at]
    return NEGATIVE.fullmatch(name) is not None


def _names(columns: list[str]) -> str:
    """What a message shows of what may be no names but text."""
    shown = [name if len(name) <= 24 else f"{name[:24]}…" for name in columns[:6]]
    return ", ".join(map(repr, shown)) + (f" and {len(columns) - 6} more" if len(columns) > 6 else "")


def _kind(path: Path) -> str:
    """``lines``, ``CSV``, ``TSV`` or ``JSON Lines``."""
    name = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    kind = _KINDS.get(name.suffix.lower())
    if kind is not None:
        return kind
    filled = (line for _, line in read_lines(path) if line.strip())
    resembles = _resembles(list(islice(filled, _SAMPLE)))
    if resembles is not None:
        raise ValueError(
            f"{path}, line 1: expected one sentence a line, but the file looks like {resembles}: "
            f"name it {_SUFFIXES[resembles]} to have it read as that, or .lines if each line is a sentence"
        )
    return "lines"


def _resembles(sample: list[str]) -> str | None:
    """What the first lines that are not empty look like, where it is not text; the rules are at the top."""
    if not sample:
        return None
    if sample[0].strip() in ("[", "{", "[{") or all(_is_json(line) for line in sample):
        return "JSON Lines"
    if _is_heading(sample[0], "\t") or len(sample) > 1 and all("\t" in line.strip() for line in sample):
        return "TSV"
    if _is_heading(sample[0], ",") or len(sample) >= _FEWEST_OF_CSV and _has_even_commas(sample):
        return "CSV"
    return None


def _is_json(line: str) -> bool:
    try:
        return line.lstrip()[:1] in ("[", "{") and isinstance(json.loads(line), (dict, list))
    except (ValueError, RecursionError):
        return False


def _is_heading(line: str, delimiter: str) -> bool:
    cells = [cell.strip().strip('"') for cell in line.split(delimiter)]
    return len(cells) > 1 and all(_is_column(at, cell) for at, cell in enumerate(cells))


def _has_even_commas(sample: list[str]) -> bool:
    bare = [_COMMA_IN_NUMBER.sub("", _QUOTED.sub("quoted", line)) for line in sample]
    count = bare[0].count(",")
    return count > 0 and all(line.count(",") == len(_COMMA_BETWEEN_COLUMNS.findall(line)) == count for line in bare)
