"""``make gpu-check``: what only a machine with a GPU can check, in full. It needs no network.

Runs with the PyTorch of the Python it is started with. In turn, each under a time limit, under nine minutes together:
the package, and the extension with its CUDA kernels for the GPU at hand (without them where that fails; not built where
one was brought along), the rivals out of wheels that lie in $WHEELS (default build/wheels), ``python -m hicl_fast.info``,
tests/gpu, its tests marked sanitizer under compute-sanitizer, once for accesses out of bounds and once for races in
shared memory, and the benchmarks.

Writes into $OUT (default build/gpu-check): gpu-check.log and gpu-check.json, after every step; of the losses small.json
and small.png, N = 64 to 512, and large.json and large.png, to a million rows; hard_negatives.json and segment_pool.json.

Exit status: 0 where every step passed, 1 where one failed, 77 where there is no GPU to check on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tools import gpu_steps
from tools.gpu_steps import Plan, benchmark, build, info, pytest_command, rivals, sanitizer, tests

TOTAL_SECONDS = 520
TEST_SECONDS = {"test_rows": (30.0, 15.0), "test_cuda": (50.0, 25.0), "test_losses": (100.0, 50.0)}
RACES = "test_cuda or test_rows"  # the tests of kernels that share memory: those of csrc/cuda
# At sizes where the others would take minutes or more memory than there is.
LARGE_RIVALS = "eager torch.compile linear_cross_entropy inf-cl cut-cross-entropy liger-kernel quack"


def steps(out: Path, rehearsing: bool = False) -> Plan:
    small_tests = pytest_command("tests/gpu", "-m", "sanitizer", rehearsing=rehearsing, in_parallel=False)
    return [
        *build(100),
        rivals(),
        info(),
        *tests(TEST_SECONDS, rehearsing),
        sanitizer("memcheck", small_tests, 100, kept_free=50),
        sanitizer("racecheck", [*small_tests, "-k", RACES], 60, kept_free=30),
        *benchmarks(out, rehearsing),
    ]


def benchmarks(out: Path, rehearsing: bool = False) -> Plan:
    """What docs/performance.md asks to be measured on a GPU: in bfloat16, D = 768, forward and backward."""
    small = "--batch-sizes 64 128 256 512 --backends cuda triton --seconds 3"
    large = f"--batch-sizes 8192 65536 1048576 --backends triton --seconds 5 --rivals {LARGE_RIVALS}"
    mixing = "--batch-sizes 256 -k 10 --num-mixed 40 --backends cuda triton --seconds 5"
    pooling = "--backends cuda triton"
    return [
        benchmark("small", "loss_throughput", small, out, 110, 60, plots=True, rehearsing=rehearsing),
        benchmark("large", "loss_throughput", large, out, 170, 110, plots=True, rehearsing=rehearsing),
        benchmark("hard_negatives", "hard_negatives", mixing, out, 50, 25, rehearsing=rehearsing),
        benchmark("segment_pool", "segment_pool", pooling, out, 40, 15, rehearsing=rehearsing),
    ]


if __name__ == "__main__":
    sys.exit(gpu_steps.main("gpu-check", __doc__, TOTAL_SECONDS, steps))
