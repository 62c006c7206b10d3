"""tools/gpu_first.py and tools/gpu_check.py, as far as they go without a GPU: their plans, and rehearsals on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tools import gpu_check, gpu_first, gpu_steps
from tools.gpu_steps import Step

ROOT = Path(__file__).resolve().parents[2]
MOST_FILES = 8  # that are carried home from a machine that is lent
FILES = {
    "gpu_first": {"gpu-first.log", "gpu-first.json", "losses.json", "tiles.json"},
    "gpu_check": {
        *("gpu-check.log", "gpu-check.json", "hard_negatives.json", "segment_pool.json"),
        *("launches.json", "small.json", "large.json"),
    },
}
STEPS = {
    "gpu_first": {"install", "build", "tests", "losses", "tiles"},
    "gpu_check": {"install", "build", "info", "tests", "launches", "small", "large", "segment_pool", "hard_negatives"},
}
each_tool = pytest.mark.parametrize("tool", [gpu_first, gpu_check], ids=["first", "check"])


@each_tool
def test_every_step_has_its_time(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_steps, "has_extension", lambda: False)
    planned = [step for step in tool.steps(tmp_path) if isinstance(step, Step)]
    names = {step.name for step in planned}
    assert STEPS[tool.__name__.removeprefix("tools.")] <= names
    assert all(step.kept_free <= step.seconds for step in planned)
    (build,) = (step for step in planned if step.name == "build")
    assert build.seconds + gpu_steps.kept_free(list(planned)) - build.kept_free <= tool.TOTAL_SECONDS
    assert gpu_check.TOTAL_SECONDS + gpu_steps.GRACE_SECONDS <= 500
    assert gpu_first.TOTAL_SECONDS + gpu_steps.GRACE_SECONDS <= 150


@each_tool
def test_benchmarks_know_their_options(tool: ModuleType, tmp_path: Path) -> None:
    """As far as they can be read without a GPU's backends."""
    lines = ["import sys; sys.path.insert(0, 'benchmarks')"]
    for step in tool.benchmarks(Path("out")):
        _, program, *options = step.command
        assert program.endswith(".py") and f"out/{step.name}.json" in options
        options[options.index("--device") + 1] = "cpu"
        options = [str(tmp_path / Path(option).name) if option.startswith("out/") else option for option in options]
        there = ["torch" if option in ("cuda", "triton") else option for option in options]
        lines.append(f"import {Path(program).stem} as program; print(program.parse({there!r}))")
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dtype='bfloat16'") == len(lines) - 1


# Takes its options, and then runs what it is given.
SANITIZER = f"""#!{sys.executable}
import os, sys
arguments = sys.argv[1:]
assert arguments[0] == "--tool" and arguments[1] in ("memcheck", "racecheck"), arguments
assert "--report-api-errors" in arguments and ("PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ) == ("memcheck" in arguments)
command = next(i for i, argument in enumerate(arguments) if argument.endswith("/bin/python"))
os.execv(arguments[command], arguments[command:])
"""


def assert_whole(out: Path, name: str, files: set[str]) -> None:
    """Every file is there, and holds what it is for."""
    assert {path.name for path in out.iterdir()} == files and len(files) <= MOST_FILES
    summary = json.loads((out / f"{name}.json").read_text())
    left_out = {step["name"] for step in summary["steps"] if step["outcome"] == "left out"}
    assert summary["passed"] and summary["whole"] and left_out <= {"rivals", "build"}
    for file in files - {f"{name}.json"}:
        if file.endswith(".json"):
            rows = json.loads((out / file).read_text())["rows"]
            assert rows and all("median" in row for row in rows if "hicl_fast" in row["name"] or file == "tiles.json")


@pytest.mark.slow
def test_rehearsal_of_the_first(tmp_path: Path) -> None:
    """Every step runs, in small and on the CPU, but the build, where the extension is built."""
    command = [sys.executable, "-m", "tools.gpu_first", "--rehearse"]
    environment = {**os.environ, "OUT": str(tmp_path / "out")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_whole(tmp_path / "out", "gpu-first", FILES["gpu_first"])


@pytest.mark.slow
def test_rehearsal_of_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step that the first has not."""
    programs, out = tmp_path / "programs", tmp_path / "out"
    for folder in (programs, out):
        folder.mkdir()
    (programs / "compute-sanitizer").write_text(SANITIZER)
    (programs / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(gpu_steps, "PYTHON", Path(sys.executable))
    common = {step.name for step in gpu_first.steps(tmp_path)}
    plan = [step for step in gpu_check.steps(out, rehearsing=True) if step.name not in common]
    slower = gpu_steps.REHEARSAL_SLOWNESS
    plan = [replace(step, seconds=step.seconds * slower) if isinstance(step, Step) else step for step in plan]
    assert gpu_steps.run_all("gpu-check", "a rehearsal", plan, out, time.monotonic() + 1e4), (
        out / "gpu-check.log"
    ).read_text()
    assert {"memcheck", "racecheck"} <= {step.name for step in plan}
    assert_whole(out, "gpu-check", FILES["gpu_check"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@each_tool
def test_without_a_gpu_it_says_so(tool: ModuleType) -> None:
    done = subprocess.run([sys.executable, "-m", tool.__name__], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == gpu_steps.NO_GPU
    assert done.stdout.count("\n") == 1 and "sees no GPU" in done.stdout
