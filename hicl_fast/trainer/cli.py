"""Puts a run together: arguments, text, encoder, method, trainer, and the table of scores at the end."""

from __future__ import annotations

import json
import logging
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import HfArgumentParser, PreTrainedTokenizerBase, set_seed

from hicl_fast import NegativeQueue
from hicl_fast.evaluation import Task, average, evaluate, find_root, read_task, table
from hicl_fast.evaluation.senteval import DEVELOPMENT_TASK
from hicl_fast.trainer import checkpoints, scratch
from hicl_fast.trainer.arguments import DataArguments, MethodArguments, ModelArguments, TrainingArguments
from hicl_fast.trainer.checks import LossMismatch
from hicl_fast.trainer.encoder import SentenceEncoder
from hicl_fast.trainer.methods import METHODS, Method
from hicl_fast.trainer.model import POOLING_KEY, load_encoder, load_tokenizer, max_tokens, renew_pooler
from hicl_fast.trainer.rescue import Stopped
from hicl_fast.trainer.slicing import ViewCollator
from hicl_fast.trainer.text import TrainingText, read_training_text
from hicl_fast.trainer.trainer import ContrastiveTrainer

SCORES_FILE = "sts_scores.json"

logger = logging.getLogger("hicl_fast.trainer")


@dataclass(frozen=True)
class Arguments:
    model: ModelArguments
    data: DataArguments
    method: MethodArguments
    training: TrainingArguments


