"""What the commands say of options that can't be had: a line on standard error, before they work, and no traceback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hicl_fast import _command, info, mine
from hicl_fast.analysis import __main__ as analysis
from hicl_fast.evaluation import __main__ as evaluation
from hicl_fast.trainer import cli
from hicl_fast.trainer.arguments import MethodArguments
from hicl_fast.trainer.methods import METHODS
from hicl_fast.trainer.model import load_encoder, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
LONG = "x" * 5000


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With data of the right kinds, where the options are the only thing that is wrong; nothing may be opened."""
    (tmp_path / "text").write_text("kala\nmorem\nvina\n")
    (tmp_path / "one").write_text("kala\n")
    (tmp_path / "senteval" / "STS").mkdir(parents=True)
    np.save(tmp_path / "u.npy", np.ones((200, 4), np.float32))
    monkeypatch.chdir(tmp_path)

    def opened(*_: Any, **__: Any) -> None:
        pytest.fail("a model was opened, or numbers were crunched, before the options were checked")

    monkeypatch.setattr(cli, "load_tokenizer", opened)
    monkeypatch.setattr(cli.scratch, "write_scratch_model", opened)
    monkeypatch.setattr(evaluation.SentenceEncoder, "from_pretrained", opened)
    monkeypatch.setattr(mine, "mine", opened)
    monkeypatch.setattr(analysis, "dissipations", opened)
    return tmp_path


def refusal(main: Callable[[list[str]], Any], arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, int]:
    """What a command says last, and its exit status."""
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    said = capsys.readouterr().err
    assert "Traceback" not in said and len(said) < 1000, said[:3000]
    assert isinstance(end.value.code, int)
    return said.splitlines()[-1], end.value.code


