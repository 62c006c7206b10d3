"""Lists what a step of the loss launches on a GPU, and how long the GPU works on each.

    python benchmarks/launches.py --device cuda --dtype bfloat16 --batch-sizes 64 2048 8192 --json launches.json

For each batch size, backend and variant of the loss: the launches of forward and backward together, by kernel; `GPU`, the
time of all of them; `wall`, with the gaps between them; `replayed`, as a CUDA graph that is captured once. Where `wall`
is far above `GPU` the host is what is waited for, and a graph is how not to. On the CPU it lists PyTorch's operators.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

import hicl_fast
import hicl_fast.functional as HF
from hicl_fast._command import Parser, command, device, needs, positive, whole
from hicl_fast.ops.backends.registry import NAMES

with needs("bench", __name__):
    from inputs import embeddings, gradient_step
    from measure import Step, machine, time_in_turn
    from report import Results, Row, add_output_options, exit_status, print_about
    from torch.profiler import ProfilerActivity, profile

PROFILED_STEPS = 5
LONGEST_NAME = 90  # of a kernel, which has its template's arguments in it
SHOWN = 12  # kernels of a step

TYPES = ("float32", "bfloat16", "float16")
Options = dict[str, Any]
# What each variant asks of info_nce; ``learned``: a temperature that the device holds, with a gradient.
VARIANTS: dict[str, Options] = {
    "plain": {},
    "symmetric": {"symmetric": True},
    "learned": {"learned": True},
    "margin": {"margin": 0.1},
    "mixing": {"mixing": True},
}


@command("bench")
def main(argv: list[str] | None = None) -> list[Row]:
    args = parse(argv)
    place, dtype = torch.device(args.device), getattr(torch, args.dtype)
    about = machine(place) | {"dim": args.dim, "dtype": args.dtype}
    print_about(about)
    results = Results(about, args.json)
    for n in args.batch_sizes:
        query, key = (x.to(dtype) for x in embeddings(n, args.dim, place))
        for backend in args.backends:
            for variant in args.variants:
                row = results.start(n, f"{backend} {variant}")
                with results.attempt(row, ours=True):
                    step = gradient_step(loss_of(backend, variant, n, place), query, key)
                    results.note(row, **measure(step, args.seconds, place))
                print(summary(row), flush=True)
    return results.rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    available = [status.name for status in hicl_fast.backends() if status.available]
    parser.add_argument("--batch-sizes", type=whole(1), nargs="+", default=[64, 512, 2048, 8192], metavar="N")
    parser.add_argument("--dim", type=whole(1), default=768)
    parser.add_argument("--device", type=device, default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=TYPES, default="bfloat16" if cuda else "float32")
    parser.add_argument("--backends", nargs="+", choices=NAMES, default=available[::-1], metavar="NAME")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["plain"], metavar="NAME")
    parser.add_argument("--seconds", type=positive, default=0.5, help="of timing for each")
    add_output_options(parser, plots=False)
    return parser.parse_args(argv)


def loss_of(backend: str, variant: str, n: int, place: torch.device) -> Any:
    options: Options = {"temperature": 0.05, "backend": backend} | VARIANTS[variant]
    if options.pop("learned", False):
        options["temperature"] = torch.tensor(0.05, device=place, requires_grad=True)
    if options.pop("mixing", False):
        options["mixing"] = HF.Mixing(10, HF.random_pairs(n, 40, 10, seed=0, device=place))

    def loss(query: Tensor, key: Tensor) -> Tensor:
        return HF.info_nce(query, key, **options)

    return loss


def measure(step: Step, seconds: float, place: torch.device) -> dict[str, Any]:
    steps = {"wall": step}
    captured = captured_step(step) if place.type == "cuda" else None
    if isinstance(captured, torch.cuda.CUDAGraph):
        steps["replayed"] = captured.replay
    timings = time_in_turn(steps, seconds, place, "timing")
    launches = launches_of(step, place)
    return {
        "median": timings["wall"].median,
        "fastest": timings["wall"].fastest,
        "slowest": timings["wall"].slowest,
        "rounds": timings["wall"].rounds,
        "replayed": timings["replayed"].median if "replayed" in timings else None,
        **({"not_replayed": captured} if isinstance(captured, str) else {}),
        "gpu": sum(each["seconds"] for each in launches),
        "count": sum(each["count"] for each in launches),
        "launches": launches,
    }


def captured_step(step: Step) -> torch.cuda.CUDAGraph | str:
    """The step as a graph, or in words why it can't be one."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(2):  # what is compiled or kept from call to call must not be captured
                step()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return graph


def launches_of(step: Step, place: torch.device) -> list[dict[str, Any]]:
    """The kernels and copies of one step, those that take longest first; on the CPU the operators."""
    on_gpu = place.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED_STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    seconds: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    for event in profiler.events():
        if event.device_type == wanted:
            own = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
            seconds[event.name] += own / 1e6 / PROFILED_STEPS
            count[event.name] += 1
    ordered = sorted(seconds, key=lambda name: -seconds[name])
    return [
        {"name": name[:LONGEST_NAME], "count": count[name] / PROFILED_STEPS, "seconds": seconds[name]}
        for name in ordered
    ]


def summary(row: Row) -> str:
    head = f"\nN = {row['batch']}, {row['name']}: "
    if "skipped" in row:
        return head + row["skipped"]
    replayed = f", replayed {row['replayed'] * 1e3:.4f} ms" if row["replayed"] else ""
    times = f"wall {row['median'] * 1e3:.4f} ms, GPU {row['gpu'] * 1e3:.4f} ms{replayed}, {row['count']:.0f} launches"
    lines = [
        f"{each['seconds'] * 1e6:>11.1f} µs {each['count']:>5.1f} × {each['name']}" for each in row["launches"][:SHOWN]
    ]
    return "\n".join([head + times, *lines])


if __name__ == "__main__":
    sys.exit(exit_status(main()))
