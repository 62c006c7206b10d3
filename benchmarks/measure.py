"""Timing in turns, peak memory, and what machine it was."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

Step = Callable[[], Any]

# A benchmark's process looks for garbage before each measurement of memory. What the imports have made stays, and is not
# looked through each time: a tenth of a second, some forty times.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)


@dataclass(frozen=True)
class Timing:
    """Seconds a step took."""

    median: float
    fastest: float
    slowest: float
    rounds: int


def time_in_turn(
    steps: dict[str, Step], seconds: float, device: torch.device, title: str, before: Step | None = None
) -> dict[str, Timing]:
    """Every step once a round, round after round, so that a drift of the machine's speed touches all alike.

    Rounds go on until ``seconds`` are used up: at least 3, at most 200. ``before`` is run before each step, and not timed.
    """
    for step in steps.values():  # warm-up
        step()
        step()
    begin = time.perf_counter()
    for step in steps.values():
        duration(step, device, before)
    rounds = int(min(200, max(3, seconds / (time.perf_counter() - begin))))
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(rounds), desc=title, leave=False, file=sys.stderr):
        for name, step in steps.items():
            taken[name].append(duration(step, device, before))
    return {name: Timing(statistics.median(s), min(s), max(s), rounds) for name, s in taken.items()}


def duration(step: Step, device: torch.device, before: Step | None = None) -> float:
    if before is not None:
        before()
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1000
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def gpu_seconds(step: Step, device: torch.device) -> float | None:
    """How long the GPU works on a step: its kernels and copies without the gaps between them; None on a CPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    repeats = int(min(20, max(1, 0.05 / duration(step, device))))
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    events = (event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return sum(event.time_range.elapsed_us() for event in events) / 1e6 / repeats


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most memory a step holds beyond what was held before it.

    On a CPU it is the process's resident memory at its highest, reset before the step where Linux allows that.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that earlier steps gave back must not hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        step()
        return max(0, _status_bytes("VmHWM") - before)
    except (OSError, AttributeError):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step()
        return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 8 << 30


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on and with."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    """HICL_FAST_COMMIT, for a copy without its repository, or what git says."""
    if named := os.environ.get("HICL_FAST_COMMIT"):
        return named
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() or "unknown"
