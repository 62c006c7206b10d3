"""tools/gpu_check.py, as far as it goes without a GPU: how steps run and end, and the environment it makes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import gpu_check
from tools.gpu_check import Report, Result, Step

ROOT = Path(__file__).resolve().parents[2]


def run_program(program: str, seconds: float = 60, empty_status: int | None = None) -> tuple[Result, str]:
    log = io.StringIO()
    result = gpu_check.run(Step("step", [sys.executable, "-c", program], seconds, 0, empty_status), 60, Report(log))
    return result, log.getvalue()


def test_a_step_passes_and_is_logged() -> None:
    result, log = run_program("print('spoken')")
    assert (result.outcome, result.note) == ("passed", "")
    assert "\nspoken\n" in log


def test_a_step_fails_with_its_status() -> None:
    result, log = run_program("import sys; sys.exit('broken')")
    assert (result.outcome, result.note) == ("failed", "exit status 1")
    assert "\nbroken\n" in log


def test_a_step_with_nothing_to_do_is_left_out() -> None:
    assert run_program("import sys; sys.exit(5)", empty_status=5)[0].outcome == "left out"
    assert run_program("import sys; sys.exit(5)")[0].outcome == "failed"


def test_a_step_out_of_time_ends_with_what_it_started() -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    result, _ = run_program(child, seconds=1)
    assert result.outcome == "out of time"
    assert result.seconds < 30  # the child held the pipe open until it, too, was ended


@pytest.mark.parametrize(("left", "expected"), [(1, "out of time"), (60, "passed")])
def test_a_step_gets_no_more_than_the_time_left(left: float, expected: str) -> None:
    step = Step("step", [sys.executable, "-c", "import time; time.sleep(3)"], 60)
    assert gpu_check.run(step, left, Report(io.StringIO())).outcome == expected


def test_every_step_has_its_time(tmp_path: Path) -> None:
    planned = [step for step in gpu_check.steps(tmp_path) if isinstance(step, Step)]
    assert {"build", "info", "tests", "small", "large", "hard_negatives", "segment_pool"} <= {s.name for s in planned}
    assert all(step.kept_free <= step.seconds for step in planned)
    assert gpu_check.TOTAL_SECONDS < 9 * 60
    assert planned[0].seconds + gpu_check.kept_free(list(planned[1:])) <= gpu_check.TOTAL_SECONDS


def test_later_steps_keep_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def program(seconds: float) -> list[str]:
        return [sys.executable, "-c", f"import time; time.sleep({seconds})"]

    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(gpu_check, "find_gpu", lambda: "a GPU")
    monkeypatch.setattr(gpu_check, "make_environment", lambda: None)
    monkeypatch.setattr(gpu_check, "TOTAL_SECONDS", 31)
    plan = [Step("greedy", program(60), 60), Step("later", program(0), 60, kept_free=30)]
    monkeypatch.setattr(gpu_check, "steps", lambda out: plan)
    gpu_check.main()
    written = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    assert [step["outcome"] for step in written["steps"]] == ["out of time", "passed"]


def test_rivals_come_out_of_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHEELS", str(tmp_path))
    missing = gpu_check.rivals()
    assert isinstance(missing, Result) and missing.outcome == "left out" and str(tmp_path) in missing.note
    (tmp_path / "rival-1-py3-none-any.whl").touch()
    step = gpu_check.rivals()
    assert isinstance(step, Step) and step.command[-1] == str(tmp_path / "rival-1-py3-none-any.whl")


def test_benchmarks_know_their_options() -> None:
    """As far as they can be read without a GPU's backends."""
    lines = ["import sys; sys.path.insert(0, 'benchmarks')"]
    for step in gpu_check.benchmarks(Path("out")):
        _, program, *options = step.command
        assert program.endswith(".py") and f"out/{step.name}.json" in options
        there = ["torch" if option in ("cuda", "triton") else option for option in options]
        lines.append(f"import {Path(program).stem} as program; print(program.parse({there!r}))")
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dtype='bfloat16'") == len(lines) - 1


@pytest.mark.slow
def test_the_environment_sees_the_packages_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "ENVIRONMENT", tmp_path / "env")
    gpu_check.make_environment()
    program = "import sys, torch; print(sys.prefix, torch.__version__)"
    said = subprocess.run(
        [tmp_path / "env" / "bin" / "python", "-c", program], capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == [str(tmp_path / "env"), torch.__version__]


@pytest.mark.parametrize(("outcome", "status"), [("passed", 0), ("left out", 0), ("failed", 1), ("out of time", 1)])
def test_one_bad_step_fails_the_whole(
    outcome: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(gpu_check, "find_gpu", lambda: "a GPU")
    monkeypatch.setattr(gpu_check, "make_environment", lambda: None)
    monkeypatch.setattr(gpu_check, "steps", lambda out: [Result("one", "passed", 0.0), Result("two", outcome, 0.0)])
    assert gpu_check.main() == status
    summary = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    assert summary["passed"] is (status == 0)
    assert [step["outcome"] for step in summary["steps"]] == ["passed", outcome]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, "tools/gpu_check.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == gpu_check.NO_GPU
    assert done.stdout.count("\n") == 1 and "sees no GPU" in done.stdout
