"""Puts a run together: arguments, text, encoder, method, trainer, and the table of scores at the end."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import HfArgumentParser, PreTrainedTokenizerBase, set_seed
from transformers.integrations import get_available_reporting_integrations

from hicl_fast import NegativeQueue
from hicl_fast import _checks as check
from hicl_fast._command import Parser, check_backend, check_output_folder, command, usage
from hicl_fast.evaluation import Task, average, evaluate, find_root, read_task, table
from hicl_fast.evaluation.senteval import DEVELOPMENT_TASK
from hicl_fast.trainer import checkpoints, scratch
from hicl_fast.trainer.arguments import DataArguments, MethodArguments, ModelArguments, TrainingArguments, check_method
from hicl_fast.trainer.checks import Diverged, LossMismatch
from hicl_fast.trainer.encoder import SentenceEncoder
from hicl_fast.trainer.methods import METHODS, Method
from hicl_fast.trainer.model import POOLING_KEY, load_encoder, load_tokenizer, max_tokens, renew_pooler
from hicl_fast.trainer.rescue import Stopped
from hicl_fast.trainer.slicing import ViewCollator
from hicl_fast.trainer.text import TrainingText, read_training_text
from hicl_fast.trainer.trainer import ContrastiveTrainer

SCORES_FILE = "sts_scores.json"
METRIC = "stsb_spearman"
SAMPLING = ("random", "sequential")
OPTIONS = (ModelArguments, DataArguments, MethodArguments, TrainingArguments)

logger = logging.getLogger("hicl_fast.trainer")


@dataclass(frozen=True)
class Arguments:
    model: ModelArguments
    data: DataArguments
    method: MethodArguments
    training: TrainingArguments


class TrainerParser(Parser, HfArgumentParser):
    def add_argument(self, *names: Any, check: object = None, of: object = None, **options: Any) -> argparse.Action:
        """What an option's metadata have beyond argparse's is ``arguments.py``'s own."""
        if self.argument_default is argparse.SUPPRESS:
            options["default"] = argparse.SUPPRESS
        return super().add_argument(*names, **options)


