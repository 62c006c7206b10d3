"""A run that fails or is stopped leaves what it has trained, and goes on from there as if nothing had happened."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from hicl_fast.trainer import methods
from hicl_fast.trainer.checkpoints import missing_from
from hicl_fast.trainer.cli import main, train

Command = Callable[..., list[str]]
SETTINGS = {"method": "hncse", "bank": "previous", "queue_size": 60, "max_steps": 9, "logging_steps": 1}


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], Any]], None]:
    """Makes HNCSE do something in a step, after its loss has been computed."""

    def arrange(step: int, act: Callable[[], Any]) -> None:
        class Acting(methods.HNCSE):
            calls = 0

            def loss(self, views: methods.Views) -> Tensor:
                value = super().loss(views)
                self.calls += 1
                if self.calls == step:
                    act()
                return value

        monkeypatch.setitem(methods.METHODS, "hncse", Acting)

    return arrange


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("no more")


def stop(number: int) -> Callable[[], None]:
    return lambda: signal.raise_signal(number)


@pytest.mark.parametrize(
    ("act", "completed", "code"),
    [
        (out_of_memory, 4, None),
        (stop(signal.SIGINT), 5, 130),
        (stop(signal.SIGTERM), 5, 143),
        (lambda: (stop(signal.SIGINT)(), stop(signal.SIGINT)()), 4, 130),
    ],
    ids=["fails", "Ctrl-C", "SIGTERM", "Ctrl-C twice"],
)
def test_what_was_trained_is_saved_and_gone_on_from(
    tmp_path: Path,
    sentences: Path,
    command: Command,
    at_step: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    act: Callable[[], Any],
    completed: int,
    code: int | None,
) -> None:
    """Without a single checkpoint being asked for; the failed step's draws are drawn again."""
    train(command(sentences, "whole", **SETTINGS))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context():
        at_step(5, act)
        with pytest.raises(torch.OutOfMemoryError if code is None else SystemExit) as raised:
            main(command(sentences, "cut", **SETTINGS))
    assert code is None or raised.value.code == code
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    folder = tmp_path / "cut" / f"checkpoint-{completed}"
    assert missing_from(folder) is None and not list((tmp_path / "cut").glob(".*"))
    assert f"{completed} steps of training are saved in {folder}" in caplog.text
    assert AutoModel.from_pretrained(folder).config.hidden_size == 256

    monkeypatch.setitem(methods.METHODS, "hncse", methods.HNCSE)
    train(command(sentences, "cut", **SETTINGS, resume_from_checkpoint="last"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_nothing_is_saved_of_half_an_update(
    tmp_path: Path, sentences: Path, command: Command, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step, calls = torch.optim.AdamW.step, 0

    def interrupted(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("in between")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(RuntimeError, match="in between"):
        train(command(sentences, max_steps=3))
    assert not list((tmp_path / "run").glob("checkpoint-*")) and "in the middle of an update" in caplog.text


def test_nothing_to_save_is_said(
    tmp_path: Path, sentences: Path, command: Command, at_step: Any, caplog: pytest.LogCaptureFixture
) -> None:
    at_step(1, out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        train(command(sentences, **SETTINGS))
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert "no step has been completed since the start" in caplog.text


def test_a_failure_to_save_hides_nothing(
    sentences: Path, command: Command, at_step: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    at_step(2, out_of_memory)
    monkeypatch.setattr("transformers.Trainer._save_optimizer_and_scheduler", full)
    with pytest.raises(torch.OutOfMemoryError):
        train(command(sentences, **SETTINGS))
    assert "saving what was trained failed: No space left on device" in caplog.text


@pytest.mark.parametrize("method", ["simcse", "hncse", "hncse-hnm", "hncse-pm", "hicl", "hicl+hncse", "paradigm"])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_last_batch_of_an_epoch_may_be_small(
    tmp_path: Path, sentences: Path, command: Command, method: str, rows: int
) -> None:
    """With every default of the method."""
    few = tmp_path / "few.txt"
    few.write_text("\n".join(sentences.read_text().splitlines()[: 16 + rows]) + "\n")
    train(command(few, method=method, max_steps=-1, num_train_epochs=1, check_every=1))
    assert len(losses(tmp_path / "run")) == 2
    assert "NaN" not in (tmp_path / "run" / "trainer_state.json").read_text()
