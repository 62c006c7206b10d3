"""``make gpu-first``: what to run first on a machine with a GPU, within four minutes; ``make gpu-check`` is the whole.

Runs with the PyTorch of the Python it is started with. In turn, each under a time limit: the package (and the extension,
unless one was brought along that loads: hicl_fast/_C.abi3.so), ``python -m hicl_fast.info``, what a step launches and how
long the GPU takes for it, the losses at N = 8192 and at 64 and 512, tests/gpu as far as they come, and the first product's
kernel under each tile that might suit it.

Writes into $OUT (default build/gpu-first): gpu-first.log and gpu-first.json, after every step; launches.json, large.json,
small.json and tiles.json, after every row.

Exit status: 0 where every step passed, 1 where one failed, 77 where there is no GPU to check on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tools import gpu_steps
from tools.gpu_steps import GRACE_SECONDS, Plan, benchmark, build, info, tests

TOTAL_SECONDS = 240 - GRACE_SECONDS
LAUNCHES = "--batch-sizes 64 512 2048 8192 --backends cuda triton --variants plain symmetric learned --seconds 0.2"


def steps(out: Path, rehearsing: bool = False) -> Plan:
    tiles = benchmark("tiles", "tiles", "--seconds 8", out, 60, 0, rehearsing=rehearsing)
    return [*build(45), info(), *benchmarks(out, rehearsing), tests(120, 80, rehearsing), tiles]


def benchmarks(out: Path, rehearsing: bool = False) -> Plan:
    large = "--batch-sizes 8192 --backends triton --rivals eager --seconds 1"
    small = "--batch-sizes 64 512 --backends cuda triton --rivals eager --seconds 1"
    return [
        benchmark("launches", "launches", LAUNCHES, out, 40, 25, rehearsing=rehearsing),
        benchmark("large", "loss_throughput", large, out, 30, 15, rehearsing=rehearsing),
        benchmark("small", "loss_throughput", small, out, 30, 15, rehearsing=rehearsing),
    ]


if __name__ == "__main__":
    sys.exit(gpu_steps.main("gpu-first", __doc__, TOTAL_SECONDS, steps))
