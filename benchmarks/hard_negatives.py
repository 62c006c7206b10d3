"""Times InfoNCE with HNCSE's hard-negative mixing, forward + backward, against other ways to compute the same.

    python benchmarks/hard_negatives.py                              N = 64 and 1024, k = 10, m = 40
    python benchmarks/hard_negatives.py --batch-sizes 4096 -k 32 --num-mixed 100 --rivals none

`x plain` is a candidate's time over that of the plain fused InfoNCE step on the first backend. `authors' loop` is the
published form, row by row in Python; `eager` is vectorised and builds the (N, m, D) mixtures; both take float32 copies of
the inputs. Every candidate is checked in float64 with the pairs it drew before it is timed. The selections, without a
loss, are timed beside them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import hicl_fast
import hicl_fast.functional as HF
from hicl_fast import FusedInfoNCELoss, HardNegativeMixing, reference
from hicl_fast._command import Parser, command, device, needs, positive, whole
from hicl_fast.ops.backends.registry import NAMES
from hicl_fast.ops.common.arguments import MOST_NEGATIVES

with needs("bench", __name__):
    from inputs import embeddings, gradient_step
    from measure import Step, available_bytes, duration, gpu_seconds, machine, peak_bytes, time_in_turn
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

PLAIN = "InfoNCE without mixing"
TEMPERATURE = 0.05
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
Loss = Callable[..., Tensor]  # query (N, D), key (N, D), pairs (N, m, 2) -> ()


@command("bench")
def main(argv: list[str] | None = None) -> list[Row]:
    args = parse(argv)
    if args.measured:
        return redraw(args, PLAIN, "x plain")
    if args.threads:
        torch.set_num_threads(args.threads)
    place = torch.device(args.device)
    about = machine(place) | {"dim": args.dim, "dtype": args.dtype, "k": args.k, "num_mixed": args.num_mixed}
    print_about(about)
    results = Results(about, args.json)
    for n in args.batch_sizes:
        measure_batch(args, n, place, results)
        print(table([row for row in results.rows if row["batch"] == n], "x plain"), flush=True)
    if args.plot:
        plot(results.rows, about, PLAIN, args.plot)
    return results.rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    available = [status.name for status in hicl_fast.backends() if status.available]
    add("--batch-sizes", type=whole(2), nargs="+", default=[64, 1024], metavar="N")
    add("-k", type=whole(2, MOST_NEGATIVES), default=10, help="hard negatives of a row")
    add("--num-mixed", type=whole(1), default=40, metavar="M", help="mixtures for each row")
    add("--dim", type=whole(1), default=768)
    add("--dtype", choices=[str(t).removeprefix("torch.") for t in TOLERANCE], default="float32")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backends", nargs="+", choices=NAMES, default=available[::-1], metavar="NAME")
    add("--rivals", nargs="+", choices=["none", *RIVALS], default=list(RIVALS), metavar="NAME", help="or none")
    add("--seconds", type=positive, default=10.0, help="of timing for each batch size")
    add("--threads", type=whole(1), help="default: PyTorch's")
    add_output_options(parser)
    args = parser.parse_args(argv)
    if args.k > min(args.batch_sizes) - 1:
        parser.error(f"k: expected at most {min(args.batch_sizes) - 1}, a row's negatives, got {args.k}")
    check_backends(args, "hard_negatives")
    return args


def measure_batch(args: argparse.Namespace, n: int, device: torch.device, results: Results) -> None:
    query, key = (x.to(getattr(torch, args.dtype)) for x in embeddings(n, args.dim, device))
    pairs = HF.random_pairs(n, args.num_mixed, args.k, 0, device)
    rows: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    candidates: dict[str, Callable[[Row], Step]] = {PLAIN: partial(plain_step, args, query, key)}
    candidates |= {f"hicl_fast {name}": partial(fused_step, args, name, query, key, results) for name in args.backends}
    candidates |= {
        name: partial(rival_step, args, name, query.float(), key.float(), pairs, results)
        for name in args.rivals
        if name != "none"
    }
    candidates |= {name: partial(tried, step) for name, step in selections(args, query, key).items()}
    for name, make in tqdm(candidates.items(), desc=f"N = {n}: checking", leave=False, file=sys.stderr):
        row = rows[name] = results.start(n, name)
        with results.attempt(row, ours=name not in RIVALS):
            step = make(row)
            once = duration(step, device)
            if once <= args.seconds / 5:
                steps[name] = step
            else:
                results.note(row, median=once, fastest=once, slowest=once, memory=None, gpu=None, ratio=None)
    memory = {name: peak_bytes(step, device) for name, step in steps.items()}
    timings = time_in_turn(steps, args.seconds, device, f"N = {n}: timing")
    for name, timing in timings.items():
        results.note(rows[name], **asdict(timing), memory=memory[name], ratio=None, gpu=None)
    for row in rows.values():
        if "median" in row and "median" in rows[PLAIN]:
            results.note(row, ratio=row["median"] / rows[PLAIN]["median"])
    for name, step in steps.items():
        results.note(rows[name], gpu=gpu_seconds(step, device))


def plain_step(args: argparse.Namespace, query: Tensor, key: Tensor, row: Row) -> Step:
    """On the first backend that does it; the last one's refusal is the row's."""
    for backend in args.backends:
        step = gradient_step(partial(plain, backend=backend), query, key)
        try:
            return tried(step, row)
        except hicl_fast.BackendError as error:
            refusal = error
    raise refusal


def fused_step(args: argparse.Namespace, backend: str, query: Tensor, key: Tensor, results: Results, row: Row) -> Step:
    loss = fused(args, backend)
    results.note(row, error=check_fused(loss, query, key))
    return gradient_step(loss, query, key)


def rival_step(
    args: argparse.Namespace, name: str, query: Tensor, key: Tensor, pairs: Tensor, results: Results, row: Row
) -> Step:
    reason = hindrance(name, len(query), args, query.device)
    if reason:
        raise Missing(reason)
    loss = partial(RIVALS[name], pairs=pairs)
    results.note(row, error=check(loss, query, key, args.k, pairs))
    return gradient_step(loss, query, key)


def tried(step: Step, row: Row) -> Step:
    step()
    return step


def selections(args: argparse.Namespace, query: Tensor, key: Tensor) -> dict[str, Step]:
    steps: dict[str, Step] = {
        f"selection: {backend}": partial(HF.hard_negatives, query, key, args.k, backend=backend)
        for backend in args.backends
    }
    steps["selection: torch.topk of N × N"] = lambda: hardest(F.normalize(query) @ F.normalize(key).T, args.k)
    return steps


# --- the same loss in several ways -----------------------------------------------------------------------------------


def plain(query: Tensor, key: Tensor, backend: str) -> Tensor:
    return HF.info_nce(query, key, temperature=TEMPERATURE, backend=backend)


def fused(args: argparse.Namespace, backend: str) -> FusedInfoNCELoss:
    mixing = HardNegativeMixing(args.k, args.num_mixed, seed=0, backend=backend)
    return FusedInfoNCELoss(TEMPERATURE, hard_negative_mixing=mixing, backend=backend)


def hardest(similarity: Tensor, k: int) -> Tensor:  # (N, N) -> (N, k)
    own = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    return similarity.masked_fill(own, -torch.inf).topk(k, dim=1).indices


def eager(query: Tensor, key: Tensor, pairs: Tensor) -> Tensor:
    unit_query = F.normalize(query)
    similarity = unit_query @ F.normalize(key).T
    index = hardest(similarity.detach(), int(pairs.max()) + 1)
    first, second = (key[index.gather(1, pairs[..., side])] for side in (0, 1))
    mixed = torch.einsum("nd,nmd->nm", unit_query, F.normalize((first + second) / 2, dim=-1))
    logits = torch.cat([similarity, mixed], dim=1) / TEMPERATURE
    return F.cross_entropy(logits, torch.arange(len(query), device=query.device))


def authors_loop(query: Tensor, key: Tensor, pairs: Tensor) -> Tensor:
    """Row by row, one mixture after the other."""
    k = int(pairs.max()) + 1
    losses = []
    for i in range(len(query)):
        similarity = F.cosine_similarity(query[i : i + 1], key)
        others = torch.cat([similarity[:i], similarity[i + 1 :]])
        keys = torch.cat([key[:i], key[i + 1 :]])
        index = others.detach().topk(k).indices
        mixed = []
        for a, b in pairs[i].tolist():
            g = 0.5 * keys[index[a]] + 0.5 * keys[index[b]]
            mixed.append(F.cosine_similarity(query[i], g, dim=0))
        logits = torch.cat([similarity[i : i + 1], others, torch.stack(mixed)]) / TEMPERATURE
        losses.append(torch.logsumexp(logits, dim=0) - logits[0])
    return torch.stack(losses).mean()


RIVALS: dict[str, Loss] = {"eager": eager, "authors' loop": authors_loop}


def hindrance(name: str, n: int, args: argparse.Namespace, device: torch.device) -> str:
    """Why a rival can't take part at this size; empty where it can."""
    if name == "authors' loop" and n > 256:
        return f"takes about {n * 4e-3:.0f} s a step"
    needed, there = 24 * n * args.num_mixed * args.dim + 24 * n * n, available_bytes(device)
    if name == "eager" and needed > 0.8 * there:
        return f"would take about {needed / 1e9:.0f} GB, {there / 1e9:.0f} GB are free"
    return ""


