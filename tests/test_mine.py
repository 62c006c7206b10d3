"""``python -m hicl_fast.mine``."""

from __future__ import annotations

import json
import os
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


def test_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    query, corpus, positives = (tmp_path / name for name in ("query.txt", "corpus.txt", "positives.txt"))
    query.write_text("aaa\nbbé\n", encoding="utf-8")
    corpus.write_text("aab\nbbb\nabb\naaaa\n")
    positives.write_text("3\n-\n")

    class Letters:
        def encode(self, texts: list[str]) -> torch.Tensor:
            return torch.tensor([[text.count("a"), text.count("b")] for text in texts], dtype=torch.float32)

    monkeypatch.setattr(mine, "_encoder", lambda args: Letters())
    options = ["--query", str(query), "--corpus", str(corpus), "--model_name_or_path", "letters", "--k", "2"]
    assert run(tmp_path, *options, "--positives", str(positives)) == [
        {"anchor": "aaa", "positive": "aaaa", "negative_1": "aab", "negative_2": "abb"},
        {"anchor": "bbé", "positive": None, "negative_1": "bbb", "negative_2": "abb"},
    ]
    assert run(tmp_path, *options)[0] == {"anchor": "aaa", "negative_1": "aaaa", "negative_2": "aab"}


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
        (["--corpus", "nowhere.npy"], "corpus: expected a file, but nowhere.npy is not there"),
        (["--output", "nowhere/out.jsonl"], "output: expected a file in a folder that is there"),
        (["--positives", "POSITIVES"], "positives: expected 7 lines, one for each query, got 2"),
        (["--positives", "WRONG"], "positives: expected a line number of the corpus, 0 to 299, or \"-\", got '300'"),
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
