"""Files of rows: what is read as which kind, and what is refused with its line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from hicl_fast.text_files import Row, read_rows

TRIPLETS = [("a, b", 'says "c"', "d\r\ne"), ("f", "g", "h")]  # commas, quotes and a line's end in cells
HEADING = "sent0,sent1,hard_neg"


def rows(tmp_path: Path, name: str, content: str | bytes, max_columns: int | None = None) -> list[Row]:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [row for _, row in read_rows(path, max_columns) if row]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("x.csv", [HEADING, '"a, b","says ""c""","d\r\ne"', "", ",,", "f, g ,h"]),
        ("x.tsv", ["query\tanswer\tnegative", 'a, b\t"says ""c"""\t"d\r\ne"', "f\tg\th"]),
        (
            "x.jsonl",
            [
                '{"anchor": "a, b", "positive": "says \\"c\\"", "negative_1": "d\\r\\ne"}',
                "",
                '{"negative_1": "h", "positive": "g ", "anchor": "f"}',
            ],
        ),
    ],
)
def test_tables(tmp_path: Path, name: str, lines: list[str], end: str, mark: str) -> None:
    content = mark + end.join(lines) + end
    assert rows(tmp_path, name, content) == TRIPLETS
    assert rows(tmp_path, name, content.removesuffix(end)) == TRIPLETS
    assert rows(tmp_path, f"{name}.gz", gzip.compress(content.encode(), mtime=0)) == TRIPLETS


def test_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('text\n"a\nb"\n\nc\n')
    assert list(read_rows(path)) == [(2, ("a\nb",)), (4, ()), (5, ("c",))]


PROSE = [
    "Hello, world\nGood morning, sir\n" * 6,
    "a verse,\nanother,\n" * 6,
    "it cost 1,000\nno 2,500\n" * 6,
    '{"a brace opens\n[1] a reference\n',
    "sentence\nof one word\n",
    "text, positive or negative\nand more\n",
    "\tan indented line\n\tand another\n",
    "one\ttab in a line\nand none\n",
    '"Quoted," she said, and left.\n"Quoted," he said, and stayed.\n' * 6,
    "你好,世界\n再见\n" * 6,
    "hi,you\nyes,no\n",  # too few lines to say
]


@pytest.mark.parametrize("name", ["x.txt", "x", "x.txt.gz"])
@pytest.mark.parametrize("text", PROSE)
def test_prose_is_read_as_it_stands(tmp_path: Path, name: str, text: str) -> None:
    content = gzip.compress(text.encode(), mtime=0) if name.endswith(".gz") else text
    assert rows(tmp_path, name, content) == [(line,) for line in text.splitlines()]


@pytest.mark.parametrize("name", ["x.txt", "x", "x.dat", "x.txt.gz"])
@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"text": "a"}\n', "JSON Lines"),
        ('\n{"anchor": "a", "positive": "b"}\n{"anchor": "c", "positive": "d"}\n', "JSON Lines"),
        ('["a", "b"]\n["c", "d"]\n', "JSON Lines"),
        ('[\n  {"text": "a"},\n', "JSON Lines"),
        ("a\tb\nc\td\n", "TSV"),
        ("sentence1\tsentence2\n", "TSV"),
        (f"{HEADING}\na,b,c\n", "CSV"),
        ("\ufeffQuestion,Answer\r\na,b\r\n", "CSV"),
        ('"a man, walking",he walks\nit rains,"it, pours"\n' * 4, "CSV"),
    ],
)
def test_what_looks_like_a_table_is_not_read_as_sentences(tmp_path: Path, name: str, text: str, kind: str) -> None:
    content = gzip.compress(text.encode(), mtime=0) if name.endswith(".gz") else text
    with pytest.raises(ValueError, match=rf"{name}, line 1: expected one sentence a line, .* looks like {kind}"):
        rows(tmp_path, name, content)


