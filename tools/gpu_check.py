"""``make gpu-check``: what only a machine with a GPU can check. It needs no network.

Runs with the PyTorch of the Python it is started with. In turn, each under a time limit, under nine minutes together:
the build of the extension with its CUDA kernels (without them where there is no nvcc), the rivals out of wheels that lie
in $WHEELS (default build/wheels), ``python -m hicl_fast.info``, the tests marked gpu, those marked sanitizer under
compute-sanitizer, once for accesses out of bounds and once for races in shared memory, and the benchmarks. A step that
fails does not keep the later ones from running, and one that takes long not from having the time they need.

Writes into $OUT (default build/gpu-check): gpu-check.log and gpu-check.json; of the losses small.json and small.png,
N = 64 to 512, and large.json and large.png, to a million rows; hard_negatives.json and segment_pool.json.

Exit status: 0 where every step passed, 1 where one failed, 77 where there is no GPU to check on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import venv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / "build" / "gpu-check-env"
PYTHON = ENVIRONMENT / "bin" / "python"

NO_GPU = 77
TOTAL_SECONDS = 520
NO_TESTS = 5  # pytest's exit status where it selects none
RACES = "test_cuda or test_rows"  # the tests of kernels that share memory: those of csrc/cuda
# At sizes where the others would take minutes or more memory than there is.
LARGE_RIVALS = (
    "eager",
    "torch.compile",
    "linear_cross_entropy",
    "inf-cl",
    "cut-cross-entropy",
    "liger-kernel",
    "quack",
)


@dataclass(frozen=True)
class Step:
    """A command, the seconds that it may take and those that earlier steps leave it whatever happens.

    ``empty_status`` is the exit status that says: nothing to do.
    """

    name: str
    command: list[str]
    seconds: float
    kept_free: float = 0.0
    empty_status: int | None = None


@dataclass(frozen=True)
class Result:
    """How a step ended: "passed", "failed", "out of time" or, with the reason in ``note``, "left out"."""

    name: str
    outcome: str
    seconds: float
    note: str = ""


class Report:
    """Writes to the terminal and to the log at once."""

    def __init__(self, log: TextIO) -> None:
        self._log = log

    def write(self, text: str) -> None:
        for stream in (sys.stdout, self._log):
            stream.write(text)
            stream.flush()


def find_gpu() -> str:
    """The GPU's name, or an empty string after a line that says why there is none."""
    if importlib.util.find_spec("torch") is None:
        print(f"gpu-check: {sys.executable} has no PyTorch; name one that has with make gpu-check PYTHON=...")
        return ""
    import torch

    if not torch.cuda.is_available():
        print(f"gpu-check: PyTorch {torch.__version__} sees no GPU on this machine")
        return ""
    return torch.cuda.get_device_name()


def make_environment() -> None:
    """A virtual environment over the packages of this Python, so that nothing is installed among them."""
    venv.create(ENVIRONMENT, clear=True, symlinks=True)
    site_packages = next((ENVIRONMENT / "lib").glob("python*/site-packages"))
    below = [path for path in sys.path if path.endswith("-packages")]
    lines = [f"import site; site.addsitedir({path!r})" for path in below]
    (site_packages / "packages_below.pth").write_text("\n".join(lines) + "\n")


