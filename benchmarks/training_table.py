"""Trains methods with several seeds and prints one table of STS scores: each method's mean and spread.

    python benchmarks/training_table.py --start START --data_dir senteval --train_file wiki12k.txt --output_dir runs \\
        --methods simcse hicl uniformity --seeds 0 1 2 -- --max_train_samples 6016 --temp 0.1 --use_cpu

What follows `--` goes to `python -m hicl_fast.trainer` as it stands, for every run. A run whose scores are in the output
folder already is not done again. `uniformity` is a control and no method: it spreads the embeddings and has no positives,
so it says how much of a gain is that alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hicl_fast._command import Parser, command, input_file, needs, output_file, output_folder, usage, whole
from hicl_fast.evaluation import TASKS, average, evaluate, find_root
from hicl_fast.evaluation.senteval import DEVELOPMENT_TASK

with needs("trainer", __name__):
    from tqdm import tqdm

    from hicl_fast.trainer import cli
    from hicl_fast.trainer.checks import Diverged, LossMismatch
    from hicl_fast.trainer.cli import train
    from hicl_fast.trainer.encoder import SentenceEncoder
    from hicl_fast.trainer.methods import METHODS, Views
    from hicl_fast.trainer.token_pooling import POOLERS

COLUMNS = (*TASKS, "avg", DEVELOPMENT_TASK)
Scores = dict[str, float | None]


class UniformityLoss(nn.Module):
    """The mean over rows of log Σ e^(similarity / τ) over the other rows' keys."""

    last: ClassVar[dict[str, Tensor]] = {}

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, query: Tensor, key: Tensor) -> Tensor:  # (N, D), (N, D)
        logits = F.normalize(query) @ F.normalize(key).T / self.temperature
        own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        return logits.masked_fill(own, -torch.inf).logsumexp(dim=1).mean()


class Uniformity:
    """The control, in the shape of the trainer's methods."""

    segmented: ClassVar[bool] = False
    most_columns: ClassVar[int | None] = 2
    max_seq_length: ClassVar[int] = 32
    options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, args: Any, seed: int = 0) -> None:  # it draws nothing
        self.fused: nn.Module = UniformityLoss(args.temp)

    def loss(self, views: Views) -> Tensor:
        return self.fused(views.anchor, views.positive)

    reference = loss


@command("trainer", Diverged, LossMismatch)
def main(argv: list[str] | None = None) -> dict[str, list[Scores]]:
    METHODS.setdefault("uniformity", Uniformity)
    args = parse(sys.argv[1:] if argv is None else argv)
    scores = {"start": [score(args.start, args)]}
    runs = [(method, seed) for method in args.methods for seed in args.seeds]
    for method, seed in tqdm(runs, desc="runs", file=sys.stderr):
        scores.setdefault(method, []).append(trained(method, seed, args))
    print(table(scores))
    if args.json:
        args.json.write_text(json.dumps(scores, indent=1) + "\n")
    return scores


def parse(argv: list[str]) -> argparse.Namespace:
    own, for_trainer = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--start", required=True, help="the model every run starts from: a hub name or a folder")
    add("--data_dir", required=True, type=Path, help="SentEval's data folder")
    add("--train_file", required=True, type=input_file)
    add("--output_dir", required=True, type=output_folder, help="holds a folder for each run")
    add("--methods", nargs="+", choices=list(METHODS), default=["simcse", "hicl", "uniformity"], metavar="METHOD")
    add("--seeds", nargs="+", type=whole(0), default=[0, 1, 2], metavar="SEED")
    add("--pooler_type", choices=sorted(POOLERS), default="avg")
    add("--json", type=output_file, help="write every run's scores to this file")
    args = parser.parse_args(own)
    args.for_trainer = for_trainer
    for method in args.methods:  # before the first of them has trained for minutes
        cli.parse(for_run(method, args.seeds[0], args))
    with usage():
        find_root(args.data_dir)
    return args


def for_run(method: str, seed: int, args: argparse.Namespace) -> list[str]:
    """The trainer's arguments."""
    arguments = {
        "method": method,
        "seed": seed,
        "model_name_or_path": args.start,
        "train_file": args.train_file,
        "output_dir": args.output_dir / f"{method}-{seed}",
        "pooler_type": args.pooler_type,
        "save_strategy": "no",
        "overwrite_output_dir": True,
    }
    return [part for name, value in arguments.items() for part in (f"--{name}", str(value))] + args.for_trainer


def trained(method: str, seed: int, args: argparse.Namespace) -> Scores:
    folder = args.output_dir / f"{method}-{seed}"
    kept = folder / "scores.json"
    if not kept.is_file():
        train(for_run(method, seed, args))
        kept.write_text(json.dumps(score(folder, args), indent=1) + "\n")
    return json.loads(kept.read_text())


def score(model: str | Path, args: argparse.Namespace) -> Scores:
    encoder = SentenceEncoder.from_pretrained(model, pooler_type=args.pooler_type)
    scores = evaluate(encoder.encode, args.data_dir, (*TASKS, DEVELOPMENT_TASK))
    return {**scores, "avg": average(scores)}


def table(scores: dict[str, list[Scores]]) -> str:
    rows = [["", "runs", *COLUMNS], ["---"] * (2 + len(COLUMNS))]
    for name, runs in scores.items():
        rows.append([name, str(len(runs)), *(cell([run[column] for run in runs]) for column in COLUMNS)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def cell(values: list[float | None]) -> str:
    """Mean ± standard deviation over the runs."""
    found = [value for value in values if value is not None]
    if len(found) < len(values):
        return "missing"
    spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.2f}{spread}"


if __name__ == "__main__":
    main()