@command("trainer", Diverged, LossMismatch)
def main(argv: list[str] | None = None) -> None:
    """The command; what a user can put right is said in one line."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        train(argv)
    except Stopped as stopped:
        sys.exit(128 + stopped.number)  # as a shell reports a program that a signal ended
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def train(argv: list[str] | None = None) -> dict[str, float | None]:
    """Trains as the arguments say and returns the STS scores of the saved model, empty without ``--data_dir``.

    Raises:
        ValueError, OSError: an argument or a file is not as expected.
        Diverged: the loss is not finite any more.
        LossMismatch: ``--check_every`` found the fused loss wrong.
        Stopped: Ctrl-C or SIGTERM. Then, as when a step fails, what was trained is in a checkpoint.
    """
    trainer, checkpoint = build(args := parse(argv))
    if checkpoint is None and args.training.process_index == 0:
        # Now that nothing is left that could refuse the run, and the model, perhaps one of them, has been read.
        checkpoints.delete_checkpoints(args.training.output_dir)  # type: ignore[arg-type]
    stop = trainer.last_step.stop
    with stop.heard():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.save_model()
        trainer.save_state()
    if stop.asked is not None:  # in the last step: it is done but for the report
        raise Stopped(stop.asked)
    return report(args) if trainer.is_world_process_zero() else {}


def parse(argv: list[str] | None) -> Arguments:
    """The options, each of them checked as far as it can be without data and model.

    Raises:
        UsageError: one is not as expected.
    """
    parser = TrainerParser(OPTIONS, prog="python -m hicl_fast.trainer")  # type: ignore[arg-type,misc]
    with usage():
        *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        args = Arguments(*parsed)  # type: ignore[arg-type]
        check_method(args.method, given_options(argv))
        check_options(args)
    return args


def given_options(argv: list[str] | None) -> set[str]:
    """The names of the options that were given, also of those given as they are by default."""
    parser = TrainerParser(OPTIONS, argument_default=argparse.SUPPRESS)  # type: ignore[arg-type]
    return set(vars(parser.parse_known_args(argv)[0]))


def check_options(args: Arguments) -> None:
    """What takes more than one option to see, or a look at the machine."""
    training, method = args.training, METHODS[args.method.method]
    if args.method.gather != "none" and args.method.check_every and training.world_size > 1:
        raise ValueError(
            "check_every: expected 0 with --gather, whose loss one process's reference has not the documents for, "
            f"got {args.method.check_every}"
        )
    name = args.model.model_name_or_path
    if name.startswith("scratch:") and name != scratch.NAME:
        raise ValueError(
            f"model_name_or_path: expected {scratch.NAME}, the only model made from scratch, got {check.shown(name)}"
        )
    check_backend(args.method.backend, "info_nce", training.device)
    check_report_to(training.report_to)
    method(args.method, training.seed)  # the loss has its own checks
    total, segment_length = lengths(args, method)
    if total < segment_length:
        raise ValueError(f"max_seq_length: expected at least one segment of {segment_length} tokens, got {total}")
    check_output_folder("output_dir", Path(training.output_dir))  # type: ignore[arg-type]
    if args.data.data_dir is None and training.eval_strategy != "no":
        raise ValueError(
            "data_dir: expected SentEval's data folder, as --eval_strategy and --eval_steps need, got none"
        )
    if training.eval_on_start and training.eval_strategy == "no":
        raise ValueError("eval_on_start: expected with --eval_strategy steps or epoch, got it with no")
    metric = training.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") != METRIC:
        raise ValueError(f"metric_for_best_model: expected {METRIC}, the only one there is, got {check.shown(metric)}")
    if training.train_sampling_strategy not in SAMPLING:
        raise ValueError(
            f"train_sampling_strategy: expected {' or '.join(SAMPLING)}, since lengths are known in batches alone, "
            f"got {check.shown(training.train_sampling_strategy)}"
        )


def check_report_to(report_to: str | list[str] | None) -> None:
    installed = ("none", "all", *get_available_reporting_integrations())
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name not in installed:
            raise ValueError(
                f"report_to: expected one that is installed, {', '.join(installed)}, got {check.shown(name)}"
            )


def lengths(args: Arguments, method: type[Method] | Method) -> tuple[int, int]:
    """Tokens kept of a document, and tokens of a segment: a method without segments has one segment a document."""
    total = method.max_seq_length if args.data.max_seq_length is None else args.data.max_seq_length
    return total, args.method.segment_length if method.segmented else total


def check_text(args: Arguments, text: TrainingText) -> None:
    """That no column is ignored, and that there is something to tell a row from."""
    method, columns = args.method, text.columns
    most = METHODS[method.method].most_columns
    if most is not None and columns > most:
        takes = "documents only" if most == 1 else "sentences, or pairs of them"
        raise ValueError(f"train_file: --method {method.method} expects {takes}, got {columns} columns")
    if method.hard_negative_weight and columns != 3:
        rows = "where rows have no hard negative" if columns < 3 else "with several hard negatives a row, none its own"
        raise ValueError(
            f"hard_negative_weight: expected 0 {rows}, got {method.hard_negative_weight} with {columns} columns"
        )
    if len(text.rows) < 2:
        raise ValueError(
            f"train_file: expected at least two rows, since a row is told from the others, got 1 in {args.data.train_file}"
        )
    check_batches(args, text)


def check_batches(args: Arguments, text: TrainingText) -> None:
    """That there is a batch, and something in it to learn from; otherwise the model is saved as it came."""
    training, method = args.training, args.method
    rows = training.train_batch_size * training.world_size
    if training.dataloader_drop_last and len(text.rows) < rows:
        raise ValueError(
            f"dataloader_drop_last: expected at least one whole batch of {rows} rows, got {len(text.rows)} rows"
        )
    compared = rows if method.gather != "none" else training.train_batch_size
    has_own = text.columns > 2 or method.bank == "previous" or method.same_sequence == "negative"
    if compared == 1 and not has_own:
        raise ValueError(
            "per_device_train_batch_size: expected at least 2, since a row is told from the others of its batch, got 1"
        )


def build(args: Arguments) -> tuple[ContrastiveTrainer, Path | None]:
    """A trainer ready to run, and the checkpoint it is to go on from."""
    training, output_dir = args.training, Path(args.training.output_dir)  # type: ignore[arg-type]
    development = read_development_task(args)
    text = read_training_text(args.data.train_file, args.data.max_train_samples)
    logger.info("%s: %d rows, %d empty ones skipped", args.data.train_file, len(text.rows), text.skipped)
    check_text(args, text)

    checkpoint = choose_checkpoint(args, output_dir)
    set_seed(training.seed)
    source = checkpoint or model_source(args, text, output_dir)
    tokenizer = load_tokenizer(source)
    encoder, pooler_type = load_encoder(source, asked_pooler(args.model), default="cls")
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
        data_collator=collator(args, method, tokenizer, max_tokens(encoder, tokenizer)),
        train_dataset=text.rows,
        eval_dataset=development,
    )
    return trainer, checkpoint


def asked_pooler(args: ModelArguments) -> str | None:
    """None: what the model's folder says; an MLP in training only is one of ``cls``, though it isn't recorded."""
    return "cls" if args.mlp_only_train else args.pooler_type


def read_development_task(args: Arguments) -> Task | None:
    """STS-B dev, which is scored during training; missing data is found out before training, not hours into it."""
    if args.data.data_dir is None:
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
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
    return checkpoint


def model_source(args: Arguments, text: TrainingText, output_dir: Path) -> str | Path:
    """What to open: ``scratch:small`` is first written to a folder, by one process for all."""
    name = args.model.model_name_or_path
    if not name.startswith("scratch:"):
        return name
    folder = output_dir / "scratch"
    with args.training.main_process_first(local=False, desc="making the model"):
        if args.training.process_index == 0:
            scratch.write_scratch_model((cell for row in text.rows for cell in row), folder)
    return folder


def collator(args: Arguments, method: Method, tokenizer: PreTrainedTokenizerBase, longest: int) -> ViewCollator:
    """Slices as the method asks."""
    total, segment_length = lengths(args, method)
    shortest = tokenizer.num_special_tokens_to_add() + 1
    name = "segment_length" if method.segmented else "max_seq_length"
    if not shortest <= segment_length <= longest:
        raise ValueError(f"{name}: expected {shortest} to {longest} tokens, as the model takes, got {segment_length}")
    if total < segment_length:
        raise ValueError(f"max_seq_length: expected at least one segment of {segment_length} tokens, got {total}")
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
