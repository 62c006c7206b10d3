"""The table of training runs: what is run, what is kept, and how it is summed up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import training_table
from training_table import COLUMNS, UniformityLoss, cell, table

from hicl_fast.trainer.arguments import MethodArguments
from hicl_fast.trainer.methods import METHODS


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The trainer's arguments of every run; the scores are the number of runs so far."""
    done: list[list[str]] = []

    def score(model: Any, args: Any) -> dict[str, float]:
        return dict.fromkeys(COLUMNS, float(len(done)))

    monkeypatch.setattr(training_table, "train", done.append)
    monkeypatch.setattr(training_table, "score", score)
    monkeypatch.setattr(Path, "write_text", _write_with_folders(Path.write_text))
    return done


def _write_with_folders(write: Any) -> Any:
    def run(self: Path, text: str) -> int:
        self.parent.mkdir(parents=True, exist_ok=True)
        return write(self, text)

    return run


def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "data" / "STS").mkdir(parents=True, exist_ok=True)
    (tmp_path / "text").touch()
    folders = ["--start", "s", "--data_dir", str(tmp_path / "data"), "--train_file", str(tmp_path / "text")]
    folders += ["--output_dir", str(tmp_path)]
    return [*folders, "--methods", "simcse", "uniformity", "--seeds", "4", "7", "--", "--temp", "0.1"]


def test_runs_each_method_with_each_seed_once(
    runs: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = training_table.main(arguments(tmp_path))
    assert [run[run.index("--method") + 1] for run in runs] == ["simcse", "simcse", "uniformity", "uniformity"]
    assert [run[run.index("--seed") + 1] for run in runs] == ["4", "7"] * 2
    assert all(run[-2:] == ["--temp", "0.1"] for run in runs)
    assert "| simcse | 2 | 1.50 ± 0.71 |" in capsys.readouterr().out
    assert training_table.main(arguments(tmp_path)) == {**scores, "start": [dict.fromkeys(COLUMNS, 4.0)]}
    assert len(runs) == 4


def test_every_default_method_is_made_as_the_trainer_makes_it(runs: list[list[str]], tmp_path: Path) -> None:
    training_table.main([part for part in arguments(tmp_path) if part not in ("--methods", "simcse", "uniformity")])
    methods = {run[run.index("--method") + 1] for run in runs}
    assert methods == {"simcse", "hicl", "uniformity"}
    for name in methods:
        method = METHODS[name](MethodArguments(method=name), 7)
        assert isinstance(method.fused, torch.nn.Module) and callable(method.reference)


def test_cells() -> None:
    assert cell([80.0]) == "80.00"
    assert cell([79.0, 81.0]) == "80.00 ± 1.41"
    assert cell([80.0, None]) == "missing"


def test_columns_line_up() -> None:
    lines = table({"start": [dict.fromkeys(COLUMNS, 1.0)], "simcse": [dict.fromkeys(COLUMNS, 2.0)] * 3}).splitlines()
    assert len({line.count("|") for line in lines}) == 1


def test_uniformity_has_no_positives() -> None:
    query, key = torch.randn(2, 8), torch.randn(2, 8)
    exact = torch.nn.functional.cosine_similarity(query, key.flip(0)).mean() / 0.1
    torch.testing.assert_close(UniformityLoss(0.1)(query, key), exact)
