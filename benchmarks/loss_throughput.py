"""Times forward + backward of the contrastive loss against everything comparable that is installed.

    python benchmarks/loss_throughput.py                          two minutes on two cores
    python benchmarks/loss_throughput.py --batch-sizes 32768 --backends cpp --rivals none
    python benchmarks/loss_throughput.py --device cuda --dtype bfloat16 --json out.json --plot out.png
    python benchmarks/loss_throughput.py --from out.json --plot out.png

Every candidate is checked against the float64 reference before it is timed. `x limit` is its time over that of the three
matrix products S = Q Kᵀ, S K, Sᵀ Q with PyTorch's BLAS, below which no exact method gets without lower precision; for the
symmetric loss, which needs S twice, over four. A loss that isn't InfoNCE, which is said beside its name, is set against
neither. `memory` is what a step holds beyond its inputs; the gradients are in it. `GPU ms` is how long a GPU works on a step,
the gaps between its kernels left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict

import torch

import hicl_fast.reference as reference
from hicl_fast._command import Parser, command, device, needs, positive, whole
from hicl_fast.ops.backends.registry import NAMES

with needs("bench", __name__):
    from inputs import embeddings, gradient_step
    from measure import Step, Timing, available_bytes, duration, gpu_seconds, machine, peak_bytes, time_in_turn
    from report import Missing, Results, Row, Wrong, add_output_options, exit_status, plot, print_about, redraw, table
    from rivals import RIVALS, Batch, Loss, Rival, fused_rivals
    from tqdm import tqdm

LIMIT, SYMMETRIC_LIMIT = "limit: 3 products", "limit: 4 products"
LIMIT_BYTES = 9 << 30  # of similarities that the limit holds at a time: all of N = 65536 in 16 bits
# Largest relative error of loss and gradients, by type: what an eager run of that type has, several times over.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-4, torch.bfloat16: 0.1, torch.float16: 0.03}
BF16_OPERANDS_TOLERANCE = 0.05
CHECKED_ROWS = 1024  # the reference is float64 and N × N


@command("bench")
def main(argv: list[str] | None = None) -> list[Row]:
    args = parse(argv)
    if args.measured:
        return redraw(args, LIMIT, "x limit")
    if args.threads:
        torch.set_num_threads(args.threads)
    place, dtype = torch.device(args.device), getattr(torch, args.dtype)
    about = machine(place) | {"dim": args.dim, "dtype": args.dtype, "temperature": args.temperature}
    print_about(about)
    results = Results(about, args.json)
    for n in args.batch_sizes:
        measure_batch(args, n, place, dtype, results)
        print(table([row for row in results.rows if row["batch"] == n], "x limit"), flush=True)
    if args.plot:
        plot(results.rows, about, LIMIT, args.plot)
    return results.rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    sizes = [64, 128, 256, 512, 8192, 65536] if cuda else [64, 512, 4096]
    parser.add_argument("--batch-sizes", type=whole(1), nargs="+", default=sizes, metavar="N")
    parser.add_argument("--dim", type=whole(1), default=768)
    parser.add_argument("--dtype", choices=[str(t).removeprefix("torch.") for t in TOLERANCE])
    parser.add_argument("--device", type=device, default="cuda" if cuda else "cpu")
    parser.add_argument("--temperature", type=positive, default=0.05)
    parser.add_argument(
        "--backends", nargs="+", choices=NAMES, metavar="NAME", help="of hicl_fast; default: all there are"
    )
    parser.add_argument(
        "--rivals", nargs="+", metavar="NAME", help=f"or none; default: {', '.join(r.name for r in RIVALS)}"
    )
    parser.add_argument("--seconds", type=positive, default=12.0, help="of timing for each batch size")
    parser.add_argument("--longest-step", type=positive, default=20.0, metavar="SECONDS", help="left out beyond that")
    parser.add_argument("--threads", type=whole(1), help="default: PyTorch's")
    add_output_options(parser)
    args = parser.parse_args(argv)
    if args.dtype is None:
        args.dtype = "bfloat16" if args.device.startswith("cuda") else "float32"
    known = [rival.name for rival in RIVALS]
    unknown = [name for name in args.rivals or [] if name not in (*known, "none")]
    if unknown:
        parser.error(f"rivals: expected none or some of {', '.join(known)}, got {', '.join(unknown)}")
    return args


def measure_batch(args: argparse.Namespace, n: int, device: torch.device, dtype: torch.dtype, results: Results) -> None:
    batch = make_batch(n, args.dim, device, dtype, args.temperature)
    rows: dict[str, Row] = {}
    before = list(results.rows)
    steps: dict[str, Step] = {}

    def try_once(name: str, step: Step) -> None:
        once: list[float] = []
        memory = peak_bytes(lambda: once.append(duration(step, device)), device)
        if args.seconds / 5 < once[0] < args.longest_step / 2:  # it may have compiled something for this size
            once[0] = duration(step, device)
        if once[0] > args.seconds / 5:  # once is enough to see that it is out of the race
            timing = asdict(Timing(once[0], once[0], once[0], 1))
            results.note(rows[name], **timing, memory=memory, gpu=None, ratio=ratio_to_limit(name, once[0]))
        else:
            steps[name] = step

    def ratio_to_limit(name: str, seconds: float) -> float | None:
        if name in of_other_losses:
            return None
        limit = SYMMETRIC_LIMIT if name == SYMMETRIC_LIMIT or is_symmetric.get(name) else LIMIT
        there = seconds if name == limit else rows[limit].get("median")
        return seconds / there if there else None

    candidates = list(choose_rivals(args, dtype))
    is_symmetric = {rival.title: rival.symmetric for rival in candidates}
    of_other_losses = {rival.title for rival in candidates if rival.other_loss}
    for name, products in ((LIMIT, 3), (SYMMETRIC_LIMIT, 4)):
        rows[name] = results.start(n, name)
        try_once(name, limit_step(batch, products))
    for rival in tqdm(candidates, desc=f"N = {n}: checking", leave=False, file=sys.stderr):
        row = rows[rival.title] = results.start(n, rival.title)
        with results.attempt(row, ours=rival.ours):
            loss = ready(rival, batch)
            check_time(args.longest_step, rival.title, n, before)
            results.note(row, error=check(rival, loss, batch))
            try_once(rival.title, gradient_step(loss, batch.query, batch.key))
    memory = {name: peak_bytes(step, device) for name, step in steps.items()}
    timings = time_in_turn(steps, args.seconds, device, f"N = {n}: timing")
    for name, timing in timings.items():  # the limits first: what the others are compared with
        ratio = ratio_to_limit(name, timing.median)
        results.note(rows[name], **asdict(timing), memory=memory[name], ratio=ratio, gpu=None)
    for name, row in rows.items():
        if row.get("median") and row.get("ratio") is None:  # timed once, before its limit was
            results.note(row, ratio=ratio_to_limit(name, row["median"]))
    for name, step in steps.items():
        results.note(rows[name], gpu=gpu_seconds(step, device))


def check_time(longest: float, name: str, n: int, before: list[Row]) -> None:
    """Raises:
    Missing: a step would take longer than ``longest`` seconds, by what it took at the size before.
    """
    for row in reversed(before):
        if row["name"] == name and "median" in row:
            expected = row["median"] * (n / row["batch"]) ** 2
            if expected > longest:
                raise Missing(f"would take about {expected:.0f} s")
            return


def choose_rivals(args: argparse.Namespace, dtype: torch.dtype) -> Iterator[Rival]:
    yield from fused_rivals(args.backends, dtype == torch.float32)
    for rival in RIVALS:
        if args.rivals is None or rival.name in args.rivals:
            yield rival


def make_batch(n: int, d: int, device: torch.device, dtype: torch.dtype, temperature: float) -> Batch:
    query, key = embeddings(n, d, device)
    return Batch(query.to(dtype), key.to(dtype), temperature)


def ready(rival: Rival, batch: Batch) -> Loss:
    (n, d), device = batch.query.shape, batch.query.device
    if rival.gpu_only and device.type != "cuda":
        raise Missing("runs on GPUs only")
    needed, there = rival.estimated_bytes(n, d), available_bytes(device)
    if needed > 0.8 * there:
        raise Missing(f"would take about {needed / 1e9:.0f} GB, {there / 1e9:.0f} GB are free")
    if rival.bytes_per_pair_and_dim and device.type == "cpu" and n * n * d > 4e8:
        raise Missing(f"would take minutes: {n}² · {d} elements in each temporary")
    return rival.make(batch)


def check(rival: Rival, loss: Loss, batch: Batch) -> float:
    """Largest relative error of loss and gradients, in float64, on the batch's first rows.

    Raises:
        Wrong: it computes something else.
    """
    rows = min(CHECKED_ROWS, batch.query.shape[0])
    head = Batch(batch.query[:rows], batch.key[:rows], batch.temperature)
    if rows < batch.query.shape[0]:
        loss = rival.make(head)
    got = loss_and_gradients(loss, head.query, head.key)

    def info_nce(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return reference.info_nce(q, k, temperature=batch.temperature, symmetric=rival.symmetric)

    exact = rival.exact(head) if rival.exact else info_nce
    expected = loss_and_gradients(exact, head.query.double(), head.key.double())
    error = max(float((g.double() - e).norm() / e.norm()) for g, e in zip(got, expected, strict=True))
    tolerance = BF16_OPERANDS_TOLERANCE if rival.name.endswith("bf16") else TOLERANCE[batch.query.dtype]
    if not error <= tolerance:
        raise Wrong(f"relative error {error:.1e} against the reference, {tolerance:.0e} is allowed")
    return error


def loss_and_gradients(loss: Loss, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, ...]:
    query, key = query.detach().requires_grad_(), key.detach().requires_grad_()
    value = loss(query, key)
    return value.detach(), *torch.autograd.grad(value, (query, key))


def limit_step(batch: Batch, products: int) -> Step:
    """Three products, or four with S made twice, in chunks of rows where S is too large."""
    query, key = batch.query, batch.key
    n = query.shape[0]
    rows = max(1, min(n, LIMIT_BYTES // (key.shape[0] * query.element_size())))
    similarity = query.new_empty(rows, key.shape[0])
    query_grad, key_grad = torch.empty_like(query), torch.empty_like(key)

    def run() -> None:
        for begin in range(0, n, rows):
            chunk = query[begin : begin + rows]
            tile = similarity[: chunk.shape[0]]
            for _ in range(products - 2):
                torch.mm(chunk, key.T, out=tile)
            torch.mm(tile, key, out=query_grad[begin : begin + rows])
            if begin == 0:
                torch.mm(tile.T, chunk, out=key_grad)
            else:
                key_grad.addmm_(tile.T, chunk)

    return run


if __name__ == "__main__":
    sys.exit(exit_status(main()))
