"""Steps with a time limit each, and those that every check on a GPU begins with; for gpu_first.py and gpu_check.py.

A step that fails does not keep the later ones from running, and one that takes long not from having the time they need.
What is known is written as it comes: the log line by line, the summary after every step.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / "build" / "gpu-check-env"
PYTHON = ENVIRONMENT / "bin" / "python"

NO_GPU = 77
NO_TESTS = 5  # pytest's exit status where it selects none
GRACE_SECONDS = 10.0  # from the interrupt, at which a program can still say what it knows, to the end
REHEARSAL_SLOWNESS = 10
MOST_WORKERS = 14  # of pytest: each holds a CUDA context, and most of the time compiles
START_SECONDS = 12.0  # until a process on such a machine has imported PyTorch: 8 were seen


@dataclass(frozen=True)
class Step:
    """A command, the seconds that it may take and those that earlier steps leave it whatever happens.

    ``{seconds}`` in the command becomes the time at which it should end by itself; ``empty_status`` is the exit status that
    says: nothing to do. With ``instead_of`` the step is run only where the one of that name did not pass.
    """

    name: str
    command: list[str]
    seconds: float
    kept_free: float = 0.0
    empty_status: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    instead_of: str = ""


@dataclass(frozen=True)
class Result:
    """How a step ended: "passed", "failed", "out of time" or, with the reason in ``note``, "left out"."""

    name: str
    outcome: str
    seconds: float
    note: str = ""

    @property
    def is_good(self) -> bool:
        return self.outcome in ("passed", "left out")


Plan = list[Step | Result]


class Report:
    """Writes to the terminal and to the log at once."""

    def __init__(self, log: TextIO) -> None:
        self._log = log

    def write(self, text: str) -> None:
        for stream in (sys.stdout, self._log):
            stream.write(text)
            stream.flush()


# --- running ---------------------------------------------------------------------------------------------------------


def main(name: str, about: str | None, total_seconds: float, plan: Callable[[Path, bool], Plan]) -> int:
    """``plan`` makes the steps for a folder, for a rehearsal without a GPU if that is asked for; ``about`` is the help."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        prog=f"make {name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", help="run every step on the CPU, in small")
    rehearsing = parser.parse_args().rehearse
    make_environment()
    with ThreadPoolExecutor() as beside:  # both import PyTorch first
        beside.submit(has_extension)
        gpu = "the CPU, as a rehearsal" if rehearsing else find_gpu(name)
    if not gpu:
        return NO_GPU
    # Where a shell started this in the background the interrupt is ignored, and would be by all that is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = Path(os.environ.get("OUT") or ROOT / "build" / name).resolve()
    out.mkdir(parents=True, exist_ok=True)
    planned = plan(out, rehearsing)
    if rehearsing:  # wherever that is, it is slower
        total_seconds *= REHEARSAL_SLOWNESS
        planned = [
            replace(step, seconds=step.seconds * REHEARSAL_SLOWNESS) if isinstance(step, Step) else step
            for step in planned
        ]
    return 0 if run_all(name, gpu, planned, out, began + total_seconds) else 1


def run_all(name: str, gpu: str, planned: Plan, out: Path, end: float) -> bool:
    """Runs the steps, up to ``end`` on the monotonic clock; whether all is well. Writes name.log and name.json."""
    results: list[Result] = []
    with open(out / f"{name}.log", "w") as log:
        report = Report(log)
        report.write(f"{name} on {gpu}, Python {sys.version.split()[0]}\n")
        for i, step in enumerate(planned):
            if isinstance(step, Result):
                results.append(step)
            elif is_due(step, results):
                results.append(run(step, end - time.monotonic() - kept_free(planned[i + 1 :]), report))
            _write_summary(out / f"{name}.json", gpu, results, is_whole=step is planned[-1])
        report.write("\n")
        for result in results:
            line = f"{result.name:<22}{result.outcome:<14}{result.seconds:>6.1f} s  {result.note}"
            report.write(line.rstrip() + "\n")
    return all(result.is_good for result in results)


def is_due(step: Step, results: list[Result]) -> bool:
    if not step.instead_of:
        return True
    return any(result.name == step.instead_of and not result.is_good for result in results)


def _write_summary(file: Path, gpu: str, results: list[Result], *, is_whole: bool) -> None:
    passed = is_whole and all(result.is_good for result in results)
    summary = {"gpu": gpu, "passed": passed, "whole": is_whole, "steps": [asdict(result) for result in results]}
    file.write_text(json.dumps(summary, indent=2) + "\n")


def run(step: Step, seconds_left: float, report: Report) -> Result:
    """Runs a step, its output reported as it comes; interrupts it and all that it started when its time is up.

    Whoever doesn't end at the interrupt, at which pytest prints what failed, is killed ten seconds later.
    """
    limit = min(step.seconds, seconds_left)
    if seconds_left < min(step.seconds, START_SECONDS):
        return Result(step.name, "out of time", 0.0, f"no time was left for it: {max(limit, 0):.0f} s")
    by_itself = str(max(1, int(limit - GRACE_SECONDS / 2)))
    command = [part.replace("{seconds}", by_itself) for part in step.command]
    report.write(f"\n== {step.name} (at most {limit:.0f} s): {shlex.join(command)}\n")
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **step.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    out_of_time = threading.Event()

    def send(number: signal.Signals) -> None:
        out_of_time.set()
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:  # it has just ended
            pass

    timers = [threading.Timer(limit, send, [signal.SIGINT])]
    timers.append(threading.Timer(limit + GRACE_SECONDS, send, [signal.SIGKILL]))
    for timer in timers:
        timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        report.write(line)
    status = process.wait()
    for timer in timers:
        timer.cancel()
    seconds = round(time.monotonic() - began, 1)
    if out_of_time.is_set():
        return Result(step.name, "out of time", seconds, f"ended after {limit:.0f} s")
    if status == step.empty_status:
        return Result(step.name, "left out", seconds, "nothing to do")
    return Result(step.name, "failed" if status else "passed", seconds, f"exit status {status}" if status else "")


def kept_free(later: Plan) -> float:
    return sum(step.kept_free for step in later if isinstance(step, Step))


# --- what every check begins with ------------------------------------------------------------------------------------


def find_gpu(name: str) -> str:
    """The GPU's name, or an empty string after a line that says why there is none."""
    if importlib.util.find_spec("torch") is None:
        print(f"{name}: {sys.executable} has no PyTorch; name one that has with make {name} PYTHON=...")
        return ""
    import torch

    if not torch.cuda.is_available():
        print(f"{name}: PyTorch {torch.__version__} sees no GPU on this machine")
        return ""
    return torch.cuda.get_device_name()


def make_environment() -> None:
    """A virtual environment over the packages of this Python, so that nothing is installed among them."""
    venv.create(ENVIRONMENT, clear=True, symlinks=True)
    site_packages = next((ENVIRONMENT / "lib").glob("python*/site-packages"))
    below = [path for path in sys.path if path.endswith("-packages")]
    lines = [f"import site; site.addsitedir({path!r})" for path in below]
    (site_packages / "packages_below.pth").write_text("\n".join(lines) + "\n")


def build(seconds: float) -> Plan:
    """The Python part, which can hardly fail, and then the extension: with CUDA, or else without.

    An extension that was brought along is taken as it is where it was built from these very sources and loads.
    """
    install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--editable", "."]
    extension = [str(PYTHON), "setup.py", "--quiet", "build_ext", "--inplace"]
    steps: Plan = [Step("install", [str(PYTHON), *install], 40, 10, environment={"HICL_FAST_BUILD": "skip"})]
    if has_extension():
        return [*steps, Result("build", "left out", 0.0, "the extension that is there is of these sources, and loads")]
    required = {"HICL_FAST_BUILD": "require"}
    return [
        *steps,
        Step("build", extension, seconds, environment=required | only_this_gpu()),
        Step(
            "build without CUDA", extension, seconds, environment=required | {"HICL_FAST_CUDA": "0"}, instead_of="build"
        ),
    ]


@functools.cache
def has_extension() -> bool:
    """Whether the extension is there, built from the sources as they are, loads, and has CUDA kernels if nvcc is there."""
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="build")
    digest = bytes.fromhex(setup["source_digest"]())
    if not any(digest in file.read_bytes() for file in (ROOT / "hicl_fast").glob("_C*.so")):
        return False
    has_cuda = "hasattr(torch.ops.hicl_fast_cuda, 'segment_pool')"
    program = f"import torch, hicl_fast._C; raise SystemExit(0 if {has_cuda} or {not setup['wants_cuda']()} else 1)"
    return subprocess.run([str(PYTHON), "-c", program], cwd=ROOT, capture_output=True).returncode == 0