def steps(out: Path) -> list[Step | Result]:
    python, pytest = str(PYTHON), [str(PYTHON), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    install = ["-m", "pip", "install", "-v", "--no-index", "--no-deps", "--no-build-isolation", "--editable", "."]
    return [
        Step("build", [python, *install], 150),
        rivals(),
        Step("info", [python, "-m", "hicl_fast.info"], 40, kept_free=15),
        Step("tests", [*pytest, "-m", "gpu"], 180, kept_free=60),
        sanitizer("memcheck", [*pytest, "-m", "sanitizer"], 90, kept_free=30),
        sanitizer("racecheck", [*pytest, "-m", "sanitizer", "-k", RACES], 90, kept_free=30),
        *benchmarks(out),
    ]


def rivals() -> Step | Result:
    """Installs the wheels of other people's losses, which a machine without a network can't fetch."""
    folder = Path(os.environ.get("WHEELS") or ROOT / "build" / "wheels").resolve()
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        return Result("rivals", "left out", 0.0, f"no wheels in {folder}")
    options = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    return Step("rivals", [str(PYTHON), *options, *wheels], 30, kept_free=15)


def benchmarks(out: Path) -> list[Step]:
    """What docs/performance.md asks to be measured on a GPU: in bfloat16, D = 768, forward and backward."""

    def step(name: str, program: str, options: str, seconds: float, kept_free: float, *, plots: bool) -> Step:
        command = [str(PYTHON), f"benchmarks/{program}.py", "--device", "cuda", "--dtype", "bfloat16", *options.split()]
        command += ["--json", str(out / f"{name}.json"), *(["--plot", str(out / f"{name}.png")] if plots else [])]
        return Step(name, command, seconds, kept_free)

    small = "--batch-sizes 64 128 256 512 --backends cuda triton --seconds 3"
    large = "--batch-sizes 8192 65536 1048576 --backends triton --seconds 5 --rivals " + " ".join(LARGE_RIVALS)
    mixing = "--batch-sizes 256 -k 10 --num-mixed 40 --backends cuda triton --seconds 5"
    return [
        step("small", "loss_throughput", small, 110, 60, plots=True),
        step("large", "loss_throughput", large, 170, 110, plots=True),
        step("hard_negatives", "hard_negatives", mixing, 50, 25, plots=False),
        step("segment_pool", "segment_pool", "--backends cuda triton", 40, 15, plots=False),
    ]


def sanitizer(tool: str, tests: list[str], seconds: float, kept_free: float) -> Step | Result:
    """compute-sanitizer over the tests marked for it: memcheck finds reads and writes outside an allocation, racecheck
    threads of a block that don't wait for each other."""
    program = shutil.which("compute-sanitizer", path=os.environ.get("PATH", "") + os.pathsep + "/usr/local/cuda/bin")
    if program is None:
        return Result(tool, "left out", 0.0, "compute-sanitizer is not installed")
    options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    return Step(tool, [program, *options, *tests], seconds, kept_free, empty_status=NO_TESTS)


def run(step: Step, seconds_left: float, report: Report) -> Result:
    """Runs a step, its output reported as it comes; ends it and all that it started when its time is up."""
    limit = min(step.seconds, seconds_left)
    report.write(f"\n== {step.name} (at most {limit:.0f} s): {shlex.join(step.command)}\n")
    environment = {
        **os.environ,
        "HICL_FAST_BUILD": "require",
        "PYTHONUNBUFFERED": "1",
        # Every tensor an allocation of its own: the sanitizer then sees where each ends.
        **({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if step.name == "memcheck" else {}),
    }
    began = time.monotonic()
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    out_of_time = threading.Event()

    def end() -> None:
        out_of_time.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, end)
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        report.write(line)
    status = process.wait()
    timer.cancel()
    seconds = round(time.monotonic() - began, 1)
    if out_of_time.is_set():
        return Result(step.name, "out of time", seconds, f"ended after {limit:.0f} s")
    if status == step.empty_status:
        return Result(step.name, "left out", seconds, "nothing to do")
    return Result(step.name, "failed" if status else "passed", seconds, f"exit status {status}" if status else "")


def kept_free(later: list[Step | Result]) -> float:
    return sum(step.kept_free for step in later if isinstance(step, Step))


def main() -> int:
    began = time.monotonic()
    gpu = find_gpu()
    if not gpu:
        return NO_GPU
    out = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check").resolve()
    out.mkdir(parents=True, exist_ok=True)
    make_environment()
    results = []
    with open(out / "gpu-check.log", "w") as log:
        report = Report(log)
        report.write(f"gpu-check on {gpu}, Python {sys.version.split()[0]}\n")
        planned = steps(out)
        for i, step in enumerate(planned):
            if isinstance(step, Step):
                seconds_left = TOTAL_SECONDS - (time.monotonic() - began)
                step = run(step, seconds_left - kept_free(planned[i + 1 :]), report)
            results.append(step)
        report.write("\n")
        for result in results:
            report.write(
                f"{result.name:<12}{result.outcome:<14}{result.seconds:>6.1f} s  {result.note}".rstrip() + "\n"
            )
    good = all(result.outcome in ("passed", "left out") for result in results)
    summary = {"gpu": gpu, "passed": good, "steps": [asdict(result) for result in results]}
    (out / "gpu-check.json").write_text(json.dumps(summary, indent=2) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
