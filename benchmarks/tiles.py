"""Times the first product's kernel, exp(similarities), under each tile that might suit a GPU, one after another.

    python benchmarks/tiles.py --device cuda --dtype bfloat16 --json tiles.json

`x limit` is a tile's time over that of the product alone, with PyTorch's BLAS. Every tile's exponentials are checked
against float64 before it is timed. What is fastest belongs into kernels/tiles.py. Without a GPU, TRITON_INTERPRET=1 runs
it in Triton's interpreter, whose times say nothing.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace

import torch
from torch import Tensor

from hicl_fast import reference
from hicl_fast._command import Parser, command, device, needs, positive, whole
from hicl_fast.ops.common.constants import NORM_FLOOR, Special
from hicl_fast.ops.info_nce.problem import KindOfColumn

with needs("triton", __name__):
    from hicl_fast.kernels import info_nce
    from hicl_fast.kernels.cosine_tile import Similarities, tile_for
    from hicl_fast.kernels.rows import Rows
    from hicl_fast.kernels.tiles import EXP, Tile

    from hicl_fast.ops.common.row_kernels import row_kernels

with needs("bench", __name__):
    from inputs import embeddings
    from measure import Step, gpu_seconds, machine, peak_bytes, time_in_turn
    from report import Results, Row, Wrong, add_output_options, exit_status, print_about, table
    from tqdm import tqdm

SCALE = 20.0
LIMIT = "limit: the product"
CHECKED_ROWS = 256
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@command("triton")
def main(argv: list[str] | None = None) -> list[Row]:
    args = parse(argv)
    place, dtype = torch.device(args.device), getattr(torch, args.dtype)
    about = machine(place) | {"dim": args.dim, "dtype": args.dtype, "columns": args.columns}
    print_about(about)
    results = Results(about, args.json)
    query, key = (x.to(dtype) for x in embeddings(max(args.rows, args.columns), args.dim, place))
    measure(query[: args.rows], key[: args.columns], args.seconds, results)
    print(table(results.rows, "x limit"), flush=True)
    return results.rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=whole(1), default=8192)
    parser.add_argument("--columns", type=whole(1), default=16384)
    parser.add_argument("--dim", type=whole(1), default=768)
    parser.add_argument("--device", type=device, default="cuda")
    parser.add_argument("--dtype", choices=[str(t).removeprefix("torch.") for t in TOLERANCE], default="bfloat16")
    parser.add_argument("--seconds", type=positive, default=8.0, help="of timing, for all tiles together")
    add_output_options(parser, plots=False)
    return parser.parse_args(argv)


def measure(query: Tensor, key: Tensor, seconds: float, results: Results) -> None:
    device, (num_rows, num_cols) = query.device, (query.shape[0], key.shape[0])
    rows, keys, columns, offset, out = operands(query, key)
    scale = torch.full((1,), SCALE, device=device)

    def step_of(tile: Tile) -> Step:
        sums = torch.empty(len(info_nce.EXP_PLANES), -(-num_cols // tile.cols), num_rows, device=device)
        similarities = Similarities(rows, keys, columns, slice(0, num_rows), tile, "ieee")
        return lambda: info_nce.exp_similarities(
            similarities, scale, offset, out, sums, amplitude=1.0, wants_dot=False
        )  # fmt: skip

    now = tile_for([rows.operand, keys.operand], "ieee", EXP)
    candidates = {"as it is": now, **others(now)}
    product = torch.empty(num_rows, num_cols, dtype=query.dtype, device=device)
    steps: dict[str, Step] = {LIMIT: lambda: torch.mm(query, key.T, out=product)}
    row_of = {LIMIT: results.start(num_rows, LIMIT)}
    for name, tile in tqdm(candidates.items(), desc="checking", leave=False, file=sys.stderr):
        row = row_of[name] = results.start(num_rows, name, tile=asdict(tile))
        # A tile that the device has no room for is no failure, but the one in use is.
        with results.attempt(row, ours=tile is now):
            step = step_of(tile)
            step()
            results.note(row, error=check(query, key, out))
            steps[name] = step
    memory = {name: peak_bytes(step, device) for name, step in steps.items()}
    timings = time_in_turn(steps, seconds, device, "timing")
    for name, timing in timings.items():
        ratio = timing.median / timings[LIMIT].median
        results.note(row_of[name], **asdict(timing), memory=memory[name], ratio=ratio, gpu=None)
    for name, step in steps.items():
        results.note(row_of[name], gpu=gpu_seconds(step, device))


def others(now: Tile) -> dict[str, Tile]:
    """Variations of the tile in use: of how it is run, and of its shape."""
    depth = now.depth
    plain = replace(now, persistent=False, described=False)
    shapes = {
        f"{rows} × {cols}, {num_warps} warps": replace(plain, rows=rows, cols=cols, num_warps=num_warps, num_stages=3)
        for rows, cols, num_warps in ((128, 256, 8), (256, 128, 8), (128, 128, 8), (128, 128, 4), (128, 64, 4))
    }
    described = {f"{name}, described": replace(tile, described=True) for name, tile in shapes.items() if now.described}
    return {
        "a program a tile": replace(now, persistent=False),
        "a program a multiprocessor": replace(now, persistent=True),
        "2 stages": replace(now, num_stages=2),
        "4 stages": replace(now, num_stages=4),
        "band of 4": replace(now, band=4),
        "band of 16": replace(now, band=16),
        "half the depth, twice the stages": replace(now, depth=max(16, depth // 2), num_stages=2 * now.num_stages),
        "128 registers": replace(plain, rows=128, cols=128, num_warps=8, max_registers=128),
        **shapes,
        **described,
    }


def operands(query: Tensor, key: Tensor) -> tuple[Rows, Rows, KindOfColumn, Tensor, Tensor]:
    """What the kernel takes: rows, keys, their rule that positives are left out, offsets (R,) and a buffer (R, C)."""
    normalise = row_kernels(query.device).normalise
    target = torch.arange(query.shape[0], device=query.device)
    columns = KindOfColumn("key", key, wants_gradient=False, special=Special.POSITIVE, special_column=target)
    offset = torch.full((query.shape[0],), SCALE, device=query.device)
    out = torch.empty(query.shape[0], key.shape[0], dtype=query.dtype, device=query.device)
    return normalise(query, NORM_FLOOR), normalise(key, NORM_FLOOR), columns, offset, out


def check(query: Tensor, key: Tensor, got: Tensor) -> float:
    """The relative error, in norm, of the first rows' exponentials.

    Raises:
        Wrong: it is larger than the type allows.
    """
    few = query[:CHECKED_ROWS].double()
    exact = (SCALE * (reference.normalise(few) @ reference.normalise(key.double()).T - 1)).exp()
    exact.diagonal().zero_()  # the positives
    error = float((got[: len(few)].double() - exact).norm() / exact.norm())
    tolerance = TOLERANCE[query.dtype]
    if not error <= tolerance:
        raise Wrong(f"relative error {error:.1e} against float64, {tolerance:.0e} is allowed")
    return error


if __name__ == "__main__":
    sys.exit(exit_status(main()))
