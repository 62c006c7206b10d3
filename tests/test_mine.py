"""``python -m hicl_fast.mine``."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hicl_fast import mine, reference


def run(tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    output = tmp_path / "out.jsonl"
    mine.main(["--output", str(output), *options])
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.fixture
def arrays(tmp_path: Path) -> tuple[Path, Path]:
    generator = np.random.default_rng(0)
    paths = tmp_path / "query.npy", tmp_path / "corpus.npy"
    for path, rows in zip(paths, (7, 300), strict=True):
        np.save(path, generator.standard_normal((rows, 12)).astype(np.float32))
    return paths


def files(arrays: tuple[Path, Path]) -> list[str]:
    return ["--query", str(arrays[0]), "--corpus", str(arrays[1])]


def exact(arrays: tuple[Path, Path], k: int, target: torch.Tensor | None = None) -> tuple[Any, Any]:
    query, corpus = (torch.from_numpy(np.load(path)).double() for path in arrays)
    similarity, index = reference.hard_negatives(query, corpus, k, target=target, exclude_target=target is not None)
    return similarity.tolist(), index.tolist()


def test_embeddings(tmp_path: Path, arrays: tuple[Path, Path]) -> None:
    records = run(tmp_path, *files(arrays), "--k", "4", "--skip", "2")
    similarity, index = exact(arrays, 6)
    assert [r["query"] for r in records] == list(range(7))
    assert [r["positive"] for r in records] == [None] * 7
    assert [r["negatives"] for r in records] == [row[2:] for row in index]
    np.testing.assert_allclose([r["similarities"] for r in records], [row[2:] for row in similarity], atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.npy", "out.jsonl", "query.npy"]


def test_several_blocks_of_queries(tmp_path: Path, arrays: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(tmp_path, *files(arrays))
    monkeypatch.setattr(mine, "QUERIES_AT_A_TIME", 3)
    assert [r["negatives"] for r in run(tmp_path, *files(arrays))] == [r["negatives"] for r in expected]


def test_positives_and_half_precision(tmp_path: Path, arrays: tuple[Path, Path]) -> None:
    np.save(arrays[1], np.load(arrays[1]).astype(np.float16))
    _, best = exact(arrays, 1)
    target = [row[0] for row in best]
    target[3] = -1
    positives = tmp_path / "positives.txt"
    positives.write_text("".join("-\n" if t < 0 else f"{t}\n" for t in target))
    records = run(tmp_path, *files(arrays), "--positives", str(positives), "--k", "3")
    assert [r["positive"] for r in records] == [None if t < 0 else t for t in target]
    assert [r["negatives"] for r in records] == exact(arrays, 3, torch.tensor(target))[1]


def test_max_similarity(tmp_path: Path, arrays: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    records = run(tmp_path, *files(arrays), "--k", "3", "--max_similarity", "0.5")
    similarity, index = exact(arrays, 128)
    for record in records:
        allowed = [j for j, s in zip(index[record["query"]], similarity[record["query"]], strict=True) if s <= 0.5]
        assert record["negatives"] == allowed[:3]
    assert len(records) == 7
    assert run(tmp_path, *files(arrays), "--k", "3", "--max_similarity", "-0.9") == []
    assert "7 had fewer and were left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "limit_of"),
    [
        (["--false_negative_margin", "-0.2"], lambda positive: positive - 0.2),
        (["--false_negative_ratio", "0.7"], lambda positive: 0.7 * positive),
        (["--false_negative_ratio", "0.9", "--max_similarity", "0.4"], lambda positive: min(0.9 * positive, 0.4)),
    ],
    ids=["margin", "ratio", "ratio and limit"],
)
def test_limits_by_the_positive(
    tmp_path: Path, arrays: tuple[Path, Path], options: list[str], limit_of: Callable[[float], float]
) -> None:
    similarity, index = exact(arrays, 128)
    places = [0, 1, 2, 3, 4, 5, 6]
    target = [row[place] for row, place in zip(index, places, strict=True)]
    (tmp_path / "positives.txt").write_text("".join(f"{t}\n" for t in target[:-1]) + "-\n")
    records = run(tmp_path, *files(arrays), "--positives", str(tmp_path / "positives.txt"), "--k", "3", *options)
    assert len(records) == 7
    for record, row, values, place in zip(records, index, similarity, places, strict=True):
        has_positive = record["positive"] is not None
        limit = limit_of(values[place]) if has_positive else 0.4 if "--max_similarity" in options else 1.0
        avoided = {record["positive"]}
        allowed = [j for j, s in zip(row, values, strict=True) if s <= limit and j not in avoided]
        assert record["negatives"] == allowed[:3]


class Letters:
    """How often each letter occurs."""

    def encode(self, texts: list[str]) -> torch.Tensor:
        rows = [[text.casefold().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts]
        return torch.tensor(rows, dtype=torch.float32)


@pytest.fixture
def sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Mines with embeddings by letters."""

    def run_on(query: list[str], corpus: list[str], positives: list[int] | None, *options: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(mine, "_encoder", lambda args: Letters())
        for name, lines in (("query", query), ("corpus", corpus)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        given = [str(tmp_path / "query.jsonl"), "--corpus", str(tmp_path / "corpus.jsonl"), "--model_name_or_path", "-"]
        if positives is not None:
            lines = ["-" if positive < 0 else str(positive) for positive in positives]
            (tmp_path / "positives.txt").write_text("\n".join(lines))
            given += ["--positives", str(tmp_path / "positives.txt")]
        return run(tmp_path, "--query", *given, *options)

    return run_on


Sentences = Callable[..., list[dict[str, Any]]]


def test_sentences(sentences: Sentences, capsys: pytest.CaptureFixture[str]) -> None:
    query, corpus = ["aaa", "bbé"], ["aab", "bbb", "abb", "aaaa"]
    assert sentences(query, corpus, [3, -1], "--k", "2") == [
        {"anchor": "aaa", "positive": "aaaa", "negative_1": "aab", "negative_2": "abb"}
    ]
    assert "1 queries with 2 negatives each; 1 without a positive were left out" in capsys.readouterr().err
    assert sentences(query, corpus, None, "--k", "2")[0] == {  # as SimCSE has it: what comes second is the positive
        "anchor": "aaa",
        "positive": "aaa",
        "negative_1": "aaaa",
        "negative_2": "aab",
    }


def test_what_says_the_same_is_no_negative(sentences: Sentences, capsys: pytest.CaptureFixture[str]) -> None:
    query = ["a café", "A  cafe\u0301", "a tree"]
    corpus = [
        "an old café",  # a positive,
        "An old\u00a0café ",  # its copy
        "the cafés",  # the same query's other positive
        "a cafe\u0301",  # the query itself, in other bytes
        "a \u200bcafé",
        "a face",
        "A FACE",
        "facades",
        "an old tree",
    ]
    records = sentences(query, corpus, [0, 2, 8], "--k", "2")
    assert [list(record.values()) for record in records[:2]] == [
        ["a café", "an old café", "a face", "facades"],
        ["A  cafe\u0301", "the cafés", "a face", "facades"],
    ]
    assert "an old tree" not in list(records[2].values())[2:]
    assert len(sentences(query, corpus, [0, 2, 8], "--k", "4")) == 1  # only the tree has so many
    assert "1 queries with 4 negatives each; 2 had fewer and were left out" in capsys.readouterr().err


def by_hand(query: list[str], corpus: list[str], positives: list[int], k: int, skip: int) -> list[list[str]]:
    """Every cosine, looked through from the top."""
    key = mine.sentence_key
    unit = [torch.nn.functional.normalize(Letters().encode(texts).double()) for texts in (query, corpus)]
    similarity = (unit[0] @ unit[1].T).round(decimals=9)
    found = []
    for row, text in zip(similarity, query, strict=True):
        pairs = zip(query, positives, strict=True)
        seen = {key(text)} | {key(corpus[positive]) for other, positive in pairs if key(other) == key(text)}
        negatives = []
        for column in row.argsort(descending=True, stable=True).tolist():
            if key(corpus[column]) not in seen:
                seen.add(key(corpus[column]))
                negatives.append(corpus[column])
        found.append(negatives[skip : skip + k])
    return found


@pytest.mark.parametrize("seed", range(4))
def test_against_a_search_by_hand(sentences: Sentences, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(mine, "QUERIES_AT_A_TIME", 7)
    monkeypatch.setattr(mine, "MOST", 12)  # some queries have more to avoid than a search finds
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcdefghijklmnop", k=generator.randint(3, 9))) for _ in range(25)]
    forms: list[Callable[[str], str]] = [str, str.upper, str.title, lambda w: f" {w}\u00a0", lambda w: f"{w}\u200b"]

    def draw(count: int, among: list[str]) -> list[str]:
        return [generator.choice(forms)(generator.choice(among)) for _ in range(count)]

    query, corpus = draw(40, words[:6]), draw(90, words)
    positives = [generator.randrange(len(corpus)) for _ in query]
    records = sentences(query, corpus, positives, "--k", "5", "--skip", "1")
    expected = [row for row in by_hand(query, corpus, positives, 5, 1) if len(row) == 5]
    assert len(records) > 20
    key, encode = mine.sentence_key, Letters().encode
    for record, row in zip(records, expected, strict=True):
        anchor, _, *mined = record.values()
        # The similarities are the same; equal ones may come in either order after rounding.
        found, by_all = (torch.cosine_similarity(encode([anchor]), encode(texts)) for texts in (mined, row))
        torch.testing.assert_close(found, by_all, rtol=0, atol=1e-6)
        own = {key(corpus[p]) for q, p in zip(query, positives, strict=True) if key(q) == key(anchor)}
        assert len({*map(key, mined)} - own - {key(anchor)}) == 5


def test_more_positives_than_a_search_finds(sentences: Sentences, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mine, "MOST", 8)
    corpus = [f"{'a' * length}b" for length in range(1, 31)]  # from "ab" on ever nearer to "a"
    positives = list(range(10, 30))
    records = sentences(["a"] * 20, corpus, positives, "--k", "3")
    assert [record["positive"] for record in records] == corpus[10:]
    assert all(list(record.values())[2:] == [corpus[9], corpus[8], corpus[7]] for record in records)
    assert sentences(["a"] * 30, corpus, list(range(30)), "--k", "3") == []


def test_equal_rows_of_embeddings(tmp_path: Path, arrays: tuple[Path, Path]) -> None:
    """The query itself, copies of its positive, a repeated query's other positive and copies of a negative."""
    query, corpus = (np.load(path) for path in arrays)
    query[1] = query[0]
    corpus[[10, 20]] = query[0]
    corpus[[30, 40, 50]] = query[0] + 0.1 * corpus[[30, 31, 50]]
    corpus[41] = corpus[40]
    corpus[60] = corpus[61] = query[0] + 0.2 * corpus[60]
    np.save(arrays[0], query.astype(np.float64))
    np.save(arrays[1], corpus)
    positives = tmp_path / "positives.txt"
    positives.write_text("40\n50\n" + "-\n" * 5)
    records = run(tmp_path, *files(arrays), "--positives", str(positives), "--k", "2")
    assert records[0]["negatives"] == records[1]["negatives"]
    assert records[0]["negatives"][:2] == [30, 60]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "anchor,positive\na,b\n", "x.csv, line 1: expected one column, of sentences"),
        ("x.csv", "a man eats\nb\n", "x.csv, line 1: expected a heading"),
        ("x.txt", '{"text": "a"}\n', "x.txt, line 1: expected one sentence a line, but the file looks like JSON Lines"),
        ("x.jsonl", '{"text": null}\n', "x.jsonl, line 1: expected text in 'text', got null"),
        ("x.txt", "a\n\nb\n", "query: expected a sentence in each row, got an empty one, .*x.txt, line 2"),
        ("x.csv", "text\n", "query: expected sentences, got an empty file"),
    ],
)
def test_files_that_are_no_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, message: str
) -> None:
    monkeypatch.setattr(mine, "_encoder", lambda args: Letters())
    (tmp_path / name).write_text(content)
    given = ["--query", str(tmp_path / name), "--corpus", str(tmp_path / name), "--model_name_or_path", "-"]
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        mine.main([*given, "--output", str(tmp_path / "out.jsonl")])