def check_fused(loss: FusedInfoNCELoss, query: Tensor, key: Tensor) -> float:
    loss(query, key)
    mixing = loss.hard_negative_mixing
    assert mixing is not None and mixing.mixed is not None
    index, pairs, seed_step = mixing.mixed.index, mixing.mixed.pairs, mixing.step - 1

    def again(q: Tensor, k: Tensor) -> Tensor:
        mixing.step = seed_step  # the same pairs
        return loss(q, k)

    return check(again, query, key, index.shape[1], pairs)


def check(loss: Callable[[Tensor, Tensor], Tensor], query: Tensor, key: Tensor, k: int, pairs: Tensor) -> float:
    """The largest relative error of loss and gradients against the reference in float64.

    Raises:
        Wrong: it computes something else.
    """

    def oracle(q: Tensor, keys: Tensor) -> Tensor:
        _, index = reference.hard_negatives(q.detach(), keys.detach(), k)
        extra = reference.mixed_negative_logits(q, keys, index, pairs, temperature=TEMPERATURE)
        return reference.info_nce(q, keys, temperature=TEMPERATURE, extra_logits=extra)

    results = []
    for function, dtype in ((loss, query.dtype), (oracle, torch.float64)):
        q, keys = (x.detach().to(dtype).clone().requires_grad_() for x in (query, key))
        value = function(q, keys)
        results.append([value.detach(), *torch.autograd.grad(value, (q, keys))])
    error = max(float((got.double() - exact).norm() / exact.norm()) for got, exact in zip(*results, strict=True))
    tolerance = TOLERANCE[query.dtype]
    if not error <= tolerance:
        raise Wrong(f"relative error {error:.1e} against the reference, {tolerance:.0e} is allowed")
    return error


if __name__ == "__main__":
    sys.exit(exit_status(main()))