TRAINER = "--model_name_or_path scratch:small --train_file text --output_dir out --use_cpu True "


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--max_train_samples -5", "max_train_samples: expected a whole number, at least 2, got -5"),
        ("--max_train_samples many", "max_train_samples: invalid int value: 'many'"),
        ("--max_seq_length 0", "max_seq_length: expected a whole number, at least 1, got 0"),
        ("--num_train_epochs 0", "num_train_epochs: expected a number above 0, got 0.0"),
        ("--num_train_epochs nan", "num_train_epochs: expected a finite number, got nan"),
        ("--max_steps -7", "max_steps: expected a whole number, at least 1, got -7"),
        ("--per_device_train_batch_size 0", "per_device_train_batch_size: expected a whole number, at least 1, got 0"),
        ("--gradient_accumulation_steps 0", "gradient_accumulation_steps: expected a whole number, at least 1, got 0"),
        ("--learning_rate -1", "learning_rate: expected a number of at least 0, got -1.0"),
        ("--learning_rate inf", "learning_rate: expected a finite number, got inf"),
        ("--weight_decay -1", "weight_decay: expected a number of at least 0"),
        ("--seed -1", "seed: expected a whole number from 0 to 4294967295, got -1"),
        ("--temp 0", "temp: expected a number above 0, got 0.0"),
        ("--temp nan", "temp: expected a finite number, got nan"),
        ("--check_every -1", "check_every: expected a whole number, at least 0, got -1"),
        ("--gradient_cache_chunk_size -1", "gradient_cache_chunk_size: expected a whole number, at least 0, got -1"),
        ("--backend cudaa", "backend: expected 'auto' or one of 'torch', 'cpp', 'triton', 'cuda', got 'cudaa'"),
        ("--backend cuda", "backend 'cuda' can't run info_nce here: "),
        ("--report_to nowhere", "report_to: expected one that is installed, none, all"),
        ("--gather some", "gather: expected one of none, all, ring, got 'some'"),
        ("--pooler_type median", "pooler_type: expected one of cls, "),
        (
            "--objective met",
            "objective: expected with --method paradigm, which alone make use of it, got it with --meth",
        ),
        ("--objective info_nce", "objective: expected with --method paradigm"),
        ("--local_weight 0.5", "local_weight: expected with --method hicl or hicl+hncse"),
        ("--segment-length 64", "segment_length: expected with --method hicl or hicl+hncse"),
        (
            "--method hicl --hard_negative_weight 1",
            "hard_negative_weight: expected with --method simcse or hncse-hnm or",
        ),
        ("--method paradigm --hard_negative_weight 1", "hard_negative_weight: expected with --method simcse"),
        ("--method hncse-pm --num_mixed 4", "num_mixed: expected with --method hncse-hnm or hncse or hicl+hncse"),
        ("--method hncse-hnm --positive_weights search", "positive_weights: expected with --method hncse-pm or"),
        ("--method hncse --queue_size 64", "queue_size: expected with --bank previous, got it with --bank batch"),
        ("--method hncse --num_hard_negatives 1", "num_hard_negatives: expected a whole number from 2 to 128, got 1"),
        ("--method hncse --mixing_alpha 1.5", "mixing_alpha: expected a number from 0 to 1, got 1.5"),
        ("--method hncse --positive_weights 1,nan", "positive_weights: expected a finite number, got nan"),
        (f"--method hncse --positive_weights {LONG}", "positive_weights: expected two numbers, as 1.0,0.1, or search"),
        ("--method hncse --positive_threshold -1", "positive_threshold: expected a number of at least 0, got -1.0"),
        ("--method hicl --local_weight 2", "local_weight: expected at most 1 where global_weight"),
        ("--method hicl --local_weight -1", "local_weight: expected a number of at least 0, got -1.0"),
        ("--method hicl --local_weight 0 --global_weight 0", "global_weight: expected a number above 0 where"),
        ("--method hicl --max_seq_length 16", "max_seq_length: expected at least one segment of 32 tokens, got 16"),
        ("--method paradigm --dissipation none", "dissipation: expected the default with 'info_nce', got None"),
        ("--method paradigm --weight uniform", "weight: expected the default with 'info_nce', got 'uniform'"),
        ("--method paradigm --objective custom --weight power:x", "weight: expected a number, got 'x'"),
        ("--method paradigm --objective arccon --paradigm_margin 4", "paradigm_margin: expected an angle"),
        ("--method paradigm --strength 2", "strength: expected 1.0 with 'info_nce', got 2.0"),
        ("--method paradigm --gather ring", "gather: expected none or all with --method paradigm"),
        ("--train_file one", "train_file: expected at least two rows"),
        ("--train_file nowhere", "train_file: expected "),
        ("--hard_negative_weight 1", "hard_negative_weight: expected 0 where rows have no hard negative, got 1.0"),
        ("--output_dir text", "output_dir: expected a folder, but "),
        ("--output_dir text/run", "output_dir: expected a folder, but "),
        ("--data_dir nowhere", "data_dir: expected SentEval's folder"),
        ("--eval_steps 5", "data_dir: expected SentEval's data folder"),
        ("--model_name_or_path scratch:huge", "model_name_or_path: expected scratch:small"),
        (f"--model_name_or_path scratch:{LONG}", "model_name_or_path: expected scratch:small"),
        (f"--method {LONG}", "method: expected one of simcse, "),
        (f"--mehtod {LONG}", "unrecognized arguments: --mehtod xxx"),
        (f"--max_steps {LONG}", "max_steps: invalid int value: 'xxx"),
    ],
)
def test_trainer(folder: Path, capsys: pytest.CaptureFixture[str], options: str, words: str) -> None:
    said, code = refusal(cli.main, TRAINER + options, capsys)
    assert said.startswith(f"error: {words}") and code in (1, 2), said
    assert code == 2 or words.startswith(("train_file", "data_dir: expected SentEval's folder", "hard_negative_weight"))
    assert not (folder / "out").exists()


