"""Reads STS12–16, STS-B and SICK-R from SentEval's folder layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hicl_fast import _checks as check
from hicl_fast.text_files import read_lines

TASKS = ("STS12", "STS13", "STS14", "STS15", "STS16", "STS-B", "SICK-R")
DEVELOPMENT_TASK = "STS-B dev"

_YEARS = {f"STS{year}": f"STS/STS{year}-en-test" for year in (12, 13, 14, 15, 16)}
_TABLES = {  # file, columns of (first sentence, second sentence, gold score), lines of heading
    "STS-B": ("STS/STSBenchmark/sts-test.csv", (5, 6, 4), 0),
    "STS-B dev": ("STS/STSBenchmark/sts-dev.csv", (5, 6, 4), 0),
    "SICK-R": ("SICK/SICK_test_annotated.txt", (1, 2, 3), 1),
}


@dataclass(frozen=True)
class Task:
    """Sentence pairs and what people said of their similarity; the three lists are equally long."""

    name: str
    first: list[str]
    second: list[str]
    gold: list[float]

    def __len__(self) -> int:
        return len(self.gold)


def find_root(data_dir: str | Path) -> Path:
    """The folder that holds ``STS`` and ``SICK``: SentEval's data folder, or its ``downstream`` folder.

    Raises:
        FileNotFoundError: there is no such folder in ``data_dir``.
    """
    for root in (Path(data_dir) / "downstream", Path(data_dir)):
        if (root / "STS").is_dir() or (root / "SICK").is_dir():
            return root
    raise FileNotFoundError(
        f"data_dir: expected SentEval's folder with downstream/STS and downstream/SICK, got {data_dir}"
    )


def read_task(root: Path, name: str) -> Task | None:
    """Reads one of :data:`TASKS` or ``"STS-B dev"``; None where its files are not there.

    The subsets of a year are concatenated; pairs without a gold score are skipped.

    Raises:
        ValueError: an unknown task, or a file that cannot be read as that task, with the file and line.
    """
    if name in _YEARS:
        folder = root / _YEARS[name]
        pairs = [pair for path in sorted(folder.glob("STS.input.*.txt")) for pair in _subset_pairs(path)]
    elif name in _TABLES:
        path, columns, heading = _TABLES[name]
        pairs = list(_table_pairs(root / path, columns, heading)) if (root / path).is_file() else []
    else:
        raise ValueError(f"task: expected one of {', '.join((*TASKS, DEVELOPMENT_TASK))}, got {check.shown(name)}")
    if not pairs:
        return None
    first, second, gold = zip(*pairs, strict=True)
    return Task(name, list(first), list(second), list(gold))


def _subset_pairs(input_path: Path) -> Iterator[tuple[str, str, float]]:
    gold_path = input_path.with_name(input_path.name.replace("STS.input.", "STS.gs.", 1))
    if not gold_path.is_file():
        raise ValueError(f"{gold_path}: expected the gold scores of {input_path.name}, but there is no such file")
    texts, scores = _lines(input_path), _lines(gold_path)
    if len(texts) != len(scores):
        raise ValueError(
            f"{gold_path}: expected {len(texts)} scores, one for each line of {input_path.name}, got {len(scores)}"
        )
    for number, (text, score) in enumerate(zip(texts, scores, strict=True), start=1):
        if not score.strip():
            continue
        columns = _columns(text, 2, input_path, number)
        yield columns[0], columns[1], _number(score, gold_path, number)


def _table_pairs(path: Path, wanted: tuple[int, int, int], heading: int) -> Iterator[tuple[str, str, float]]:
    first, second, gold = wanted
    for number, line in enumerate(_lines(path)[heading:], start=1 + heading):
        columns = _columns(line, max(wanted) + 1, path, number)
        if columns[gold].strip():
            yield columns[first], columns[second], _number(columns[gold], path, number)


def _lines(path: Path) -> list[str]:
    return [line for _, line in read_lines(path)]


def _columns(line: str, at_least: int, path: Path, number: int) -> list[str]:
    columns = line.split("\t")
    if len(columns) < at_least:
        raise ValueError(
            f"{path}, line {number}: expected at least {at_least} columns between tabs, got {len(columns)}"
        )
    return columns


def _number(text: str, path: Path, number: int) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{path}, line {number}: expected a gold score, got {check.shown(text.strip())}") from None
