"""Whole runs of the trainer on made-up text, from scratch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hicl_fast.trainer import methods
from hicl_fast.trainer.checks import LossMismatch
from hicl_fast.trainer.cli import main, train

Command = Callable[..., list[str]]


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def write_sts_b(folder: Path) -> None:
    """Pairs that share all, some or none of their words."""
    pairs = [
        ("kala morem", "kala morem", 5),
        ("kala morem", "kala tesy", 3),
        ("kala morem", "vina darist", 0),
        ("seny", "lopa", 1),
    ]
    rows = "".join(
        f"g\tf\ty\t{index}\t{gold}\t{first}\t{second}\n" for index, (first, second, gold) in enumerate(pairs)
    )
    for name in ("sts-dev.csv", "sts-test.csv"):
        path = folder / "STS" / "STSBenchmark" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(rows)


def test_simcse_learns_and_logs(tmp_path: Path, sentences: Path, command: Command) -> None:
    train(command(sentences, max_steps=20, check_every=4))
    run = losses(tmp_path / "run")
    assert len(run) == 20 and sum(run[-5:]) < 0.5 * sum(run[:5])
    entry = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"][0]
    assert entry["positive_similarity"] > entry["hardest_negative_similarity"]


def test_hicl_learns_and_logs_both_levels(tmp_path: Path, paragraphs: Path, command: Command) -> None:
    train(command(paragraphs, method="hicl", segment_length=16, max_steps=20, check_every=4))
    run = losses(tmp_path / "run")
    assert sum(run[-5:]) < 0.7 * sum(run[:5])
    entry = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"][0]
    assert entry["loss"] == pytest.approx(0.3 * entry["local"] + 0.7 * entry["global"], rel=1e-4)


def test_hicl_on_one_segment_documents_is_simcse(tmp_path: Path, sentences: Path, command: Command) -> None:
    train(command(sentences, "simcse", max_seq_length=32))
    train(command(sentences, "hicl", method="hicl", max_seq_length=32, segment_length=32))
    assert losses(tmp_path / "simcse") == pytest.approx(losses(tmp_path / "hicl"), rel=1e-3)


@pytest.mark.parametrize("method", ["hncse-hnm", "hncse-pm", "hncse", "hicl+hncse"])
def test_mixing_learns(tmp_path: Path, sentences: Path, command: Command, method: str) -> None:
    train(command(sentences, method=method, max_steps=20, check_every=2, max_seq_length=32))
    run = losses(tmp_path / "run")
    assert len(run) == 20 and sum(run[-5:]) < 0.7 * sum(run[:5])


def test_hard_negatives_of_a_csv(tmp_path: Path, sentences: Path, command: Command) -> None:
    documents = sentences.read_text().splitlines()
    rows = (",".join(documents[index : index + 3]) for index in range(0, 150, 3))
    table = tmp_path / "pairs.csv"
    table.write_text("sent0,sent1,hard_neg\n" + "\n".join(rows) + "\n")
    train(command(table, "plain", check_every=1))
    train(command(table, "weighted", check_every=1, hard_negative_weight=2.0))
    assert losses(tmp_path / "weighted")[0] > losses(tmp_path / "plain")[0] + 0.1


def test_accumulated_batches_are_averaged(tmp_path: Path, sentences: Path, command: Command) -> None:
    train(command(sentences, "one", max_steps=1, learning_rate=1e-9))
    train(command(sentences, "four", max_steps=1, learning_rate=1e-9, gradient_accumulation_steps=4))
    assert losses(tmp_path / "four")[0] == pytest.approx(
        losses(tmp_path / "one")[0], rel=0.5
    )  # a sum would be 4 times it


def test_frozen_word_embeddings_stay(tmp_path: Path, sentences: Path, command: Command) -> None:
    from safetensors.torch import load_file

    train(command(sentences, freeze_word_embeddings=True))
    before = load_file(tmp_path / "run" / "scratch" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model.safetensors")
    assert torch.equal(before["embeddings.word_embeddings.weight"], after["embeddings.word_embeddings.weight"])
    assert not torch.equal(
        before["embeddings.position_embeddings.weight"], after["embeddings.position_embeddings.weight"]
    )


class WrongLoss(methods.SimCSE):
    """SimCSE with a planted error of one part in a thousand."""

    def loss(self, views: methods.Views) -> Tensor:
        return 1.001 * super().loss(views)


def test_check_every_stops_a_wrong_loss(sentences: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.METHODS, "wrong", WrongLoss)
    arguments = command(sentences, method="wrong")
    train(arguments)
    with pytest.raises(LossMismatch, match=r"step 0: the fused loss differs .* \(0\.10% of"):
        train([*arguments, "--check_every", "2"])
    with pytest.raises(SystemExit, match="^error: step 0: the fused loss differs"):
        main([*arguments, "--check_every", "2"])


@pytest.mark.parametrize("options", [{}, {"check_every": 1}], ids=["unchecked", "checked"])
def test_divergence_ends_a_run_and_says_so(
    tmp_path: Path, sentences: Path, command: Command, options: dict[str, object]
) -> None:
    with pytest.raises(SystemExit, match=r"^error: step 1: the model diverged: the loss is nan.*rate is 1e\+09") as end:
        main(command(sentences, learning_rate=1e9, **options))
    assert end.value.code == 1
    assert not list((tmp_path / "run").glob("checkpoint-*")), "what led there is nothing to go on from"


def test_evaluation_during_and_after_training(
    tmp_path: Path, sentences: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sts_b(tmp_path / "senteval")
    options = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    scores = train(command(sentences, data_dir=tmp_path / "senteval", eval_steps=2, **options))
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    dev = [entry["eval_stsb_spearman"] for entry in history["log_history"] if "eval_stsb_spearman" in entry]
    assert len(dev) == 3 and history["best_metric"] == max(dev)
    assert scores["STS-B"] == pytest.approx(max(dev), abs=1e-3)  # the same pairs, the best model
    assert json.loads((tmp_path / "run" / "sts_scores.json").read_text())["STS12"] is None
    assert "missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "simcs"}, "method: expected one of simcse, hncse-hnm, "),
        ({"method": "hncse-pm", "positive_weights": "1"}, "positive_weights: expected two numbers"),
        ({"bank": "last"}, "bank: expected one of batch, previous"),
        ({"pooler_type": "max"}, "pooler_type: expected one of cls"),
        ({"mlp_only_train": True}, "mlp_only_train: expected --pooler_type cls"),
        ({"max_seq_length": 513}, "max_seq_length: expected 3 to 512 tokens, .* got 513"),
        ({"method": "hicl", "segment_length": 2}, "segment_length: expected 3 to 512 tokens, .* got 2"),
        (
            {"method": "hicl", "max_seq_length": 16},
            "max_seq_length: expected at least one segment of 32 tokens, got 16",
        ),
        ({"model_name_or_path": "scratch:huge"}, "model_name_or_path: expected scratch:small"),
        ({"eval_steps": 2}, "data_dir: expected SentEval's data folder, .* got none"),
        ({"eval_on_start": True}, "eval_on_start: expected with --eval_strategy steps or epoch"),
        ({"metric_for_best_model": "accuracy"}, "metric_for_best_model: expected stsb_spearman"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy: expected random or sequential"),
        ({"accelerator_config": '{"wrong": 1}'}, ".* 'wrong'"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size: expected at least 2"),
        (
            {"per_device_train_batch_size": 500, "dataloader_drop_last": True},
            "dataloader_drop_last: expected at least one whole batch of 500 rows, got 160",
        ),
        ({"train_file": "nowhere.txt"}, r"train_file: .*nowhere\.txt does not exist"),
    ],
)
def test_wrong_arguments_are_named(sentences: Path, command: Command, options: dict[str, object], message: str) -> None:
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        main(command(sentences, **options))


def test_a_refused_run_deletes_nothing(tmp_path: Path, sentences: Path, command: Command) -> None:
    kept = tmp_path / "run" / "checkpoint-3" / "model.safetensors"
    kept.parent.mkdir(parents=True)
    kept.touch()
    (tmp_path / "no_model").mkdir()
    for options in ({"model_name_or_path": tmp_path / "no_model"}, {"max_seq_length": 513}):
        with pytest.raises(SystemExit):
            main(command(sentences, overwrite_output_dir=True, **options))
        assert kept.exists()


def test_what_went_wrong_begins_a_line(sentences: Path, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(command(sentences, learning_rate=1e9, disable_tqdm=False))
    assert "\nerror: step 1: the model diverged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "columns", "message"),
    [
        ({"method": "hicl"}, 2, "train_file: --method hicl expects documents only, got 2 columns"),
        ({"method": "paradigm"}, 3, "train_file: --method paradigm expects sentences, or pairs of them, got 3 columns"),
        ({"hard_negative_weight": 1.0}, 4, "hard_negative_weight: expected 0 with several hard negatives a row"),
    ],
)
def test_no_column_is_ignored(
    tmp_path: Path, command: Command, options: dict[str, object], columns: int, message: str
) -> None:
    table = tmp_path / "pairs.tsv"
    names = ["anchor", "positive", "negative_1", "negative_2"][:columns]
    table.write_text("\t".join(names) + "\n" + "\t".join(["kala"] * columns) + "\n")
    with pytest.raises(ValueError, match=message):
        train(command(table, **options))


def test_several_hard_negatives(tmp_path: Path, sentences: Path, command: Command) -> None:
    """Each of them is a negative of every row: a second copy of the first is counted twice."""
    documents = sentences.read_text().splitlines()
    for name, number in (("one", 1), ("two", 2)):
        negatives = {f"negative_{i}": "kala morem" for i in range(1, number + 1)}
        records = [{"anchor": d, "positive": d, **negatives} for d in documents[:16]]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        train(command(tmp_path / f"{name}.jsonl", name, check_every=1, max_steps=1))
    assert losses(tmp_path / "two")[0] > losses(tmp_path / "one")[0]


def start(arguments: list[str], cwd: Path) -> subprocess.Popen[bytes]:
    # In a folder of its own, so that nothing but what is installed can be imported.
    program = [sys.executable, "-m", "hicl_fast.trainer", *arguments]
    return subprocess.Popen(program, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "simcse"},
        {"method": "hicl+hncse", "bank": "previous", "queue_size": 300},  # still half full at the checkpoint
    ],
    ids=lambda options: options["method"],
)
def test_killed_run_resumes_to_the_same_losses(
    tmp_path: Path, sentences: Path, command: Command, options: dict[str, object]
) -> None:
    settings = {**options, "max_steps": 24, "save_strategy": "steps", "save_steps": 4, "check_every": 8}
    train(command(sentences, "whole", **settings))

    process = start(command(sentences, "killed", **settings), tmp_path)
    killed = tmp_path / "killed"
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint-8").is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    assert not (killed / "trainer_state.json").exists()  # it had not finished

    train(command(sentences, "killed", **settings, resume_from_checkpoint="last"))
    assert losses(killed) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_train_together(tmp_path: Path, sentences: Path, command: Command) -> None:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "hicl_fast.trainer",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *command(sentences)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == 6
