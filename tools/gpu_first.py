"""``make gpu-first``: what to run first on a machine with a GPU, within 150 s; ``make gpu-check`` is the whole.

Runs with the PyTorch of the Python it is started with. In turn, each under a time limit: the package (and the extension,
unless one was brought along that loads: hicl_fast/_C.abi3.so), a case of each kernel against float64, the losses at N = 512
and 8192 against eager PyTorch, and every kernel that takes a tile from kernels/tiles.py under each tile that might suit it:
``python -m tools.apply_tiles tiles.json`` takes over what was faster. Each step is a process, and few, since importing
PyTorch takes one some ten seconds.

Writes into $OUT (default build/gpu-first): gpu-first.log and gpu-first.json, after every step; losses.json and tiles.json,
after every row.

Exit status: 0 where every step passed, 1 where one failed, 77 where there is no GPU to check on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tools import gpu_steps
from tools.gpu_steps import GRACE_SECONDS, Plan, benchmark, build, tests

TOTAL_SECONDS = 150 - GRACE_SECONDS
LOSSES = "--batch-sizes 512 8192 --backends cuda triton --rivals eager --seconds 1"


def steps(out: Path, rehearsing: bool = False) -> Plan:
    smoke = tests("tests/gpu/test_smoke.py", 55, 25, rehearsing)
    tiles = benchmark("tiles", "tiles", "--seconds 8", out, 60, 35, rehearsing=rehearsing)
    return [*build(45), smoke, *benchmarks(out, rehearsing), tiles]


def benchmarks(out: Path, rehearsing: bool = False) -> Plan:
    return [benchmark("losses", "loss_throughput", LOSSES, out, 35, 20, rehearsing=rehearsing)]


if __name__ == "__main__":
    sys.exit(gpu_steps.main("gpu-first", __doc__, TOTAL_SECONDS, steps))
