"""Options that can't be had are refused before anything is measured."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import hard_negatives
import loss_throughput
import paradigm
import pytest
import segment_pool
import training_table

MEASURING = (loss_throughput, hard_negatives, paradigm)


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (*MEASURING, segment_pool):
        monkeypatch.setattr(module, "machine", lambda *_: pytest.fail("it went on"))
    monkeypatch.setattr(training_table, "score", lambda *_: pytest.fail("it went on"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").touch()
    (tmp_path / "data" / "STS").mkdir(parents=True)


def check(module: ModuleType, arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        module.main(arguments.split())
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.splitlines()[-1].startswith(f"error: {words}") and len(said) < 1000, said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--dim 0", "dim: expected a whole number, at least 1, got 0"),
        ("--device gpu", "device: expected cpu, "),
        ("--seconds nan", "seconds: expected a finite number, got nan"),
        ("--seconds 0", "seconds: expected a number above 0, got 0.0"),
        ("--backends fortran", "backends: invalid choice: 'fortran'"),
        ("--json nowhere/out.json", "json: expected a file in a folder that is there, got nowhere/out.json"),
        ("--json data", "json: expected a file, but data is a folder"),
    ],
)
def test_what_all_have(capsys: pytest.CaptureFixture[str], options: str, words: str) -> None:
    for module in (*MEASURING, segment_pool):
        check(module, options, words, capsys)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--batch-sizes -5", "batch-sizes: expected a whole number, at least "),
        ("--batch-sizes many", "batch-sizes: expected a whole number, at least "),
        ("--threads 0", "threads: expected a whole number, at least 1, got 0"),
        ("--plot nowhere/out.png", "plot: expected a file in a folder that is there"),
    ],
)
def test_what_three_have(capsys: pytest.CaptureFixture[str], options: str, words: str) -> None:
    for module in MEASURING:
        check(module, options, words, capsys)


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (loss_throughput, "--temperature -1", "temperature: expected a number above 0, got -1.0"),
        (loss_throughput, "--rivals all", "rivals: expected none or some of"),
        (hard_negatives, "-k 1", "k: expected a whole number from 2 to 128, got 1"),
        (hard_negatives, "-k 64 --batch-sizes 64", "k: expected at most 63, a row's negatives, got 64"),
        (hard_negatives, "--backends cuda", "backend 'cuda' can't run hard_negatives here"),
        (paradigm, "--objectives mhe+q", "objectives: mhe+q: "),
        (segment_pool, "--num-segments 0", "num-segments: expected a whole number, at least 8, got 0"),
    ],
)
def test_what_one_has(capsys: pytest.CaptureFixture[str], module: ModuleType, options: str, words: str) -> None:
    check(module, options, words, capsys)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--seeds -1", "seeds: expected a whole number, at least 0, got -1"),
        ("--train_file nowhere", "train_file: expected a file, but nowhere is not there"),
        ("--output_dir text", "output_dir: expected a folder, but "),
        ("--pooler_type median", "pooler_type: invalid choice: 'median'"),
        ("--methods simcse -- --objective met", "objective: expected with --method paradigm"),
        ("--methods uniformity -- --num_mixed 3", "num_mixed: expected with --method hncse-hnm"),
        ("-- --temp 0", "temp: expected a number above 0, got 0.0"),
    ],
)
def test_training_table(capsys: pytest.CaptureFixture[str], options: str, words: str) -> None:
    check(training_table, f"--start s --data_dir data --train_file text --output_dir runs {options}", words, capsys)
