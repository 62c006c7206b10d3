"""Times the gradient paradigm's objectives, forward + backward, against the matrix products that their equations need.

    python benchmarks/paradigm.py                                    N = 512 and 4096, every objective
    python benchmarks/paradigm.py --batch-sizes 1024 --objectives mpt mhe+gd+w+r --backends cpp torch

`x limit` is a candidate's time over that of its products alone, with PyTorch's BLAS: `products` of N×D with D×N numbers
(2 N² D operations each; for vicreg and barlow_twins as they stand, products of D×N with N×D where D < N). `eager` is
the reference, which holds N×N. An objective is written with its modifications, as mhe+gd+w+r. Every candidate is checked
against the reference in float64 before it is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

import hicl_fast
import hicl_fast.functional as HF
from hicl_fast import reference
from hicl_fast._command import Parser, command, device, needs, positive, whole
from hicl_fast.ops.paradigm.settings import HINGES, MODIFIABLE, OBJECTIVES

with needs("bench", __name__):
    from inputs import embeddings, gradient_step
    from measure import Step, available_bytes, machine, peak_bytes, time_in_turn
    from report import (
        Missing,
        Results,
        Row,
        Wrong,
        add_output_options,
        check_backends,
        exit_status,
        plot,
        print_about,
        redraw,
        table,
    )
    from tqdm import tqdm

LIMIT = "one product"
TOLERANCE = 1e-3
NAMES = tuple(OBJECTIVES) + tuple(f"{name}+gd+w+r" for name in MODIFIABLE)


@command("bench")
def main(argv: list[str] | None = None) -> list[Row]:
    args = parse(argv)
    if args.measured:
        return redraw(args, LIMIT, "x limit")
    if args.threads:
        torch.set_num_threads(args.threads)
    place = torch.device(args.device)
    about = machine(place) | {"dim": args.dim, "dtype": "float32"}
    print_about(about)
    results = Results(about, args.json)
    for n in args.batch_sizes:
        measure_batch(args, n, place, results)
        print(table([row for row in results.rows if row["batch"] == n], "x limit"), flush=True)
    if args.plot:
        plot(results.rows, about, LIMIT, args.plot)
    return results.rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    available = [
        status.name for status in hicl_fast.backends() if status.available and status.name != "cuda"
    ]  # it does two
    add("--batch-sizes", type=whole(2), nargs="+", default=[512, 4096], metavar="N")
    add("--objectives", nargs="+", default=list(NAMES), metavar="NAME", help=", ".join(NAMES))
    add("--dim", type=whole(1), default=768)
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backends", nargs="+", choices=available, default=available[::-1], metavar="NAME")
    add("--eager", action="store_true", help="time the reference too")
    add("--seconds", type=positive, default=20.0, help="of timing for each batch size")
    add("--threads", type=whole(1), help="default: PyTorch's")
    add_output_options(parser)
    args = parser.parse_args(argv)
    for name in args.objectives:
        try:
            options(name)
        except ValueError as error:
            parser.error(f"objectives: {name}: {error}")
    check_backends(args, "paradigm")
    return args


def options(name: str) -> dict[str, Any]:
    """``"mhe+gd+r"`` as the arguments of ``functional.paradigm``."""
    objective, *modified = name.split("+")
    ratio = 1.5 if "r" in modified else 1.0
    HF.paradigm_settings(
        objective,  # type: ignore[arg-type]
        modified,  # type: ignore[arg-type]
        None,
        0.05,
        1.0,
        dissipation="softmax",
        weight="softmax",
        ratio=ratio,
    )
    # A tenth of the usual 1/τ: float32 keeps few digits of vicreg's and barlow_twins' weights e^(1/τ) of a row with itself.
    cold = objective in ("vicreg", "barlow_twins") and "w" in modified
    return {"objective": objective, "modified": modified, "ratio": ratio, "temperature": 0.5 if cold else 0.05}


def products(name: str, n: int, d: int) -> float:
    """How many products of 2 N² D operations the equations need."""
    objective, *modified = name.split("+")
    within = 2 if "gd" in modified else 0  # each view's nearest neighbours
    if objective in HINGES:
        return 1
    if objective in ("info_nce", "arccon"):
        return 3
    if objective == "mhs":
        return 1 + within
    if objective in ("custom", "mhe") or "w" in modified:
        return 4  # a row's neighbours come with its weights
    thin = 3 if objective == "barlow_twins" and d < n else 4
    return thin * min(n, d) / n + within


def measure_batch(args: argparse.Namespace, n: int, device: torch.device, results: Results) -> None:
    query, key = embeddings(n, args.dim, device)
    out = torch.empty(n, n, device=device)
    steps: dict[str, Step] = {LIMIT: lambda: torch.mm(query, key.T, out=out)}
    rows: dict[str, Row] = {LIMIT: results.start(n, LIMIT, products=1.0)}
    for name in tqdm(args.objectives, desc=f"N = {n}: checking", leave=False, file=sys.stderr):
        exact = None
        if hindrance("eager", 2 * n, device) == "":
            exact = gradients(candidate(name, "eager"), query.double(), key.double())
        for way in [*args.backends, *(["eager"] if args.eager else [])]:
            title = f"{name}: {way}"
            row = rows[title] = results.start(n, title, products=products(name, n, args.dim))
            with results.attempt(row, ours=True):
                if reason := hindrance(way, n, device):
                    raise Missing(reason)
                loss = candidate(name, way)
                if exact is not None:
                    results.note(row, error=check(loss, query, key, exact))
                step = gradient_step(loss, query, key)
                step()
                steps[title] = step
    memory = {name: peak_bytes(step, device) for name, step in steps.items()}
    timings = time_in_turn(steps, args.seconds, device, f"N = {n}: timing")
    limit = timings[LIMIT].median
    for name, timing in timings.items():
        ratio = timing.median / (limit * rows[name]["products"])
        results.note(rows[name], **asdict(timing), memory=memory[name], ratio=ratio)


def candidate(name: str, way: str) -> Callable[[Tensor, Tensor], Tensor]:
    chosen = options(name)
    if way == "eager":
        return lambda u, v: reference.paradigm(u, v, **chosen)
    return lambda u, v: HF.paradigm(u, v, backend=way, **chosen)


def hindrance(way: str, n: int, device: torch.device) -> str:
    """Why a way can't take part at this size; empty where it can."""
    needed, there = 40 * n * n, available_bytes(device)
    if way == "eager" and needed > 0.5 * there:
        return f"would take about {needed / 1e9:.0f} GB, {there / 1e9:.0f} GB are free"
    return ""


def gradients(loss: Callable[[Tensor, Tensor], Tensor], query: Tensor, key: Tensor) -> list[Tensor]:
    """The loss and both gradients, in float64."""
    u, v = (x.detach().clone().requires_grad_() for x in (query, key))
    value = loss(u, v)
    return [x.double() for x in (value.detach(), *torch.autograd.grad(value, (u, v)))]


def check(loss: Callable[[Tensor, Tensor], Tensor], query: Tensor, key: Tensor, exact: list[Tensor]) -> float:
    """The largest relative error of loss and gradients.

    Raises:
        Wrong: it computes something else.
    """
    got = gradients(loss, query, key)
    error = max(float((x - y).norm() / y.norm().clamp_min(1e-30)) for x, y in zip(got, exact, strict=True))
    if not error <= TOLERANCE:
        raise Wrong(f"relative error {error:.1e} against the reference, {TOLERANCE:.0e} is allowed")
    return error


if __name__ == "__main__":
    sys.exit(exit_status(main()))