def only_this_gpu() -> dict[str, str]:
    """What makes setup.py compile for the GPU at hand alone, where it has an architecture for it."""
    import torch

    if os.environ.get("HICL_FAST_ARCHS") or not torch.cuda.is_available():
        return {}
    arch = {8: "80", 9: "90a", 10: "100"}.get(torch.cuda.get_device_capability()[0])
    return {"HICL_FAST_ARCHS": arch} if arch else {}


def rivals() -> Step | Result:
    """Installs the wheels of other people's losses, which a machine without a network can't fetch."""
    folder = Path(os.environ.get("WHEELS") or ROOT / "build" / "wheels").resolve()
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        return Result("rivals", "left out", 0.0, f"no wheels in {folder}")
    options = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    return Step("rivals", [str(PYTHON), *options, *wheels], 30, kept_free=10)


def info() -> Step:
    return Step("info", [str(PYTHON), "-m", "hicl_fast.info"], 40, kept_free=10)


def tests(path: str, seconds: float, kept_free: float, rehearsing: bool) -> Step:
    """Tests of tests/gpu, in one run: starting takes a worker a quarter of a minute, and is paid once.

    After an access out of bounds nothing of CUDA works in its process any more: that fails the rest of one worker's tests.
    """
    return Step("tests", pytest_command(path, rehearsing=rehearsing), seconds, kept_free)