def test_what_is_mined_is_trained_on(tmp_path: Path, sentences: Sentences) -> None:
    from hicl_fast.trainer.cli import train

    names = ["kala", "morem", "tesist", "vinour", "dary", "lopa", "senem", "moria"]
    records = sentences(names, names, [(i + 1) % 8 for i in range(8)], "--k", "3")
    assert [list(record) for record in records] == [
        ["anchor", "positive", "negative_1", "negative_2", "negative_3"]
    ] * 8
    options = {
        "max_steps": 1,
        "logging_steps": 1,
        "check_every": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 8,
    }
    given = {
        "model_name_or_path": "scratch:small",
        "train_file": tmp_path / "out.jsonl",
        "output_dir": tmp_path / "run",
        "use_cpu": True,
        **options,
    }
    train([argument for name, value in given.items() for argument in (f"--{name}", str(value))])
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["log_history"][0]["loss"] == pytest.approx(np.log(8 + 3 * 8), rel=0.2)  # as many columns, all alike


def test_what_is_mined_has_their_columns_in_order(tmp_path: Path, sentences: Sentences) -> None:
    datasets = pytest.importorskip("datasets")
    sentences(["aaa", "bb"], ["aab", "bbb", "abb", "aaaa"], [3, 1], "--k", "2")
    table = datasets.load_dataset("json", data_files=str(tmp_path / "out.jsonl"), cache_dir=str(tmp_path / "cache"))
    assert table["train"].column_names == ["anchor", "positive", "negative_1", "negative_2"]
    assert table["train"][0]["positive"] == "aaaa"


