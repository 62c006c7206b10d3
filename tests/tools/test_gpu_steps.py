"""tools/gpu_steps.py: how steps run and end, what is written when, and the environment they have."""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tools import gpu_check, gpu_first, gpu_steps
from tools.gpu_steps import Report, Result, Step

ROOT = Path(__file__).resolve().parents[2]


def program(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def run_program(text: str, seconds: float = 60, empty_status: int | None = None) -> tuple[Result, str]:
    log = io.StringIO()
    return gpu_steps.run(Step("step", program(text), seconds, 0, empty_status), 60, Report(log)), log.getvalue()


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


def test_a_step_has_its_environment_and_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import os, sys; print(os.environ['HICL_FAST_CUDA'], sys.argv[1])"
    log = io.StringIO()
    step = Step("step", [*program(text), "--session-timeout={seconds}"], 60, environment={"HICL_FAST_CUDA": "0"})
    gpu_steps.run(step, 30, Report(log))
    assert "\n0 --session-timeout=25\n" in log.getvalue()


def test_pytest_out_of_time_says_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It prints tracebacks at its end, which a kill would take from it."""
    text = "import time\ndef test_wrong():\n    assert 1 + 1 == 3\ndef test_slow():\n    time.sleep(60)\n"
    (tmp_path / "test_it.py").write_text(text)
    log = io.StringIO()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    step = Step("tests", [*command, str(tmp_path / "test_it.py")], 6)
    assert gpu_steps.run(step, 60, Report(log)).outcome == "out of time"
    assert "assert (1 + 1) == 3" in log.getvalue()


def test_a_step_out_of_time_ends_with_what_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where an interrupt is ignored: a child would hold the pipe open until it, too, is ended."""
    monkeypatch.setattr(gpu_steps, "GRACE_SECONDS", 1.0)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {deaf!r}])"
    result, _ = run_program(child, seconds=1)
    assert result.outcome == "out of time"
    assert result.seconds < 30


@pytest.mark.parametrize(("left", "expected"), [(-1, "out of time"), (1, "out of time"), (60, "passed")])
def test_a_step_gets_no_more_than_the_time_left(left: float, expected: str) -> None:
    step = Step("step", program("import time; time.sleep(3)"), 60)
    assert gpu_steps.run(step, left, Report(io.StringIO())).outcome == expected


def test_later_steps_keep_their_time_and_all_is_written_as_it_comes(tmp_path: Path) -> None:
    summary = tmp_path / "check.json"
    seen = f"import json; print(len(json.load(open({str(summary)!r}))['steps']), 'before')"
    plan: list[Step | Result] = [
        Step("greedy", program("import time; time.sleep(60)"), 60),
        Step("later", program(seen), 60, kept_free=30),
    ]
    assert not gpu_steps.run_all("check", "a GPU", plan, tmp_path, time.monotonic() + 31)
    written = json.loads(summary.read_text())
    assert [step["outcome"] for step in written["steps"]] == ["out of time", "passed"]
    assert written["whole"] and not written["passed"]
    assert "\n1 before\n" in (tmp_path / "check.log").read_text()


@pytest.mark.parametrize(("outcome", "good"), [("passed", True), ("left out", True), ("failed", False)])
def test_one_bad_step_fails_the_whole(outcome: str, good: bool, tmp_path: Path) -> None:
    plan: list[Step | Result] = [Result("one", "passed", 0.0), Result("two", outcome, 0.0)]
    assert gpu_steps.run_all("check", "a GPU", plan, tmp_path, time.monotonic() + 60) is good
    summary = json.loads((tmp_path / "check.json").read_text())
    assert summary["passed"] is good and [step["outcome"] for step in summary["steps"]] == ["passed", outcome]


def test_a_step_instead_of_another(tmp_path: Path) -> None:
    def outcomes(status: int) -> list[tuple[str, str]]:
        first = Step("build", program(f"raise SystemExit({status})"), 60)
        plan: list[Step | Result] = [first, Step("build without CUDA", program(""), 60, instead_of="build")]
        gpu_steps.run_all("check", "a GPU", plan, tmp_path, time.monotonic() + 60)
        written = json.loads((tmp_path / "check.json").read_text())
        return [(step["name"], step["outcome"]) for step in written["steps"]]

    assert outcomes(0) == [("build", "passed")]
    assert outcomes(1) == [("build", "failed"), ("build without CUDA", "passed")]


