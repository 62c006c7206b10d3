"""Times ragged weighted pooling against what copying the same bytes takes.

    python benchmarks/segment_pool.py                                  every backend that is there
    python benchmarks/segment_pool.py --num-segments 1048576 --device cuda --dtype bfloat16

Forward reads S · D numbers and writes B · D; backward reads B · D and writes S · D, and reads S · D once more where the
weights have a gradient. `x copy` is a candidate's time, on a GPU what the GPU worked, over that of so many bytes at the
rate at which PyTorch copies the segments: 1.25 is 80 % of it. `eager` multiplies, adds up with index_add and divides.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

import hicl_fast
import hicl_fast.functional as HF
from hicl_fast import reference
from hicl_fast._command import Parser, command, device, needs, positive, whole
from hicl_fast.ops.backends.registry import NAMES

with needs("bench", __name__):
    from measure import Step, gpu_seconds, machine, peak_bytes, time_in_turn
    from report import Results, Row, Wrong, add_output_options, exit_status, print_about, table

COPY = "copy of the segments"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
Pool = Callable[[Tensor, Tensor, Tensor], Tensor]  # segments (S, D), offsets (B + 1,), weights (S,) -> (B, D)


@command("bench")
def main(argv: list[str] | None = None) -> list[Row]:
    args = parse(argv)
    place, dtype = torch.device(args.device), getattr(torch, args.dtype)
    about = machine(place) | {"dim": args.dim, "dtype": args.dtype}
    print_about(about)
    results = Results(about, args.json)
    for kind in LENGTHS:
        measure(args, kind, place, dtype, results)
        print(f"\n{kind}", table([row for row in results.rows if row["lengths"] == kind], "x copy"), flush=True)
    return results.rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    available = [status.name for status in hicl_fast.backends() if status.available]
    parser.add_argument("--num-segments", type=whole(8), default=1 << 20 if cuda else 1 << 14, metavar="S")
    parser.add_argument("--dim", type=whole(1), default=768)
    parser.add_argument("--device", type=device, default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=[str(t).removeprefix("torch.") for t in TOLERANCE], default="float32")
    parser.add_argument("--backends", nargs="+", choices=NAMES, default=available[::-1], metavar="NAME")
    parser.add_argument("--seconds", type=positive, default=3.0, help="of timing for each kind of lengths")
    add_output_options(parser, plots=False)
    return parser.parse_args(argv)


def alike(num_segments: int) -> Tensor:
    return torch.full((max(1, num_segments // 8),), 8)


def skewed(num_segments: int) -> Tensor:
    """A quarter of all segments in one sequence, the others in sequences of 1, 2, … 16 in turn."""
    return torch.cat(
        [torch.arange(max(1, num_segments * 3 // 4 * 2 // 17)) % 16 + 1, torch.tensor([num_segments // 4])]
    )


LENGTHS: dict[str, Callable[[int], Tensor]] = {"sequences of 8": alike, "skewed": skewed}


def measure(args: argparse.Namespace, kind: str, device: torch.device, dtype: torch.dtype, results: Results) -> None:
    lengths = LENGTHS[kind](args.num_segments)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(device)
    num_segments, generator = int(lengths.sum()), torch.Generator(device).manual_seed(0)
    segments = torch.randn(num_segments, args.dim, generator=generator, device=device).to(dtype)
    weights = torch.randint(1, 33, (num_segments,), generator=generator, device=device).float()
    upstream = torch.randn(len(lengths), args.dim, generator=generator, device=device).to(dtype)

    pools: dict[str, Pool] = {f"hicl_fast {name}": partial(HF.segment_pool, backend=name) for name in args.backends}
    pools["eager"] = eager
    destination = torch.empty_like(segments)
    one_pass, pooled = segments.numel() * segments.element_size(), upstream.numel() * upstream.element_size()
    rows = {COPY: results.start(num_segments, COPY, lengths=kind, bytes=2 * one_pass)}
    steps: dict[str, Step] = {COPY: partial(destination.copy_, segments)}
    for name, pool in pools.items():
        own = {}
        for direction, wants_weights, passes in (("", None, 1), (" + backward", False, 2), (" + both", True, 3)):
            moved = passes * one_pass + (1 if wants_weights is None else 2) * pooled
            own[wants_weights] = results.start(num_segments, f"{name}{direction}", lengths=kind, bytes=moved)
        error: float | None = None
        for wants_weights, row in own.items():
            with results.attempt(row, ours=pool is not eager):
                error = check(pool, segments, offsets, weights) if error is None else error
                results.note(row, error=error)
                step = step_of(pool, segments, offsets, weights, upstream, wants_weights)
                step()
                steps[row["name"]], rows[row["name"]] = step, row
    memory = {name: peak_bytes(step, device) for name, step in steps.items()}
    timings = time_in_turn(steps, args.seconds, device, kind)
    gpu = {name: gpu_seconds(step, device) for name, step in steps.items()}
    taken = {name: gpu[name] or timings[name].median for name in steps}
    rate = rows[COPY]["bytes"] / taken[COPY]
    for name, timing in timings.items():
        ratio = taken[name] * rate / rows[name]["bytes"]
        results.note(rows[name], **asdict(timing), memory=memory[name], gpu=gpu[name], ratio=ratio)


def step_of(
    pool: Pool, segments: Tensor, offsets: Tensor, weights: Tensor, upstream: Tensor, wants_weights: bool | None
) -> Step:
    """Forward, and where ``wants_weights`` says so backward to segments, without or with their weights."""
    if wants_weights is None:
        return lambda: pool(segments, offsets, weights)
    h, w = segments.detach().requires_grad_(), weights.detach().requires_grad_(wants_weights)
    inputs = (h, w) if wants_weights else (h,)
    return lambda: torch.autograd.grad(pool(h, offsets, w), inputs, upstream)


def eager(segments: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    num_sequences = offsets.shape[0] - 1
    sequence = torch.repeat_interleave(
        torch.arange(num_sequences, device=offsets.device), offsets.diff(), output_size=segments.shape[0]
    )
    weighted = segments.float() * weights[:, None]
    total = segments.new_zeros(num_sequences, segments.shape[1], dtype=torch.float32).index_add(0, sequence, weighted)
    of_weights = weights.new_zeros(num_sequences).index_add(0, sequence, weights)
    return (total / of_weights[:, None]).to(segments.dtype)


def check(pool: Pool, segments: Tensor, offsets: Tensor, weights: Tensor) -> float:
    """The largest relative error of the first sequences' rows against the reference in float64.

    Raises:
        Wrong: it computes something else.
    """
    few = offsets[:101]
    count = int(few[-1])
    got = pool(segments[:count], few, weights[:count])
    exact = reference.segment_pool(segments[:count].double(), few, weights[:count].double())
    error = float((got.double() - exact).norm() / exact.norm())
    if not error <= TOLERANCE[segments.dtype]:
        raise Wrong(f"relative error {error:.1e}, {TOLERANCE[segments.dtype]:.0e} is allowed")
    return error


if __name__ == "__main__":
    sys.exit(exit_status(main()))