def test_a_failure_leaves_the_old_output(
    tmp_path: Path, arrays: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.jsonl").write_text("old")
    monkeypatch.setattr(mine, "_record", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, *files(arrays))
    assert (tmp_path / "out.jsonl").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_permissions(tmp_path: Path, arrays: tuple[Path, Path]) -> None:
    run(tmp_path, *files(arrays))
    (tmp_path / "plain").touch()
    assert (tmp_path / "out.jsonl").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--k", "0"], "k: expected 1 to 128, got 0"),
        (["--k", "100", "--skip", "29"], "skip: expected 0 to 28"),
        (["--max_similarity", "2"], "max_similarity: expected a cosine"),
        (["--false_negative_margin", "0.1"], "false_negative_margin: expected --positives"),
        (["--false_negative_ratio", "0.9"], "false_negative_ratio: expected --positives"),
        (["--corpus", "nowhere.npy"], "corpus: expected a file, but nowhere.npy is not there"),
        (["--output", "nowhere/out.jsonl"], "output: expected a file in a folder that is there"),
        (["--positives", "POSITIVES"], "positives: expected 7 lines, one for each query, got 2"),
        (["--positives", "WRONG"], "positives: expected a line number of the corpus, 0 to 299, or \"-\", got '300'"),
        (["--pooler_type", "max"], "pooler_type: expected one of 'cls', "),
        (["--output", "POSITIVES", "--positives", "POSITIVES"], "output: expected another file than --positives"),
        (["--corpus", "TEXT"], "corpus: expected a file of query's kind"),
        (["--query", "TEXT", "--corpus", "TEXT"], "model_name_or_path: expected an encoder"),
        (["--query", "FLAT"], r"query: expected a float64, float32 or float16 array of shape \(rows, dimensions\)"),
        (["--query", "OBJECTS"], "query: expected a .npy file of numbers"),
        (["--query", "NAN"], "query: row 2: expected finite numbers"),
        (["--corpus", "NAN", "--k", "3"], "corpus: expected finite numbers"),
        (["--query", "SHORT"], "corpus: expected rows of length 5, as query has, got 12"),
        (["--query", "FEW", "--corpus", "FEW"], r"corpus: expected at least skip \+ k = 5 candidates, got 4"),
    ],
)
def test_arguments_that_are_wrong(tmp_path: Path, arrays: tuple[Path, Path], options: list[str], message: str) -> None:
    written = {name: tmp_path / name for name in ("POSITIVES", "WRONG", "TEXT")}
    for name, text in (("POSITIVES", "1\n2\n"), ("WRONG", "1\n-\n300\n1\n1\n1\n1\n"), ("TEXT", "a\n")):
        written[name].write_text(text)
    for name, array in {
        "FLAT": np.zeros(4, np.float32),
        "OBJECTS": np.array([{}]),
        "SHORT": np.zeros((7, 5), np.float32),
        "NAN": np.where(np.arange(7)[:, None] == 2, np.nan, np.ones((7, 12))),
        "FEW": np.zeros((4, 12), np.float32),
    }.items():
        written[name] = tmp_path / f"{name}.npy"
        np.save(written[name], array, allow_pickle=True)
    given = [str(written.get(option, option)) for option in options]
    with pytest.raises(SystemExit, match=f"error: {message}"):
        mine.main([*files(arrays), "--output", str(tmp_path / "out.jsonl"), *given])
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.skipif(os.name != "posix", reason="links and pipes as POSIX has them")
def test_outputs_that_are_no_plain_files(tmp_path: Path, arrays: tuple[Path, Path]) -> None:
    """A link stays one, and a pipe or a device is not replaced by a file."""
    import threading

    expected = run(tmp_path, *files(arrays))
    (folder := tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.jsonl").rename(folder / "real.jsonl")
    (tmp_path / "out.jsonl").symlink_to(folder / "real.jsonl")
    assert run(tmp_path, *files(arrays)) == expected
    assert (tmp_path / "out.jsonl").is_symlink() and len(list(folder.iterdir())) == 1

    os.mkfifo(pipe := tmp_path / "pipe")
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.append(pipe.read_text()), daemon=True)
    reader.start()
    mine.main(["--output", str(pipe), *files(arrays)])
    reader.join(timeout=10)
    assert pipe.is_fifo() and [json.loads(line) for line in said[0].splitlines()] == expected


def test_files_are_read_before_anything_is_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mine, "_encoder", lambda args: pytest.fail("the model was opened"))
    for name, text in {
        "query": "a\nb\n",
        "corpus": "a\nb\nc\n",
        "gap": "a\n\nb\n",
        "one": "0\n",
        "ten": "0\n10\n",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    for options, words in {
        "--corpus gap --k 1": "corpus: expected a sentence in each row",
        "--corpus corpus --k 1 --positives one": "positives: expected 2 lines",
        "--corpus corpus --k 1 --positives ten": "positives: expected a line number of the corpus, 0 to 2",
        "--corpus corpus --k 4": "corpus: expected at least skip + k = 4 candidates, got 3",
    }.items():
        with pytest.raises(SystemExit):
            mine.main(f"--query query --model_name_or_path m --output out.jsonl {options}".split())
        assert capsys.readouterr().err.startswith(f"error: {words}")


def test_help_is_light() -> None:
    import subprocess
    import sys

    code = (
        "import sys, runpy; sys.argv = ['mine', '--help']\n"
        "try: runpy.run_module('hicl_fast.mine', run_name='__main__')\n"
        "except SystemExit: print('transformers' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip().endswith("False")
