"""The gradient paradigm in the trainer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hicl_fast.trainer.arguments import MethodArguments
from hicl_fast.trainer.cli import train
from hicl_fast.trainer.paradigm import GradientParadigm, settings_of

Command = Callable[..., list[str]]


def history(folder: Path) -> list[dict[str, float]]:
    entries = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in entries if "loss" in entry]


def test_a_hinge_learns_and_logs_its_gradient(tmp_path: Path, sentences: Path, command: Command) -> None:
    options = {"method": "paradigm", "objective": "met", "log_gradient_terms": True}
    train(command(sentences, **options, max_steps=20, check_every=4))
    run = history(tmp_path)
    assert sum(entry["loss"] for entry in run[-5:]) < 0.7 * sum(entry["loss"] for entry in run[:5])
    assert run[-1]["dissipation"] < run[0]["dissipation"] <= 1
    assert run[0]["hardest_share"] == 1 and run[0]["weight_entropy"] == 0


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "vicreg", "modified": "gd,w,r"},
        {"objective": "custom", "weight": "power:3", "dissipation": "0.3", "ratio": "met"},
    ],
)
def test_others_pass_the_check(tmp_path: Path, sentences: Path, command: Command, options: dict[str, Any]) -> None:
    train(command(sentences, method="paradigm", **options, max_steps=6, check_every=1))
    run = history(tmp_path)
    assert run[-1]["hardest_negative_similarity"] < run[0]["hardest_negative_similarity"]


def test_options() -> None:
    assert settings_of(MethodArguments(objective="mhe", modified="r,gd"))["ratio"] == 1.75
    assert settings_of(MethodArguments(objective="mhe", modified="gd"))["ratio"] == 1.0
    settings = settings_of(MethodArguments(objective="custom", weight="power:2", dissipation="none", ratio="1.25"))
    assert settings["weight"] == ("power", 2.0) and settings["dissipation"] is None and settings["ratio"] == 1.25
    with pytest.raises(ValueError, match="objective: expected one of info_nce"):
        MethodArguments(objective="simclr")
    with pytest.raises(ValueError, match="modified: expected one of 'gd', 'w', 'r', got 'q'"):
        GradientParadigm(MethodArguments(objective="mhe", modified="q"))
    with pytest.raises(ValueError, match="gather: expected none or all"):
        GradientParadigm(MethodArguments(gather="ring"))