def test_lines_are_lines_whatever_they_hold(tmp_path: Path) -> None:
    assert rows(tmp_path, "x.lines", '{"a": 1}\n{"b": 2}\n') == [('{"a": 1}',), ('{"b": 2}',)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        # no heading, or one that means something else
        ("x.csv", "a man eats,someone eats\n", "line 1: expected a heading .* got 'a man eats', 'someone eats'"),
        ("x.csv", "kala,tesy\nmore,less\n", "line 1: expected a heading"),
        ("x.csv", "\n\na man eats\n", "line 3: expected a heading"),
        ("x.tsv", "a man eats\tsomeone eats\n", "line 1: expected a heading"),
        ("x.csv", "sentence1,sentence2,score\na,b,1\n", "line 1: expected a heading .* ignored, .* unknown is no. 3"),
        ("x.csv", "positive,anchor\na,b\n", "line 1: expected a heading .* in their order"),
        ("x.csv", "text,text\na,b\n", "line 1: expected a heading"),
        ("x.csv", "text,\na,b\n", "line 1: expected a heading"),
        ("x.csv", "sent0;sent1\na;b\n", "line 1: expected a heading"),
        ("x.jsonl", '{"id": 3, "text": "a"}\n', "line 1: expected a heading .* got 'id', 'text'"),
        # rows
        ("x.csv", f"{HEADING}\na,b,c\nd,e\n", "line 3: expected 3 filled columns, as the heading has, got 2"),
        ("x.csv", f"{HEADING}\na,b,c,d\n", "line 2: expected 3 filled columns, as the heading has, got 4"),
        ("x.csv", f'{HEADING}\n"a\nb",c,d\ne, ,f\n', "line 4: expected 3 filled .* but 'sent1' is empty"),
        ("x.csv", "text\na, b\n", "line 2: expected 1 filled columns"),
        ("x.csv", 'text\na\n"b\nc\n', "line 3: expected CSV, got: unexpected end of data"),
        ("x.csv", 'text\n"a" b\n', "line 2: expected CSV"),
        ("x.tsv", "text\tpositive\na b\n", "line 2: expected 2 filled columns"),
        ("x.jsonl", '{"text": "a"}\n\n{"text": null}\n', "line 3: expected text in 'text', got null"),
        ("x.jsonl", '{"anchor": "a", "positive": ""}\n', "line 1: .* but 'positive' is empty"),
        ("x.jsonl", '{"text": ["a"]}\n', "line 1: expected text in 'text', got a list"),
        ("x.jsonl", '{"text": 3}\n', "line 1: expected text in 'text', got a number"),
        ("x.jsonl", '{"text": "\\ud800"}\n', "line 1: expected text in 'text', got half a surrogate"),
        (
            "x.jsonl",
            '{"anchor": "a", "positive": "b"}\n{"anchor": "a"}\n',
            "line 2: expected the columns anchor, positive",
        ),
        ("x.jsonl", '{"text": "a"}\n{"text": "b", "positive": "c"}\n', "line 2: expected the columns text"),
        ("x.jsonl", '{"text": "a", "text": "b"}\n', "line 1: expected a JSON object .* twice"),
        ("x.jsonl", '{"text": "a"}\n{"text": "b"\n', "line 2: expected a JSON object"),
        ("x.jsonl", '"a"\n', "line 1: expected a JSON object on the line, got a string"),
        ("x.jsonl", "[" * 100_000, "line 1: expected a JSON object"),
        ("x.json", '[\n{"text": "a"}\n]\n', "line 1: expected a JSON object"),
        # bytes
        ("x.csv", b"text\na\nna\xefve\n", "line 3: expected UTF-8 text, got byte 0xef at position 3"),
        ("x.jsonl", b'{"text": "\xff"}\n', "line 1: expected UTF-8 text, got byte 0xff"),
        ("x.txt", "utf-16".encode("utf-16"), "line 1: expected UTF-8"),
        ("x.txt", b"PK\x03\x04\x00\x00\n", "line 1: expected UTF-8 text, got byte 0x00"),
        ("x.txt", b"a\rb\rc\r", "line 1: expected lines that end in newlines"),
        ("x.txt.gz", b"plain", "line 1: expected a gzip file"),
        ("x.txt.gz", gzip.compress(b"a\n" * 1000, mtime=0)[:-12], "line .*: expected a gzip file"),
    ],
)
def test_refused_with_its_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}, {message}"):
        rows(tmp_path, name, content)


def test_one_column_where_others_would_be_ignored(tmp_path: Path) -> None:
    assert rows(tmp_path, "x.csv", "passage\na\n", max_columns=1) == [("a",)]
    with pytest.raises(ValueError, match="line 1: expected one column, of sentences, .* got 'anchor', 'positive'"):
        rows(tmp_path, "x.csv", "anchor,positive\na,b\n", max_columns=1)


@pytest.mark.parametrize("name", ["x.txt", "x.csv", "x.tsv", "x.jsonl", "x"])
def test_nothing_in_an_empty_file(tmp_path: Path, name: str) -> None:
    assert rows(tmp_path, name, "") == rows(tmp_path, name, "\n\n") == rows(tmp_path, name, "\ufeff") == []


def test_lines_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"text\na\nb\n\xff\n")
    found = read_rows(path)
    assert [next(found), next(found)] == [(2, ("a",)), (3, ("b",))]
