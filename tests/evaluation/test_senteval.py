"""The reader of SentEval's layout, on a made-up folder where every kind of row occurs."""

from __future__ import annotations

from pathlib import Path

import pytest

from hicl_fast.evaluation import find_root, read_task


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def sts_b_row(first: str, second: str, gold: str) -> str:
    return f"main-news\theadlines\t2015\t0001\t{gold}\t{first}\t{second}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "downstream"
    sts12 = folder / "STS" / "STS12-en-test"
    write(sts12 / "STS.input.b.txt", "one\ttwo", "skipped\tpair", "three\tfour\tsource\turl")
    write(sts12 / "STS.gs.b.txt", "1.5", "", "4")
    write(sts12 / "STS.input.a.txt", 'a "quoted\tb\x85c')
    write(sts12 / "STS.gs.a.txt", "0.0")
    write(folder / "STS" / "STSBenchmark" / "sts-test.csv", sts_b_row("x", "y", "2.25"), sts_b_row('"x', "z", "5"))
    write(folder / "STS" / "STSBenchmark" / "sts-dev.csv", sts_b_row("d", "e", "3"))
    heading = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment"
    write(folder / "SICK" / "SICK_test_annotated.txt", heading, "6\tboys\tgirls\t3.3\tNEUTRAL")
    return find_root(tmp_path)


def test_subsets_of_a_year_are_joined_and_pairs_without_a_score_skipped(root: Path) -> None:
    task = read_task(root, "STS12")
    assert task is not None
    assert task.first == ['a "quoted', "one", "three"]
    assert task.second == ["b\x85c", "two", "four"]  # a line ends at a newline only
    assert task.gold == [0.0, 1.5, 4.0]


@pytest.mark.parametrize(
    ("name", "first", "second", "gold"),
    [
        ("STS-B", ["x", '"x'], ["y", "z"], [2.25, 5.0]),
        ("STS-B dev", ["d"], ["e"], [3.0]),
        ("SICK-R", ["boys"], ["girls"], [3.3]),
    ],
)
def test_tables(root: Path, name: str, first: list[str], second: list[str], gold: list[float]) -> None:
    task = read_task(root, name)
    assert task is not None
    assert (task.first, task.second, task.gold) == (first, second, gold)


def test_missing_task_is_none(root: Path) -> None:
    assert read_task(root, "STS13") is None


def test_folder_without_tasks(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="data_dir: expected SentEval's folder"):
        find_root(tmp_path)


def test_downstream_folder_itself_is_accepted(root: Path) -> None:
    assert find_root(root) == root


def test_unknown_task(root: Path) -> None:
    with pytest.raises(ValueError, match="task: expected one of STS12, .* got 'STS99'"):
        read_task(root, "STS99")


@pytest.mark.parametrize(
    ("texts", "scores", "message"),
    [
        (["a\tb", "no tab"], ["1", "2"], r"STS\.input\.b\.txt, line 2: expected at least 2 columns .* got 1"),
        (["a\tb"], ["much"], r"STS\.gs\.b\.txt, line 1: expected a gold score, got 'much'"),
        (["a\tb", "c\td"], ["1"], r"STS\.gs\.b\.txt: expected 2 scores, .* got 1"),
    ],
)
def test_malformed_files_are_named(root: Path, texts: list[str], scores: list[str], message: str) -> None:
    folder = root / "STS" / "STS12-en-test"
    write(folder / "STS.input.b.txt", *texts)
    write(folder / "STS.gs.b.txt", *scores)
    with pytest.raises(ValueError, match=message):
        read_task(root, "STS12")


def test_missing_gold_file(root: Path) -> None:
    (root / "STS" / "STS12-en-test" / "STS.gs.b.txt").unlink()
    with pytest.raises(ValueError, match=r"STS\.gs\.b\.txt: expected the gold scores of STS\.input\.b\.txt"):
        read_task(root, "STS12")


def test_undecodable_byte(root: Path) -> None:
    (root / "STS" / "STS12-en-test" / "STS.input.b.txt").write_bytes(b"a\tb\nc\t\xff\n")
    with pytest.raises(ValueError, match=r"STS\.input\.b\.txt, line 2: expected UTF-8"):
        read_task(root, "STS12")


def test_real_data_has_the_published_number_of_pairs(data_folder: Path) -> None:
    root = find_root(data_folder / "senteval")
    expected = {"STS12": 3108, "STS13": 1500, "STS14": 3750, "STS15": 3000, "STS16": 1186}
    expected |= {"STS-B": 1379, "STS-B dev": 1500, "SICK-R": 4927}
    assert {name: len(read_task(root, name) or ()) for name in expected} == expected
