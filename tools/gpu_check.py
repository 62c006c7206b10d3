"""``make gpu-check``: what only a machine with a GPU can check, in full. It needs no network.

Runs with the PyTorch of the Python it is started with. In turn, each under a time limit, within 500 s together:
the package, and the extension with its CUDA kernels for the GPU at hand (without them where that fails; not built where
one was brought along), the rivals out of wheels that lie in $WHEELS (default build/wheels), ``python -m hicl_fast.info``,
tests/gpu, the benchmarks, and with what time is left the tests marked sanitizer under compute-sanitizer, once for accesses
out of bounds and once for races in shared memory.

Writes into $OUT (default build/gpu-check): gpu-check.log and gpu-check.json, after every step; of the losses small.json and
large.json, N = 64 to 65536; what a step launches, launches.json; hard_negatives.json and segment_pool.json.

Exit status: 0 where every step passed, 1 where one failed, 77 where there is no GPU to check on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tools import gpu_steps
from tools.gpu_steps import GRACE_SECONDS, Plan, benchmark, build, info, pytest_command, rivals, sanitizer, tests

TOTAL_SECONDS = 500 - GRACE_SECONDS
LAUNCHES = "--batch-sizes 64 512 2048 8192 --backends cuda triton --variants plain symmetric learned --seconds 0.2"
RACES = "test_cuda or test_rows"  # the tests of kernels that share memory: those of csrc/cuda
# At sizes where the others would take minutes or more memory than there is.
LARGE_RIVALS = " ".join(
    [
        *("eager", "torch.compile", "linear_cross_entropy", "inf-cl", "cut-cross-entropy", "liger-kernel", "quack"),
        *("memeff", "memeff-clip", "siglip-kernel"),
    ]
)


def steps(out: Path, rehearsing: bool = False) -> Plan:
    small_tests = pytest_command("tests/gpu", "-m", "sanitizer", rehearsing=rehearsing, in_parallel=False)
    return [
        *build(100),
        rivals(),
        info(),
        tests("tests/gpu", 240, 140, rehearsing),
        *benchmarks(out, rehearsing),
        sanitizer("memcheck", small_tests, 90, kept_free=30),
        sanitizer("racecheck", [*small_tests, "-k", RACES], 60, kept_free=0),
    ]


def benchmarks(out: Path, rehearsing: bool = False) -> Plan:
    """What docs/performance.md asks to be measured on a GPU: in bfloat16, D = 768, forward and backward."""
    small = "--batch-sizes 64 512 1024 --backends cuda triton --seconds 1 --rivals eager torch.compile"
    large = f"--batch-sizes 2048 8192 65536 --backends triton --seconds 2 --rivals {LARGE_RIVALS}"
    mixing = "--batch-sizes 256 -k 10 --num-mixed 40 --backends cuda triton --seconds 2"
    pooling = "--backends cuda triton --seconds 1"
    return [
        benchmark("launches", "launches", LAUNCHES, out, 40, 30, rehearsing=rehearsing),
        benchmark("large", "loss_throughput", large, out, 90, 50, rehearsing=rehearsing),
        benchmark("small", "loss_throughput", small, out, 60, 40, rehearsing=rehearsing),
        benchmark("segment_pool", "segment_pool", pooling, out, 25, 15, rehearsing=rehearsing),
        benchmark("hard_negatives", "hard_negatives", mixing, out, 30, 15, rehearsing=rehearsing),
    ]


if __name__ == "__main__":
    sys.exit(gpu_steps.main("gpu-check", __doc__, TOTAL_SECONDS, steps))
