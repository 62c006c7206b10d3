"""``python -m hicl_fast.evaluation``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from hicl_fast.evaluation import TASKS
from hicl_fast.evaluation.__main__ import main
from hicl_fast.trainer.scratch import write_scratch_model

START_SCORES = {  # of the two-layer start model, mean pooling, published beside the data
    "STS12": 49.93,
    "STS13": 64.67,
    "STS14": 58.14,
    "STS15": 72.96,
    "STS16": 68.80,
    "STS-B": 60.50,
    "SICK-R": 63.81,
    "STS-B dev": 69.97,
}


@pytest.fixture
def senteval(tmp_path: Path) -> Path:
    folder = tmp_path / "senteval" / "STS" / "STSBenchmark"
    folder.mkdir(parents=True)
    pairs = [("a cat sat", "a cat sat", 5), ("a cat sat", "a dog ran", 2), ("a cat sat", "the sun rose", 0)]
    rows = (f"g\tf\ty\t{index}\t{gold}\t{first}\t{second}\n" for index, (first, second, gold) in enumerate(pairs))
    (folder / "sts-test.csv").write_text("".join(rows))
    return tmp_path / "senteval"


def test_scores_are_printed_and_written(tmp_path: Path, senteval: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    write_scratch_model(["a cat sat", "a dog ran", "the sun rose"] * 3, tmp_path / "model")
    out = tmp_path / "scores.json"
    main(["--model_name_or_path", str(tmp_path / "model"), "--data_dir", str(senteval), "--json", str(out)])
    scores = json.loads(out.read_text())
    assert scores["STS-B"] > 0 and scores["STS12"] is None and scores["avg"] is None
    printed = capsys.readouterr().out
    assert f"| {scores['STS-B']:.2f} |" in printed and "missing" in printed


def test_missing_data_folder_is_one_line(tmp_path: Path) -> None:
    torch.manual_seed(0)
    write_scratch_model(["a cat sat"] * 3, tmp_path / "model")
    with pytest.raises(SystemExit, match=r"^error: data_dir: expected SentEval's folder"):
        main(["--model_name_or_path", str(tmp_path / "model"), "--data_dir", str(tmp_path / "nowhere")])


@pytest.mark.slow
def test_start_model_has_its_published_scores(data_folder: Path, tmp_path: Path) -> None:
    start = os.environ.get("HICL_FAST_START_MODEL")
    if start is None:
        pytest.skip("HICL_FAST_START_MODEL names no folder; start_model.py beside the data makes it")
    out = tmp_path / "scores.json"
    tasks = [*TASKS, "STS-B dev"]
    main(
        [
            "--model_name_or_path",
            start,
            "--data_dir",
            str(data_folder / "senteval"),
            "--json",
            str(out),
            "--tasks",
            *tasks,
        ]
    )
    scores = json.loads(out.read_text())
    assert {name: scores[name] for name in START_SCORES} == pytest.approx(START_SCORES, abs=0.02)