def main(argv: list[str] | None = None) -> None:
    """The command; what a user can put right is said in one line."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        train(argv)
    except (ValueError, OSError, LossMismatch) as error:
        sys.exit(f"error: {error}")
    except Stopped as stopped:
        sys.exit(128 + stopped.number)  # as a shell reports a program that a signal ended
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def train(argv: list[str] | None = None) -> dict[str, float | None]:
    """Trains as the arguments say and returns the STS scores of the saved model, empty without ``--data_dir``.

    Raises:
        ValueError, OSError: an argument or a file is not as expected.
        LossMismatch: ``--check_every`` found the fused loss wrong.
        Stopped: Ctrl-C or SIGTERM. Then, as when a step fails, what was trained is in a checkpoint.
    """
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, MethodArguments, TrainingArguments), prog="python -m hicl_fast.trainer"
    )  # type: ignore[arg-type]
    args = Arguments(*parser.parse_args_into_dataclasses(argv))
    trainer, checkpoint = build(args)
    stop = trainer.last_step.stop
    with stop.heard():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.save_model()
        trainer.save_state()
    if stop.asked is not None:  # in the last step: it is done but for the report
        raise Stopped(stop.asked)
    return report(args) if trainer.is_world_process_zero() else {}


def build(args: Arguments) -> tuple[ContrastiveTrainer, Path | None]:
    """A trainer ready to run, and the checkpoint it is to go on from."""
    training, output_dir = args.training, Path(args.training.output_dir)  # type: ignore[arg-type]
    if args.method.gather != "none" and args.method.check_every and training.world_size > 1:
        raise ValueError(
            "check_every: expected 0 with --gather, whose loss one process's reference has not the documents for, "
            f"got {args.method.check_every}"
        )
    development = read_development_task(args)
    text = read_training_text(args.data.train_file, args.data.max_train_samples)
    logger.info("%s: %d rows, %d empty ones skipped", args.data.train_file, len(text.rows), text.skipped)

    checkpoint = choose_checkpoint(args, output_dir)
    set_seed(training.seed)
    source = checkpoint or model_source(args, text, output_dir)
    tokenizer = load_tokenizer(source)
    encoder, pooler_type = load_encoder(source, args.model.pooler_type)
    if pooler_type == "cls" and getattr(encoder.config, POOLING_KEY, None) != "cls":
        renew_pooler(encoder)
    if args.model.freeze_word_embeddings:
        encoder.get_input_embeddings().requires_grad_(False)

    method = METHODS[args.method.method](args.method, training.seed)
    trainer = ContrastiveTrainer(
        method=method,
        num_views=max(2, text.columns),
        pooler_type=pooler_type,
        saved_pooler_type="cls_before_pooler" if args.model.mlp_only_train else pooler_type,
        check_every=args.method.check_every,
        gradient_cache_chunk_size=training.gradient_cache_chunk_size,
        model=encoder,
        args=training,
        processing_class=tokenizer,
        data_collator=collator(args, method, text, tokenizer, max_tokens(encoder, tokenizer)),
        train_dataset=text.rows,
        eval_dataset=development,
    )
    return trainer, checkpoint


def read_development_task(args: Arguments) -> Task | None:
    """STS-B dev, which is scored during training; missing data is found out before training, not hours into it."""
    if args.data.data_dir is None:
        if args.training.eval_strategy != "no":
            raise ValueError(
                "data_dir: expected SentEval's data folder, as --eval_strategy and --eval_steps need, got none"
            )
        return None
    task = read_task(find_root(args.data.data_dir), DEVELOPMENT_TASK)
    if task is None and args.training.eval_strategy != "no":
        raise ValueError(f"data_dir: expected STS/STSBenchmark/sts-dev.csv in {args.data.data_dir}, but it is missing")
    return task


def choose_checkpoint(args: Arguments, output_dir: Path) -> Path | None:
    training = args.training
    checkpoint = checkpoints.choose_checkpoint(
        output_dir,
        training.resume_from_checkpoint,
        world_size=training.world_size,
        overwrite=training.overwrite_output_dir,
    )
    if checkpoint is None and training.process_index == 0:
        checkpoints.delete_checkpoints(output_dir)
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
    return checkpoint


def model_source(args: Arguments, text: TrainingText, output_dir: Path) -> str | Path:
    """What to open: ``scratch:small`` is first written to a folder, by one process for all."""
    name = args.model.model_name_or_path
    if not name.startswith("scratch:"):
        return name
    if name != scratch.NAME:
        raise ValueError(f"model_name_or_path: expected {scratch.NAME}, the only model made from scratch, got {name!r}")
    folder = output_dir / "scratch"
    with args.training.main_process_first(local=False, desc="making the model"):
        if args.training.process_index == 0:
            scratch.write_scratch_model((cell for row in text.rows for cell in row), folder)
    return folder


def collator(
    args: Arguments, method: Method, text: TrainingText, tokenizer: PreTrainedTokenizerBase, longest: int
) -> ViewCollator:
    """Slices as the method asks: a method without segments has one segment a document."""
    total = args.data.max_seq_length or method.max_seq_length
    segment_length = args.method.segment_length if method.segmented else total
    shortest = tokenizer.num_special_tokens_to_add() + 1
    name = "segment_length" if method.segmented else "max_seq_length"
    if not shortest <= segment_length <= longest:
        raise ValueError(f"{name}: expected {shortest} to {longest} tokens, as the model takes, got {segment_length}")
    if total < segment_length:
        raise ValueError(f"max_seq_length: expected at least one segment of {segment_length} tokens, got {total}")
    if method.segmented and text.columns > 1:
        raise ValueError(
            f"train_file: --method {args.method.method} expects documents only, since a pair's segments do not match; "
            f"got {text.columns} columns"
        )
    max_segments = total // segment_length
    return ViewCollator(tokenizer, segment_length, max_segments, with_groups=keeps_keys(method.fused))


def keeps_keys(loss: nn.Module) -> bool:
    """Whether a loss compares with keys of earlier batches, of which some may be of the same text."""
    return any(isinstance(module, NegativeQueue) for module in loss.modules())


def report(args: Arguments) -> dict[str, float | None]:
    """Scores the saved model, as anyone who opens it will, prints the table and writes it as JSON."""
    if args.data.data_dir is None:
        return {}
    encoder = SentenceEncoder.from_pretrained(args.training.output_dir, device=str(args.training.device))  # type: ignore[arg-type]
    scores = evaluate(encoder.encode, args.data.data_dir)
    print(f"\n{args.training.output_dir}, {encoder.description}, Spearman × 100\n\n{table(scores)}")
    content = {**scores, "avg": average(scores)}
    (Path(args.training.output_dir) / SCORES_FILE).write_text(json.dumps(content, indent=2) + "\n")  # type: ignore[arg-type]
    return scores