def test_the_package_is_there_whatever_becomes_of_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_steps, "has_extension", lambda: False)
    install, build, without_cuda = gpu_steps.build(100)
    assert isinstance(install, Step) and isinstance(build, Step) and isinstance(without_cuda, Step)
    assert install.environment == {"HICL_FAST_BUILD": "skip"} and "--editable" in install.command
    assert "build_ext" in build.command and without_cuda.instead_of == "build"
    assert without_cuda.environment["HICL_FAST_CUDA"] == "0"


def test_an_extension_that_was_brought_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken where it is of these sources and loads, in an environment like that of the steps."""
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="build")
    (tmp_path / "hicl_fast").mkdir()
    (tmp_path / "setup.py").write_text(
        "def source_digest():\n    return 'ab' * 20\ndef wants_cuda():\n    return False\n"
    )
    (tmp_path / "hicl_fast" / "__init__.py").touch()
    file = tmp_path / "hicl_fast" / "_C.abi3.so"
    monkeypatch.setattr(gpu_steps, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_steps, "PYTHON", sys.executable)
    monkeypatch.setattr(
        gpu_steps, "has_extension", gpu_steps.has_extension.__wrapped__
    )  # as if asked for the first time
    assert not gpu_steps.has_extension()
    file.write_bytes(b"of other sources")
    assert not gpu_steps.has_extension()
    file.write_bytes(bytes.fromhex("ab" * 20) + b": of these, and it doesn't load")
    assert not gpu_steps.has_extension()
    built = ROOT / "hicl_fast" / "_C.abi3.so"
    if not built.is_file() or bytes.fromhex(setup["source_digest"]()) not in built.read_bytes():
        pytest.skip("the extension is not built from the sources as they are")
    monkeypatch.setattr(gpu_steps, "ROOT", ROOT)
    assert gpu_steps.has_extension() is (not setup["wants_cuda"]() or hasattr(torch.ops.hicl_fast_cuda, "segment_pool"))


@pytest.mark.parametrize(("capability", "archs"), [((8, 6), "80"), ((9, 0), "90a"), ((10, 0), "100"), ((12, 0), None)])
def test_it_is_built_for_the_gpu_at_hand(
    capability: tuple[int, int], archs: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HICL_FAST_ARCHS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert gpu_steps.only_this_gpu() == ({"HICL_FAST_ARCHS": archs} if archs else {})
    monkeypatch.setenv("HICL_FAST_ARCHS", "80")
    assert gpu_steps.only_this_gpu() == {}


def test_rivals_come_out_of_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHEELS", str(tmp_path))
    missing = gpu_steps.rivals()
    assert isinstance(missing, Result) and missing.outcome == "left out" and str(tmp_path) in missing.note
    (tmp_path / "rival-1-py3-none-any.whl").touch()
    step = gpu_steps.rivals()
    assert isinstance(step, Step) and step.command[-1] == str(tmp_path / "rival-1-py3-none-any.whl")


@pytest.mark.parametrize(("tool", "path"), [(gpu_first, "tests/gpu/test_smoke.py"), (gpu_check, "tests/gpu")])
def test_one_run_of_gpu_tests(tool: ModuleType, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_steps, "has_extension", lambda: False)
    (step,) = [step for step in tool.steps(ROOT) if isinstance(step, Step) and step.name == "tests"]
    assert path in step.command and (ROOT / path).exists() and "--collect-only" not in step.command


def test_what_has_no_time_to_start_is_not_started() -> None:
    log = io.StringIO()
    result = gpu_steps.run(Step("late", program("print('started')"), 60), gpu_steps.START_SECONDS / 2, Report(log))
    assert result.outcome == "out of time" and "started" not in log.getvalue()


@pytest.mark.slow
def test_the_environment_sees_the_packages_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_steps, "ENVIRONMENT", tmp_path / "env")
    gpu_steps.make_environment()
    said = subprocess.run(
        [tmp_path / "env" / "bin" / "python", "-c", "import sys, torch; print(sys.prefix, torch.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.split() == [str(tmp_path / "env"), torch.__version__]


def test_what_it_runs_can_be_interrupted_though_a_shell_ignores_it(tmp_path: Path) -> None:
    """As where a script starts it with an & behind it."""
    lines = [
        "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)",
        "from tools import gpu_steps; gpu_steps.make_environment = lambda: None",
        "step = gpu_steps.Step('step', [sys.executable, '-c', 'import time; time.sleep(60)'], 0.4)",
        "sys.argv[1:] = ['--rehearse']; gpu_steps.main('check', '', 60, lambda out, rehearsing: [step])",
    ]
    environment = {**os.environ, "OUT": str(tmp_path)}
    subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, env=environment, check=True)
    assert "KeyboardInterrupt" in (tmp_path / "check.log").read_text()
