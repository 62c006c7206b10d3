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
from transformers import AutoModel, BertConfig, BertModel

from hicl_fast.ops.paradigm.settings import OBJECTIVES
from hicl_fast.trainer import methods, scratch
from hicl_fast.trainer.arguments import MethodArguments
from hicl_fast.trainer.checkpoints import missing_from
from hicl_fast.trainer.checks import check_loss
from hicl_fast.trainer.cli import keeps_keys, main, train
from tests.trainer.conftest import make_documents

Command = Callable[..., list[str]]
SETTINGS = {"method": "hncse", "bank": "previous", "queue_size": 60, "max_steps": 6, "logging_steps": 1}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The argument that names a model of one small layer."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = scratch.train_tokenizer(make_documents(50, (3, 12)))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return {"model_name_or_path": folder}


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


CUTS = {
    "fails": (out_of_memory, 2, None),
    "SIGTERM": (stop(signal.SIGTERM), 3, 143),
    "Ctrl-C twice": (lambda: (stop(signal.SIGINT)(), stop(signal.SIGINT)()), 2, 130),
}


def test_what_was_trained_is_saved_and_gone_on_from(
    tmp_path: Path,
    tiny: dict[str, Any],
    sentences: Path,
    command: Command,
    at_step: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without a single checkpoint being asked for; the failed step's draws are drawn again."""
    settings = {**SETTINGS, **tiny}
    train(command(sentences, "whole", **settings))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for name, (act, completed, code) in CUTS.items():
        at_step(3, act)
        with pytest.raises(torch.OutOfMemoryError if code is None else SystemExit) as raised:
            main(command(sentences, name, **settings))
        assert code is None or raised.value.code == code
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
        folder = tmp_path / name / f"checkpoint-{completed}"
        assert missing_from(folder) is None and not list((tmp_path / name).glob(".*"))
        assert f"{completed} steps of training are saved in {folder}" in caplog.text
        assert AutoModel.from_pretrained(folder).config.hidden_size == 32

        monkeypatch.setitem(methods.METHODS, "hncse", methods.HNCSE)
        train(command(sentences, name, **settings, resume_from_checkpoint="last"))
        assert losses(tmp_path / name) == losses(tmp_path / "whole"), name


def test_nothing_is_saved_of_half_an_update(
    tmp_path: Path,
    tiny: dict[str, Any],
    sentences: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
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
        train(command(sentences, max_steps=3, **tiny))
    assert not list((tmp_path / "run").glob("checkpoint-*")) and "in the middle of an update" in caplog.text


def test_nothing_to_save_is_said(
    tmp_path: Path,
    tiny: dict[str, Any],
    sentences: Path,
    command: Command,
    at_step: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    at_step(1, out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        train(command(sentences, **SETTINGS, **tiny))
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert "no step has been completed since the start" in caplog.text


def test_a_failure_to_save_hides_nothing(
    tiny: dict[str, Any],
    sentences: Path,
    command: Command,
    at_step: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    at_step(2, out_of_memory)
    monkeypatch.setattr("transformers.Trainer._save_optimizer_and_scheduler", full)
    with pytest.raises(torch.OutOfMemoryError):
        train(command(sentences, **SETTINGS, **tiny))
    assert "saving what was trained failed: No space left on device" in caplog.text


@pytest.mark.parametrize("method", ["hncse", "hicl+hncse", "paradigm"])
def test_the_last_batch_of_an_epoch_may_be_a_single_row(
    tmp_path: Path, tiny: dict[str, Any], sentences: Path, command: Command, method: str
) -> None:
    """With every default of the method."""
    few = tmp_path / "few.txt"
    few.write_text("\n".join(sentences.read_text().splitlines()[:17]) + "\n")
    train(command(few, method=method, max_steps=-1, num_train_epochs=1, check_every=1, **tiny))
    assert len(losses(tmp_path / "run")) == 2
    assert "NaN" not in (tmp_path / "run" / "trainer_state.json").read_text()


@pytest.mark.parametrize(
    "options",
    [
        *({"method": method} for method in methods.METHODS),
        *({"method": method, "bank": "previous"} for method in ("hncse", "hicl+hncse")),
        *({"method": "paradigm", "objective": objective} for objective in OBJECTIVES),
    ],
    ids=lambda options: " ".join(options.values()),
)
def test_every_method_trains_on_any_batch(options: dict[str, Any]) -> None:
    made = methods.METHODS[options["method"]](MethodArguments(**options))
    for n in (24, 11, 10, 3, 2, 1):
        rows = torch.randn(2, n, 8).requires_grad_()
        groups = torch.arange(n) // 2 if keeps_keys(made.fused) else None
        views = methods.Views(rows[0], rows[1], None, torch.arange(n + 1), torch.full((n,), 5), groups)
        loss = made.loss(views)
        check_loss(loss, rows, lambda x: made.reference(views._replace(anchor=x[0], positive=x[1])), n)  # noqa: B023
        assert all(torch.isfinite(value) for value in made.fused.last.values())
