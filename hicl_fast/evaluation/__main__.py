"""``python -m hicl_fast.evaluation``: the STS scores of a saved sentence encoder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hicl_fast._command import Parser, command, device, needs, output_file, whole
from hicl_fast.evaluation.scoring import average, evaluate, table
from hicl_fast.evaluation.senteval import DEVELOPMENT_TASK, TASKS, find_root

with needs("evaluation", __name__):
    from hicl_fast.trainer.encoder import MODEL_HELP, POOLER_HELP, SentenceEncoder
    from hicl_fast.trainer.token_pooling import POOLERS


@command("evaluation")
def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    find_root(args.data_dir)  # before the model is opened
    encoder = SentenceEncoder.from_pretrained(
        args.model_name_or_path,
        pooler_type=args.pooler_type,
        max_seq_length=args.max_seq_length,
        segment_length=args.segment_length,
        batch_size=args.batch_size,
        device=args.device,
    )
    scores = evaluate(encoder.encode, args.data_dir, args.tasks)
    print(f"{args.model_name_or_path}, {encoder.description}, Spearman × 100\n\n{table(scores)}")
    if args.json is not None:
        args.json.write_text(json.dumps({**scores, "avg": average(scores)}, indent=2) + "\n")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m hicl_fast.evaluation", description=__doc__)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help=MODEL_HELP)
    add(
        "--data_dir",
        required=True,
        type=Path,
        help="SentEval's data folder, which holds downstream/STS and downstream/SICK",
    )
    names = [*TASKS, DEVELOPMENT_TASK]
    add("--tasks", nargs="+", choices=names, default=list(TASKS), metavar="TASK", help=f"out of: {', '.join(names)}")
    add("--pooler_type", choices=sorted(POOLERS), help=POOLER_HELP)
    add(
        "--max_seq_length",
        type=whole(1),
        help="tokens kept of a text, special ones included; default: all the model takes",
    )
    add(
        "--segment_length",
        type=whole(1),
        help="embed segments of this many tokens and pool them, as HiCL does in training",
    )
    add("--batch_size", type=whole(1), default=64)
    add("--device", type=device, help="default: cuda where there is one, otherwise cpu")
    add("--json", type=output_file, help="also write the scores to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