def test_every_methods_own_options_are_taken(folder: Path) -> None:
    given = {
        "pairs": "--hard_negative_weight 0",
        "segments": "--segment_length 32 --local_weight 0.4 --same_sequence negative",
        "mixed negatives": "--num_mixed 3 --bank previous --queue_size 9",
        "mixed positives": "--positive_threshold 0.2 --positive_weights search",
        "paradigm": "--objective vicreg --modified gd --strength 2 --paradigm_margin 0.2",
    }
    for name, method in METHODS.items():
        options = " ".join(given[group] for group in method.options)
        assert cli.parse(f"{TRAINER} --method {name} {options}".split()).method.method == name
    groups = {field.metadata["of"] for field in MethodArguments.__dataclass_fields__.values()} - {None}
    assert groups == set(given)


MINE = "--query u.npy --corpus u.npy --output out.jsonl "
EVALUATION = "--model_name_or_path m --data_dir senteval "
ANALYSIS = "--output_dir figures "


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (
            mine.main,
            MINE + "--device gpu",
            "device: expected cpu, cuda, cuda:1 or another device that PyTorch has here, got 'g",
        ),
        (mine.main, MINE + "--device meta", "device: expected cpu, "),
        (mine.main, MINE + f"--device {LONG}", "device: expected cpu, "),
        (mine.main, MINE + "--backend fortran", "backend: expected 'auto' or one of"),
        (mine.main, MINE + "--backend cuda", "backend 'cuda' can't run hard_negatives here"),
        (mine.main, MINE + "--batch_size 0", "batch_size: expected a whole number, at least 1, got 0"),
        (mine.main, MINE + "--max_seq_length x", "max_seq_length: expected a whole number, at least 1, got 'x' (str)"),
        (mine.main, MINE + "--k 0", "k: expected 1 to 128, got 0"),
        (mine.main, MINE + "--max_similarity nan", "max_similarity: expected a cosine"),
        (mine.main, MINE + "--output senteval", "output: expected a file, but senteval is a folder"),
        (mine.main, MINE + "--output nowhere/out", "output: expected a file in a folder that is there"),
        (mine.main, "--query u.npy", "the following arguments are required: --corpus, --output"),
        (evaluation.main, EVALUATION + "--device gpu", "device: expected cpu, "),
        (evaluation.main, EVALUATION + "--batch_size -1", "batch_size: expected a whole number, at least 1, got -1"),
        (evaluation.main, EVALUATION + "--segment_length 0", "segment_length: expected a whole number, at least 1"),
        (evaluation.main, EVALUATION + "--json nowhere/x.json", "json: expected a file in a folder that is there"),
        (evaluation.main, EVALUATION + "--tasks STS11", "tasks: invalid choice: 'STS11'"),
        (evaluation.main, EVALUATION + "--data_dir nowhere", "data_dir: expected SentEval's folder"),
        (analysis.main, ANALYSIS + "--grid 1", "grid: expected a whole number, at least 2, got 1"),
        (analysis.main, ANALYSIS + "--seed -1", "seed: expected a whole number, at least 0, got -1"),
        (analysis.main, ANALYSIS + "--output_dir text", "output_dir: expected a folder, but "),
        (
            analysis.main,
            ANALYSIS + "--embeddings u.npy nowhere.npy",
            "embeddings: expected a file, but nowhere.npy is not",
        ),
        (analysis.main, ANALYSIS + "--embeddings u.npy text", "embeddings: expected a .npy file of numbers, got text"),
        (analysis.main, ANALYSIS + "--model m", "text: expected with --model and only with it"),
        (analysis.main, ANALYSIS + "--model m --text nowhere", "text: expected a file, but nowhere is not there"),
        (info.main, "--jsn", "unrecognized arguments: --jsn"),
    ],
)
def test_others(folder: Path, capsys: pytest.CaptureFixture[str], main: Any, arguments: str, words: str) -> None:
    said, code = refusal(main, arguments, capsys)
    assert said.startswith(f"error: {words}") and code in (1, 2), said
    assert code == 2 or "SentEval" in words or "npy file of numbers" in words
    assert sorted(path.name for path in folder.iterdir()) == ["one", "senteval", "text", "u.npy"]


