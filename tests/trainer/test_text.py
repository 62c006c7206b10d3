"""Reading training text: what is kept, what is skipped and counted, what is refused and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from hicl_fast.trainer.text import read_training_text


def write(tmp_path: Path, content: bytes, name: str = "text.txt") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def test_one_document_a_line_and_empty_lines_counted(tmp_path: Path) -> None:
    text = read_training_text(write(tmp_path, "\ufefffirst\r\n\n  \t\nsecond\u2028still second\nlast".encode()))
    assert text.rows == [("first",), ("second\u2028still second",), ("last",)]
    assert (text.skipped, text.columns) == (2, 1)


def test_max_rows_counts_kept_rows(tmp_path: Path) -> None:
    assert read_training_text(write(tmp_path, b"a\n\nb\nc\n"), max_rows=2).rows == [("a",), ("b",)]


def test_undecodable_byte_names_file_line_and_place(tmp_path: Path) -> None:
    path = write(tmp_path, b"fine\nna\xefve\n")
    with pytest.raises(ValueError, match=r"text\.txt, line 2: expected UTF-8 text, got byte 0xef at position 3"):
        read_training_text(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train_file: .*nothing\.txt does not exist"):
        read_training_text(tmp_path / "nothing.txt")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_training_text(tmp_path)


def test_file_without_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no line that is not empty"):
        read_training_text(write(tmp_path, b"\n \n"))


def test_csv_with_hard_negatives(tmp_path: Path) -> None:
    path = write(tmp_path, b'sent0,sent1,hard_neg\n"a, b",c,d\n,,\ne,f,g\n', "pairs.csv")
    text = read_training_text(path)
    assert text.rows == [("a, b", "c", "d"), ("e", "f", "g")]
    assert (text.skipped, text.columns) == (1, 3)


@pytest.mark.parametrize("row", [b"a,b", b"a,b,", b"a,b,c,d"])
def test_csv_row_of_another_width(tmp_path: Path, row: bytes) -> None:
    path = write(tmp_path, b"sent0,sent1,hard_neg\nx,y,z\n" + row + b"\n", "pairs.csv")
    with pytest.raises(ValueError, match=r"pairs\.csv, line 3: expected 3 filled columns"):
        read_training_text(path)


def test_json_lines_with_several_hard_negatives(tmp_path: Path) -> None:
    record = b'{"anchor": "a", "positive": "b", "negative_1": "c", "negative_2": "d"}\n'
    text = read_training_text(write(tmp_path, record + b"\n" + record, "mined.jsonl"))
    assert text.rows == [("a", "b", "c", "d")] * 2
    assert (text.skipped, text.columns) == (1, 4)


def test_a_table_without_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no line that is not empty"):
        read_training_text(write(tmp_path, b"sent0,sent1\n\n", "pairs.csv"))
