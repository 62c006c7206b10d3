"""Times every kernel that takes a tile from kernels/tiles.py under each tile that might suit a GPU, one after another.

    python benchmarks/tiles.py --device cuda --dtype bfloat16 --json tiles.json
    python benchmarks/tiles.py --device cuda --uses exp statistics
    python -m tools.apply_tiles tiles.json

A use of tiles is timed as what it launches: the symmetric loss's (narrow), several positives' (ruled) and lists' (listed)
are two sweeps, the gradient paradigm's statistics and weights. `x BLAS` is that time over the product's alone, with
PyTorch's BLAS. The tile in use is timed twice: what the two differ by is noise. All results are checked against float64
before they are timed, and all kernels are compiled before that, side by side. Without a GPU, TRITON_INTERPRET=1 runs it in
Triton's interpreter, whose times say nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import torch

from hicl_fast._command import Parser, command, device, needs, positive, whole

with needs("triton", __name__):
    from hicl_fast.kernels.device import architecture
    from hicl_fast.kernels.tiles import USES, Tile

    from hicl_fast.ops.common.triton import on_device

with needs("bench", __name__):
    from inputs import embeddings
    from measure import Step, machine, time_in_turn
    from report import Results, Row, add_output_options, exit_status, print_about, table
    from tile_candidates import candidates, name_of
    from tile_trials import STORED_TOLERANCE, TRIALS, Trial, error_of
    from tqdm import tqdm

AS_IT_IS, AGAIN, PRODUCT_ALONE = "as it is", "as it is, again", "product alone"
MOST_COMPILERS = 15  # at a time; a kernel takes a second of one core, a fifth of it with Python's lock held


@command("triton")
def main(argv: list[str] | None = None) -> list[Row]:
    args = parse(argv)
    place, dtype = torch.device(args.device), getattr(torch, args.dtype)
    about = machine(place) | {"dim": args.dim, "dtype": args.dtype, "precision": args.precision}
    print_about(about)
    results = Results(about, args.json)
    query, key = (x.to(dtype) for x in embeddings(max(args.rows, args.columns), args.dim, place))
    with on_device(query):
        trials = {use: TRIALS[use](use, query[: args.rows], key[: args.columns], args.precision) for use in args.uses}
        plans = [Plan(use, trial, place, results) for use, trial in trials.items()]
        compile_all(plans, place)
        for plan in plans:
            plan.check()
            plan.time(args.seconds / len(plans))
            print(table(list(plan.rows.values()), "x BLAS"), flush=True)
    return results.rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uses", nargs="+", choices=USES, default=USES, metavar="USE", help="; ".join(USES))
    parser.add_argument("--rows", type=whole(1), default=8192)
    parser.add_argument("--columns", type=whole(2), default=16384)
    parser.add_argument("--dim", type=whole(1), default=768)
    parser.add_argument("--device", type=device, default="cuda")
    parser.add_argument(
        "--dtype", choices=[str(t).removeprefix("torch.") for t in STORED_TOLERANCE], default="bfloat16"
    )
    parser.add_argument("--precision", choices=["ieee", "tf32"], default="ieee", help="of float32 products")
    parser.add_argument("--seconds", type=positive, default=8.0, help="of timing, for all uses together")
    add_output_options(parser, plots=False)
    return parser.parse_args(argv)


@dataclass
class Plan:
    """A use's candidates, their rows and, once they are checked, what is timed."""

    use: str
    trial: Trial
    place: torch.device
    results: Results

    def __post_init__(self) -> None:
        arch = architecture(self.place)
        now, *others = candidates(self.use, arch, self.trial.operand, self.trial.now)
        self.tiles = {AS_IT_IS: now, AGAIN: now, **{name_of(tile): tile for tile in others}}
        about: dict[str, object] = {
            "use": self.use,
            "arch": arch,
            "operand": self.trial.operand,
            "aligned": self.trial.aligned,
        }
        about["size"] = list(self.trial.size)
        of_rows: dict[str, dict[str, object]] = {PRODUCT_ALONE: {}}
        of_rows |= {name: {"tile": asdict(tile)} for name, tile in self.tiles.items()}
        self.rows = {
            name: self.results.start(self.trial.size[0], f"{self.use}: {name}", **about, **of_row)
            for name, of_row in of_rows.items()
        }
        self.steps: dict[str, Step] = {PRODUCT_ALONE: self.trial.product}

    def check(self) -> None:
        for name, tile in tqdm(self.tiles.items(), desc=f"{self.use}: checking", leave=False, file=sys.stderr):
            # A tile that the device has no room for is no failure, but the one in use is.
            with self.results.attempt(self.rows[name], ours=tile == self.trial.now):
                step = self.trial.step(tile)
                step()
                self.results.note(self.rows[name], error=error_of(self.trial.found()))
                self.steps[name] = step

    def time(self, seconds: float) -> None:
        timings = time_in_turn(self.steps, seconds, self.place, f"{self.use}: timing", self.keep_busy)
        for name, timing in timings.items():
            ratio = timing.median / timings[PRODUCT_ALONE].median
            self.results.note(self.rows[name], **asdict(timing), memory=None, ratio=ratio)

    def keep_busy(self) -> None:
        """Work for the GPU, so that launches come before it needs them and their time isn't a kernel's."""
        self.trial.product()
        self.trial.product()


def compile_all(plans: list[Plan], place: torch.device) -> None:
    """Launches everything once. What goes wrong does so again where it is checked, and is said there."""

    def launch(trial: Trial, tile: Tile) -> None:
        with contextlib.suppress(Exception), _on(place):
            trial.step(tile)()

    first, *kernels = ((plan.trial, tile) for plan in plans for tile in dict.fromkeys(plan.tiles.values()))
    launch(*first)  # by itself: what Triton makes ready for a process is not made for several threads
    # The interpreter can't be shared.
    workers = min(MOST_COMPILERS, os.cpu_count() or 1) if place.type == "cuda" else 1
    with ThreadPoolExecutor(workers) as pool:
        done = pool.map(launch, *zip(*kernels, strict=True))
        list(tqdm(done, total=len(kernels), desc="compiling", leave=False, file=sys.stderr))


@contextlib.contextmanager
def _on(place: torch.device) -> Iterator[None]:
    """Which device is current is a thread's own."""
    with torch.cuda.device(place) if place.type == "cuda" else contextlib.nullcontext():
        yield


if __name__ == "__main__":
    sys.exit(exit_status(main()))