def test_exit_codes_and_what_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    class Foreseen(RuntimeError):
        pass

    def ends_with(error: BaseException) -> tuple[str, int]:
        @_command.command("bench", Foreseen)
        def main(argv: list[str]) -> None:
            raise error

        return refusal(main, "", capsys)

    assert ends_with(_command.UsageError("k: expected 1, got 2")) == ("error: k: expected 1, got 2", 2)
    assert ends_with(ValueError("text: expected more")) == ("error: text: expected more", 1)
    assert ends_with(OSError("disk full")) == ("error: disk full", 1)
    assert ends_with(Foreseen("step 3")) == ("error: step 3", 1)
    assert ends_with(KeyboardInterrupt()) == ("error: interrupted", 130)
    missing = ModuleNotFoundError("No module named 'tqdm'", name="tqdm")
    assert ends_with(missing) == ("error: tqdm is not installed: pip install 'hicl-fast[bench]'", 1)
    for bug in (RuntimeError("?"), TypeError("?"), KeyError("?"), ModuleNotFoundError("?", name="hicl_fast.nowhere")):
        with pytest.raises(type(bug)):
            ends_with(bug)
    with pytest.raises(TypeError), _command.usage():
        raise TypeError("method() takes 2 positional arguments but 3 were given")


def test_devices_and_files(tmp_path: Path) -> None:
    _command.check_device("device", "cpu")
    for value in ("gpu", "cpu:x", "", "meta", *([] if torch.cuda.is_available() else ["cuda", "cuda:7"])):
        with pytest.raises(ValueError, match="^device: expected cpu"):
            _command.check_device("device", value)
    _command.check_output_folder("out", tmp_path / "a" / "b")
    _command.check_output_file("out", tmp_path / "a")
    deep = tmp_path / "/".join(["x" * 200] * 5) / "file"
    with pytest.raises(ValueError) as said:
        _command.check_output_file("out", deep)
    assert len(str(said.value)) < 500


def test_a_model_that_can_not_be_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2}')
    (tmp_path / "model.safetensors").write_text("cut short")
    for load, path in (
        (load_encoder, tmp_path),
        (load_encoder, tmp_path / "nowhere"),
        (load_tokenizer, tmp_path / "no"),
    ):
        with pytest.raises(ValueError, match="^model_name_or_path: expected a model to open, got /") as said:
            load(path)
        assert len(str(said.value)) < 500


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_an_extra_that_is_not_installed() -> None:
    """In one process, since each takes seconds: every command without the packages that its extra brings."""
    code = """
import runpy, sys
sys.path.insert(0, "benchmarks")
ABSENT = ("transformers", "tqdm", "matplotlib")
COMMANDS = {
    "trainer": "hicl_fast.trainer", "evaluation": "hicl_fast.evaluation", "analysis": "hicl_fast.analysis",
    "mine": "hicl_fast.mine --query README.md --corpus README.md --output /dev/null --model_name_or_path m",
    "bench": "benchmarks/paradigm.py", "table": "benchmarks/training_table.py",
}
for name in ABSENT:
    sys.modules[name] = None
for name, command in COMMANDS.items():
    print(name, end=": ", file=sys.stderr, flush=True)
    program, *sys.argv[1:] = command.split()
    try:
        (runpy.run_path if program.endswith(".py") else runpy.run_module)(program, run_name="__main__")
    except SystemExit as end:
        assert end.code == 1, end.code
"""
    ran = run(code)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.splitlines() == [
        "trainer: error: transformers is not installed: pip install 'hicl-fast[trainer]'",
        "evaluation: error: transformers is not installed: pip install 'hicl-fast[trainer]'",
        "analysis: error: tqdm is not installed: pip install 'hicl-fast[analysis]'",
        "mine: error: tqdm is not installed: pip install 'hicl-fast[evaluation]'",
        "bench: error: tqdm is not installed: pip install 'hicl-fast[bench]'",
        "table: error: tqdm is not installed: pip install 'hicl-fast[trainer]'",
    ]
