"""Every command and every block of Python that README.md and docs/ show is run, in a short form.

A program that is not in ``SHORT`` fails the test: give it a short form there, or the reason why it has none.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hicl_fast
from tests.docs.documented import ROOT, Shown, commands, python_blocks

Short = Callable[[Shown, Path], None]

WORDS = "kala morem tesist vinour dary lopa senem kalist mora tesem vina darour".split()
TEXTS = ("queries", "corpus", "text", "documents", "sentences", "wiki12k", "wikitext2_paragraphs", "wiki1m_for_simcse")
MODELS = ("START", "bert-base-uncased", "run")  # what the pages call a model, as folders of that name

TRAINING = "--max_steps 2 --per_device_train_batch_size 12 --max_seq_length 34 --max_train_samples 24 --use_cpu True "
TRAINING += "--gradient_cache_chunk_size 0 --disable_tqdm True --report_to none"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run in, with everything that the pages take for granted."""
    from hicl_fast.trainer.scratch import write_scratch_model

    here = tmp_path_factory.mktemp("docs")
    generator = random.Random(0)
    lines = [" ".join(generator.choices(WORDS, k=generator.randint(4, 12))) for _ in range(40)]
    for name in TEXTS:
        (here / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (here / "lines.txt").write_text("".join(f"{(i + 1) % len(lines)}\n" for i in range(len(lines))))
    torch.manual_seed(0)
    write_scratch_model(lines, here / MODELS[0])
    for name in MODELS[1:]:
        shutil.copytree(here / MODELS[0], here / name)
    benchmark = here / "senteval" / "STS" / "STSBenchmark"
    benchmark.mkdir(parents=True)
    pairs = [("kala morem", "kala morem", 5), ("kala morem", "kala tesem", 3), ("kala morem", "vina darour", 0)]
    rows = "".join(f"g\tf\ty\t{i}\t{gold}\t{first}\t{second}\n" for i, (first, second, gold) in enumerate(pairs))
    for name in ("sts-dev.csv", "sts-test.csv"):
        (benchmark / name).write_text(rows)
    return here


# --- short forms -----------------------------------------------------------------------------------------------------


def module(*options: str) -> Short:
    """The command as it stands, with ``options`` behind its own; without any of its own, its help."""

    def run(shown: Shown, folder: Path) -> None:
        main = importlib.import_module(_module_of(shown.words[2])).main
        if shown.arguments:
            main([*shown.arguments, *" ".join(options).split()])
            return
        with pytest.raises(SystemExit) as ended:
            main(["--help"])
        assert ended.value.code == 0

    return run


def _module_of(name: str) -> str:
    spec = importlib.util.find_spec(name)
    return f"{name}.__main__" if spec is not None and spec.submodule_search_locations else name


def trainer(shown: Shown, folder: Path) -> None:
    from hicl_fast.trainer.cli import train

    if not shown.arguments:
        module()(shown, folder)
        return
    arguments = [word for word in shown.arguments if word != "..."]
    if "..." in shown.arguments:
        arguments += ["--model_name_or_path", "START", "--train_file", "text.txt"]
    if "--eval_steps" in arguments:
        arguments += ["--eval_steps", "2", "--save_steps", "2"]
    train([*arguments, *TRAINING.split(), "--output_dir", str(_new_folder(shown, folder))])


def training_table(shown: Shown, folder: Path) -> None:
    split = shown.arguments.index("--")
    own = [*shown.arguments[:split], "--seeds", "0", "--output_dir", str(_new_folder(shown, folder))]
    _benchmark(shown).main([*own, *shown.arguments[split:], *TRAINING.split()])


def _new_folder(shown: Shown, folder: Path) -> Path:
    return folder / f"{Path(shown.page).stem}-{shown.line}-{abs(hash(shown.words))}"


def _benchmark(shown: Shown) -> Any:
    return importlib.import_module(Path(shown.words[1]).stem)


def program(*options: str) -> Short:
    """A program of benchmarks/ with ``options`` behind its own."""

    def run(shown: Shown, folder: Path) -> None:
        _benchmark(shown).main([*shown.arguments, *" ".join(options).split()])

    return run


def info(shown: Shown, folder: Path) -> None:
    runpy.run_module("hicl_fast.info", run_name="__main__")


def target(shown: Shown, folder: Path) -> None:
    """Of make: what it would do. What it does is in .ci/run, or takes a GPU."""
    subprocess.run(["make", "--dry-run", shown.words[1]], cwd=ROOT, check=True, capture_output=True)


def packages(shown: Shown, folder: Path) -> None:
    """Of pip, which needs a network or minutes: its arguments. tests/packaging installs."""
    from pip._internal.commands import create_command

    name, *arguments = shown.words[3:] if shown.words[1] == "-m" else shown.words[1:]
    create_command(name).parse_args(arguments)


def files_of_tests(shown: Shown, folder: Path) -> None:
    """Of pytest: whether what it is to run is there."""
    files = [word for word in shown.words if word.startswith("tests/")]
    assert files and all((ROOT / file).exists() for file in files)


def breaks(shown: Shown, folder: Path) -> None:
    """What it would break: each takes a minute. tests/tools breaks one."""
    from tools import breaks

    assert breaks.main(["--list"]) == 0


def same_bits(shown: Shown, folder: Path) -> None:
    """Of the smallest size."""
    from tools import same_bits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(same_bits, "SIZES", same_bits.SIZES[:1])
        assert same_bits.main([*shown.arguments, "--backend", "torch"]) == 0


def apply_tiles(shown: Shown, folder: Path) -> None:
    """From a file without a time, onto a copy of the table, which stays as it is."""
    pytest.importorskip("triton")
    from tools import apply_tiles

    (folder / "tiles.json").write_text(json.dumps({"machine": {"device": "a card", "date": "a day"}, "rows": []}))
    table = Path(shutil.copy(apply_tiles.TABLE, folder))
    apply_tiles.main([*shown.arguments, "--table", str(table)])
    assert table.read_text() == apply_tiles.TABLE.read_text()


def of_others(shown: Shown, folder: Path) -> None:
    """SimCSE's own program, which is not here."""


SMALL = "--dim 16 --seconds 0.1 --device cpu --backends torch"
SHORT: dict[str, Short] = {
    "python -m hicl_fast.info": info,
    "python -m hicl_fast.mine": module(),
    "python -m hicl_fast.trainer": trainer,
    "python -m hicl_fast.evaluation": module(),
    "python -m hicl_fast.analysis": module("--grid 4 --samples 5 --steps 2"),
    "python benchmarks/loss_throughput.py": program(SMALL, "--batch-sizes 8 --rivals eager"),
    "python benchmarks/hard_negatives.py": program(SMALL, "--batch-sizes 12 -k 4 --num-mixed 5 --rivals none"),
    "python benchmarks/rules.py": program(SMALL, "--batch-sizes 12"),
    "python benchmarks/paradigm.py": program(SMALL, "--batch-sizes 12 --objectives mpt mhe"),
    "python benchmarks/training_table.py": training_table,
    "python -m tools.apply_tiles": apply_tiles,
    "python -m tools.breaks": breaks,
    "python -m tools.same_bits": same_bits,
    "python train.py": of_others,
    "python -m pytest": files_of_tests,
    "python -m pip": packages,
    "pip install": packages,
    "pytest -s": files_of_tests,
}


def short_form(shown: Shown) -> Short | None:
    return target if shown.words[0] == "make" else SHORT.get(shown.program)


@pytest.fixture
def _as_a_program(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In that folder, with benchmarks/ where its programs look, and a command line of no arguments."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["a command of the documentation"])
    yield


@pytest.mark.slow
@pytest.mark.usefixtures("_as_a_program")
@pytest.mark.parametrize("shown", commands(), ids=str)
def test_command(shown: Shown, folder: Path) -> None:
    run = short_form(shown)
    assert run is not None, f"{shown.program}: expected its short form in SHORT, got none"
    run(shown, folder)


def test_every_program_has_a_short_form() -> None:
    assert not {shown.program for shown in commands() if short_form(shown) is None}


def test_commands_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests.docs import documented

    page = tmp_path / "page.md"
    page.write_text(
        "Run `python -m  hicl_fast.info` or `make\ntest`, not `python`.\n\n"
        "```\nfor N in 1 2; do\n  .venv/bin/python a.py --n $N \\\n    --m 'x y'\ndone\n```\n\n```\nx = python y\n```\n"
        "   ```python\n   a = 1\n   ```\n"
    )
    monkeypatch.setattr(documented, "PAGES", [page])
    monkeypatch.setattr(documented, "ROOT", tmp_path)
    found = [(shown.line, shown.words) for shown in commands()]
    assert found == [
        (4, ("python", "a.py", "--n", "1", "--m", "x y")),
        (4, ("python", "a.py", "--n", "2", "--m", "x y")),
        (1, ("python", "-m", "hicl_fast.info")),
        (1, ("make", "test")),
    ]
    assert [shown.python for shown in python_blocks()] == ["a = 1\n"]
    page.write_text("```sh\ncurl -O something\n```\n")
    with pytest.raises(AssertionError, match="curl"):
        commands()


# --- Python ----------------------------------------------------------------------------------------------------------


def names_taken_for_granted() -> dict[str, Any]:
    from hicl_fast.ops.paradigm.objectives import Measured

    query, key = (torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    views = {"z1": query.requires_grad_(), "z2": key, "query": query, "key": key}
    losses = {name: getattr(hicl_fast, name) for name in ("FusedInfoNCELoss", "FusedHiCLLoss")}
    return {**views, **losses, "torch": torch, "HF": hicl_fast.functional, "Tensor": torch.Tensor, "Measured": Measured}


# Pages whose Python needs more than tensors, and what runs it.
RUN_ELSEWHERE = {"docs/integrations.md": "tests/integrations/test_documentation.py"}


def test_what_is_run_elsewhere() -> None:
    for page, file in RUN_ELSEWHERE.items():
        assert page in (ROOT / file).read_text()


@pytest.mark.parametrize(
    "shown",
    [shown for shown in python_blocks() if shown.page not in RUN_ELSEWHERE],
    ids=lambda shown: f"{shown.page}:{shown.line}",
)
def test_python(shown: Shown) -> None:
    names = names_taken_for_granted()
    exec(compile(shown.python, f"{shown.page}:{shown.line}", "exec"), names)
    if "squared_distance" in names:
        assert names["squared_distance"](torch.zeros(3)) is not None