def pytest_command(*arguments: str, rehearsing: bool, in_parallel: bool = True) -> list[str]:
    """pytest so that it ends by itself within its time, and spreads over the cores, where its plugins for that are there.

    A rehearsal only collects: `make test-gpu-on-cpu` runs the tests.
    """
    command = [str(PYTHON), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--maxfail=30", *arguments]
    if importlib.util.find_spec("pytest_benchmark"):
        command += ["-p", "no:benchmark"]  # it warns in every worker
    if importlib.util.find_spec("pytest_timeout"):
        command.append("--session-timeout={seconds}")
    if in_parallel and importlib.util.find_spec("xdist"):
        command += ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1)), "--dist", "load"]
    return [*command, "--collect-only"] if rehearsing else command


def sanitizer(tool: str, tests: list[str], seconds: float, kept_free: float) -> Step | Result:
    """compute-sanitizer over the tests marked for it: memcheck finds reads and writes outside an allocation, racecheck
    threads of a block that don't wait for each other."""
    program = shutil.which("compute-sanitizer", path=os.environ.get("PATH", "") + os.pathsep + "/usr/local/cuda/bin")
    if program is None:
        return Result(tool, "left out", 0.0, "compute-sanitizer is not installed")
    options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    options += ["--report-api-errors", "no"]  # PyTorch asks CUDA for functions that a driver may not have
    # Every tensor an allocation of its own: memcheck then sees where each ends.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    return Step(tool, [program, *options, *tests], seconds, kept_free, NO_TESTS, environment)


# A rehearsal's options, behind those of the GPU, which they replace.
REHEARSED = {
    "loss_throughput": "--batch-sizes 8 16 --rivals eager",
    "hard_negatives": "--batch-sizes 16 -k 3 --num-mixed 4 --rivals none",
    "segment_pool": "--num-segments 64",
    "tiles": "--rows 33 --columns 40 --uses exp narrow product",
    "launches": "--batch-sizes 8 --variants plain --seconds 0.1",
}


def benchmark(
    name: str,
    program: str,
    options: str,
    out: Path,
    seconds: float,
    kept_free: float,
    *,
    rehearsing: bool = False,
) -> Step:
    """A program of benchmarks/ in bfloat16, whose results are ``name``.json in ``out``."""
    place = "cpu" if rehearsing else "cuda"
    command = [str(PYTHON), f"benchmarks/{program}.py", "--device", place, "--dtype", "bfloat16", *options.split()]
    command += ["--json", str(out / f"{name}.json")]
    if not rehearsing:
        return Step(name, command, seconds, kept_free)
    command += ["--dtype", "float32", "--dim", "32", "--seconds", "0.1", *REHEARSED[program].split()]
    if program == "tiles":
        return Step(name, command, seconds, kept_free, environment={"TRITON_INTERPRET": "1"})
    return Step(name, [*command, "--backends", "torch"], seconds, kept_free)
