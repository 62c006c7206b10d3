"""Times InfoNCE with each rule of its columns against the plain loss, forward + backward.

    python benchmarks/rules.py                        every backend that is there
    python benchmarks/rules.py --batch-sizes 4096 --json rules.json

`x plain` is a candidate's median over that of the same backend's plain loss. Own negatives are seven for each row. The eager
rows are what people write: a mask (N, N) of limits and ids, own negatives by einsum (N, K, D), negatives of all rows shared.
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
from hicl_fast import reference
from hicl_fast._command import Parser, command, device, needs, positive, whole
from hicl_fast.ops.backends.registry import NAMES

with needs("bench", __name__):
    from measure import Step, machine, peak_bytes, time_in_turn
    from report import Results, Row, Wrong, add_output_options, exit_status, print_about, table

NUM_OWN = 7
TEMPERATURE = 0.05
MARGIN = 0.1
PLAIN = "plain"
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # query, key (N, D), own (N, K, D), ids (N, 2) int64 -> ()


def _plain(query: Tensor, key: Tensor, own: Tensor, ids: Tensor, **options: object) -> Tensor:
    return HF.info_nce(query, key, temperature=TEMPERATURE, **options)  # type: ignore[arg-type]


def _limit_and_relations(query: Tensor, key: Tensor, own: Tensor, ids: Tensor, **options: object) -> Tensor:
    return _plain(query, key, own, ids, false_negative_margin=MARGIN, query_group=ids, key_group=ids, **options)


def _hardness(query: Tensor, key: Tensor, own: Tensor, ids: Tensor, **options: object) -> Tensor:
    return HF.info_nce(query, HF.Columns(key, hardness=5.0), temperature=TEMPERATURE, **options)  # type: ignore[arg-type]


def _own(query: Tensor, key: Tensor, own: Tensor, ids: Tensor, **options: object) -> Tensor:
    return _plain(query, key, own, ids, own_negatives=own, **options)


def _next_too(query: Tensor) -> dict[str, Tensor]:
    """The next key is a positive too."""
    row = torch.arange(len(query), device=query.device)
    target = torch.stack([row, (row + 1) % len(row)], dim=1).flatten()
    return {"target": target, "target_offsets": torch.arange(len(row) + 1, device=query.device) * 2}


def _two_positives(query: Tensor, key: Tensor, own: Tensor, ids: Tensor, **options: object) -> Tensor:
    return _plain(query, key, own, ids, **_next_too(query), **options)


def _decoupled(query: Tensor, key: Tensor, own: Tensor, ids: Tensor, **options: object) -> Tensor:
    rows = HF.log_sum_exp(query, key, temperature=TEMPERATURE, **options)  # type: ignore[arg-type]
    return (rows.negative - rows.positive).mean()


OURS: dict[str, Callable[..., Tensor]] = {
    PLAIN: _plain,
    "limit, 2 relations": _limit_and_relations,
    "hardness": _hardness,
    "own negatives": _own,
    "own, in_batch=False": partial(_own, in_batch=False),
    "2 positives": _two_positives,
    "log_sum_exp": _decoupled,
}


def eager_mask(query: Tensor, key: Tensor, own: Tensor, ids: Tensor) -> Tensor:
    similarity = F.normalize(query.float(), dim=1) @ F.normalize(key.float(), dim=1).T
    limit = similarity.diagonal().detach()[:, None] + MARGIN
    mask = (similarity > limit) | (ids[:, None] == ids[None]).any(dim=2)
    mask.fill_diagonal_(False)
    target = torch.arange(len(query), device=query.device)
    return F.cross_entropy((similarity / TEMPERATURE).masked_fill(mask, -torch.inf), target)


def eager_own(query: Tensor, key: Tensor, own: Tensor, ids: Tensor) -> Tensor:
    query, key, own = (F.normalize(x.float(), dim=-1) for x in (query, key, own))
    logits = torch.cat([query @ key.T, torch.einsum("nd,nkd->nk", query, own)], dim=1) / TEMPERATURE
    return F.cross_entropy(logits, torch.arange(len(query), device=query.device))


def shared(query: Tensor, key: Tensor, own: Tensor, ids: Tensor, backend: str) -> Tensor:
    """The same numbers as negatives of all rows, which is another loss: what own negatives save."""
    return HF.info_nce(query, key, negatives=own.flatten(0, 1), temperature=TEMPERATURE, backend=backend)


EAGER: dict[str, tuple[Loss, str]] = {  # and which of ours is the same loss
    "eager: mask": (eager_mask, "limit, 2 relations"),
    "eager: einsum": (eager_own, "own negatives"),
}


@command("bench")
def main(argv: list[str] | None = None) -> list[Row]:
    args = parse(argv)
    place = torch.device(args.device)
    about = machine(place) | {"dim": args.dim, "dtype": "float32", "own negatives": NUM_OWN}
    print_about(about)
    results = Results(about, args.json)
    for batch_size in args.batch_sizes:
        measure(args, batch_size, place, results)
        rows = [row for row in results.rows if row["batch_size"] == batch_size]
        print(f"\nN = {batch_size}", table(rows, "x plain"), flush=True)
    return results.rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    available = [status.name for status in hicl_fast.backends() if status.available and status.name != "cuda"]
    parser.add_argument("--batch-sizes", nargs="+", type=whole(2), default=[512, 4096], metavar="N")
    parser.add_argument("--dim", type=whole(1), default=768)
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", nargs="+", choices=NAMES, default=available[::-1], metavar="NAME")
    parser.add_argument("--seconds", type=positive, default=30.0, help="of timing for each batch size")
    add_output_options(parser, plots=False)
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, batch_size: int, place: torch.device, results: Results) -> None:
    generator = torch.Generator(place).manual_seed(0)
    query, key = (torch.randn(batch_size, args.dim, generator=generator, device=place) for _ in range(2))
    own = torch.randn(batch_size, NUM_OWN, args.dim, generator=generator, device=place)
    ids = torch.arange(batch_size, device=place)[:, None] // torch.tensor([2, 3], device=place)
    inputs = query.requires_grad_(), key.requires_grad_(), own.requires_grad_()

    losses: dict[str, tuple[Loss, str]] = {}
    for backend in args.backends:
        for rule, loss in OURS.items():
            losses[f"hicl_fast {backend}: {rule}"] = partial(loss, backend=backend), rule
        losses[f"hicl_fast {backend}: as many, shared"] = partial(shared, backend=backend), ""
    losses |= EAGER
    steps: dict[str, Step] = {}
    rows: dict[str, Row] = {}
    for name, (loss, rule) in losses.items():
        row = results.start(batch_size, name, batch_size=batch_size)
        with results.attempt(row, ours=name not in EAGER):
            if rule:
                results.note(row, error=check(loss, rule, *inputs, ids))
            step = step_of(loss, *inputs, ids)
            step()
            steps[name], rows[name] = step, row
    memory = {name: peak_bytes(step, place) for name, step in steps.items()}
    timings = time_in_turn(steps, args.seconds, place, f"N = {batch_size}")
    for name, timing in timings.items():
        backend = next((one for one in args.backends if name.startswith(f"hicl_fast {one}")), args.backends[0])
        plain = timings.get(f"hicl_fast {backend}: {PLAIN}")
        ratio = timing.median / plain.median if plain is not None else None
        results.note(rows[name], **asdict(timing), memory=memory[name], ratio=ratio)


def step_of(loss: Loss, query: Tensor, key: Tensor, own: Tensor, ids: Tensor) -> Step:
    inputs = (query, key, own)
    return lambda: torch.autograd.grad(loss(*inputs, ids), inputs, allow_unused=True)


def check(loss: Loss, rule: str, query: Tensor, key: Tensor, own: Tensor, ids: Tensor) -> float:
    """The relative error of the query's gradient, of the first rows alone, against the same loss by the reference in float64.

    Raises:
        Wrong: it computes something else.
    """
    few = min(len(query), 64)
    q, k, o = (x.detach()[:few].double().requires_grad_() for x in (query, key, own))
    (exact,) = torch.autograd.grad(_reference(rule, q, k, o, ids[:few]), q)
    q32, k32, o32 = (x.detach()[:few].requires_grad_() for x in (query, key, own))
    (got,) = torch.autograd.grad(loss(q32, k32, o32, ids[:few]), q32)
    error = float((got.double() - exact).norm() / exact.norm())
    if not error <= 1e-4:
        raise Wrong(f"relative error {error:.1e}, 1e-04 is allowed")
    return error


def _reference(rule: str, query: Tensor, key: Tensor, own: Tensor, ids: Tensor) -> Tensor:
    offsets = torch.arange(len(query) + 1, device=query.device) * own.shape[1]
    own_negatives: dict[str, object] = {"own_negatives": own.flatten(0, 1), "own_offsets": offsets}
    if rule.startswith("log_sum_exp"):
        rows = reference.log_sum_exp(query, key, temperature=TEMPERATURE)
        return (rows.negative - rows.positive).mean()
    options: dict[str, dict[str, object]] = {
        PLAIN: {},
        "limit, 2 relations": {"false_negative_margin": MARGIN, "query_group": ids, "key_group": ids},
        "hardness": {"key_hardness": 5.0},
        "own negatives": own_negatives,
        "own, in_batch=False": {**own_negatives, "in_batch": False},
        "2 positives": dict(_next_too(query)),
    }
    return reference.info_nce(query, key, temperature=TEMPERATURE, **options[rule])


if __name__ == "__main__":
    sys.exit(exit_status(main()))
