"""The command line: SimCSE's argument names where SimCSE has them, beside those of ``transformers.TrainingArguments``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from typing import Any

import transformers
from transformers.trainer_utils import IntervalStrategy

from hicl_fast import _checks as check
from hicl_fast.ops.backends.registry import check_name
from hicl_fast.ops.common.arguments import MOST_NEGATIVES
from hicl_fast.ops.paradigm.settings import MODIFIABLE, OBJECTIVES
from hicl_fast.trainer.method import GATHER
from hicl_fast.trainer.methods import METHODS
from hicl_fast.trainer.token_pooling import POOLERS


def _option(
    default: object,
    help: str,
    *,
    check: Callable[[str, Any], None] | None = None,
    of: str | None = None,
    **metadata: object,
) -> object:
    """An option.

    Args:
        check: raises ValueError or TypeError for a name and a value that is wrong; None is never wrong.
        of: the group of options that it belongs to, where not all methods have it; see :attr:`Method.options`.
        metadata: for ``HfArgumentParser``.
    """
    if of is not None:
        help = f"{', '.join(_methods_with(of))}: {help}"
    return field(default=default, metadata={"help": help, "check": check, "of": of, **metadata})


def _methods_with(group: str) -> list[str]:
    return [name for name, method in METHODS.items() if group in method.options]


def _one_of(*allowed: str) -> Callable[[str, Any], None]:
    def check_choice(name: str, value: object) -> None:
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {check.shown(value)}")

    return check_choice


def _whole(least: int, most: int | None = None) -> Callable[[str, Any], None]:
    return functools.partial(check.whole_number, least=least, most=most)


def _check_options(arguments: object) -> None:
    for one in fields(arguments):  # type: ignore[arg-type]
        check_value, value = one.metadata.get("check"), getattr(arguments, one.name)
        if check_value is not None and value is not None:
            check_value(one.name, value)


def check_method(arguments: MethodArguments, given: Collection[str]) -> None:
    """That every option of ``given`` (names) is one that the method, and ``--bank`` or ``--objective``, makes use of.

    Raises:
        ValueError: one isn't.
    """
    for one in fields(arguments):
        group = one.metadata.get("of")
        if one.name in given and group is not None and group not in METHODS[arguments.method].options:
            raise ValueError(
                f"{one.name}: expected with --method {' or '.join(_methods_with(group))}, which alone make use of it, "
                f"got it with --method {arguments.method}"
            )
    if "queue_size" in given and arguments.bank != "previous":
        raise ValueError(f"queue_size: expected with --bank previous, got it with --bank {arguments.bank}")


@dataclass
class ModelArguments:
    model_name_or_path: str = field(
        metadata={
            "help": "a hub name, a local folder, or scratch:small: a WordPiece vocabulary trained on the text "
            "and a small random BERT, with nothing downloaded"
        }
    )
    pooler_type: str | None = _option(  # type: ignore[assignment]
        None,
        f"sentence embedding from token embeddings: {', '.join(POOLERS)}; default: what the model's folder says (its "
        "config or sentence-transformers' modules), otherwise cls",
        check=_one_of(*POOLERS),
    )
    mlp_only_train: bool = _option(False, "use the MLP of --pooler_type cls in training only")  # type: ignore[assignment]
    freeze_word_embeddings: bool = _option(False, "do not train the table of word embeddings")  # type: ignore[assignment]

    def __post_init__(self) -> None:
        _check_options(self)
        if self.mlp_only_train and self.pooler_type not in (None, "cls"):
            raise ValueError(
                f"mlp_only_train: expected --pooler_type cls, the one with an MLP, got {self.pooler_type!r}"
            )


@dataclass
class DataArguments:
    train_file: str = field(
        metadata={
            "help": "text of one document a line; or .csv, .tsv or .jsonl whose columns are named: sentence, positive, "
            "hard negatives, as sent0,sent1,hard_neg; any of them also as .gz"
        }
    )
    max_seq_length: int | None = _option(  # type: ignore[assignment]
        None,
        "tokens kept of a document, special ones included; default: 32, with --method hicl 512",
        check=_whole(1),
    )
    max_train_samples: int | None = _option(None, "train on the first so many rows of the file", check=_whole(2))  # type: ignore[assignment]
    data_dir: str | None = _option(  # type: ignore[assignment]
        None, "SentEval's data folder: evaluate on STS-B dev every --eval_steps, on the seven STS tasks at the end"
    )

    def __post_init__(self) -> None:
        _check_options(self)


@dataclass
class MethodArguments:
    method: str = _option(  # type: ignore[assignment]
        "simcse", f"the training objective: {', '.join(METHODS)}", check=lambda *given: _one_of(*METHODS)(*given)
    )
    temp: float = _option(  # type: ignore[assignment]
        0.05, "temperature of the softmax", check=check.positive_number, aliases=["--temperature"]
    )
    hard_negative_weight: float = _option(  # type: ignore[assignment]
        0.0, "added to the logit of a row's own hard negative", of="pairs", check=check.real_number
    )
    segment_length: int = _option(  # type: ignore[assignment]
        32, "tokens of a segment, special ones included", of="segments", check=_whole(1)
    )
    local_weight: float = _option(  # type: ignore[assignment]
        0.3, "weight of the loss between segments", of="segments", check=check.non_negative_number
    )
    global_weight: float | None = _option(  # type: ignore[assignment]
        None,
        "weight of the loss between pooled documents; default: 1 - local_weight",
        of="segments",
        check=check.non_negative_number,
    )
    same_sequence: str = _option(  # type: ignore[assignment]
        "exclude",
        "what segments of one document are to each other: exclude, negative or positive",
        of="segments",
        check=_one_of("exclude", "negative", "positive"),
    )
    segment_pooling: str = _option(  # type: ignore[assignment]
        "length",
        "weight of a segment in its document: length or mean",
        of="segments",
        check=_one_of("length", "mean"),
    )
    num_hard_negatives: int = _option(  # type: ignore[assignment]
        10,
        "a row's hardest negatives, two of which are mixed; in a smaller batch as many as there are",
        of="mixed negatives",
        check=_whole(2, MOST_NEGATIVES),
    )
    require_hard_negatives: bool = _option(  # type: ignore[assignment]
        False, "stop at a batch whose rows have fewer than --num_hard_negatives", of="mixed negatives"
    )
    num_mixed: int = _option(40, "mixtures for each row", of="mixed negatives", check=_whole(1))  # type: ignore[assignment]
    mixing_alpha: float = _option(  # type: ignore[assignment]
        0.5, "share of the first of two mixed negatives", of="mixed negatives", check=check.share
    )
    bank: str = _option(  # type: ignore[assignment]
        "batch",
        "where hard negatives are looked for: batch, or previous (the keys of previous batches)",
        of="mixed negatives",
        check=_one_of("batch", "previous"),
    )
    queue_size: int = _option(  # type: ignore[assignment]
        1024, "keys of previous batches that are kept with --bank previous", of="mixed negatives", check=_whole(2)
    )
    positive_threshold: float = _option(  # type: ignore[assignment]
        0.1,
        "a positive is mixed where it leads the hardest negative by less than this share",
        of="mixed positives",
        check=check.non_negative_number,
    )
    positive_weights: str = _option(  # type: ignore[assignment]
        "1.0,0.1", "the two weights of the mixture, or search", of="mixed positives"
    )
    objective: str = _option(  # type: ignore[assignment]
        "info_nce", ", ".join(OBJECTIVES), of="paradigm", check=_one_of(*OBJECTIVES)
    )
    modified: str = _option(  # type: ignore[assignment]
        "", f"what {', '.join(MODIFIABLE)} have of the paper's gradient, as gd,w,r", of="paradigm"
    )
    paradigm_margin: float | None = _option(  # type: ignore[assignment]
        None, "the objective's margin; default: the paper's", of="paradigm", check=check.real_number
    )
    strength: float = _option(  # type: ignore[assignment]
        1.0,
        "weight of what drives the rows apart, where not contrastive",
        of="paradigm",
        check=check.positive_number,
    )
    ratio: str | None = _option(  # type: ignore[assignment]
        None,
        "of custom a number, arccon, met or mat (default 1); of modified forms a number (default: paper's)",
        of="paradigm",
    )
    dissipation: str = _option(  # type: ignore[assignment]
        "softmax", "of custom: softmax, none or a margin", of="paradigm"
    )
    weight: str = _option(  # type: ignore[assignment]
        "softmax", "of custom: softmax, uniform, hardest, or power:3", of="paradigm"
    )
    log_gradient_terms: bool = _option(  # type: ignore[assignment]
        False, "log the means of dissipation, weight and ratio", of="paradigm"
    )
    backend: str = _option(  # type: ignore[assignment]
        "auto", "of the loss: auto, torch, cpp, triton or cuda", check=lambda name, value: check_name(value, name)
    )
    gather: str = _option(  # type: ignore[assignment]
        "none",
        "with several processes: none (a process's documents are compared with each other), all (with those of all "
        "processes, which are gathered) or ring (the same, passed round)",
        check=_one_of(*GATHER),
    )
    check_every: int = _option(  # type: ignore[assignment]
        0,
        "every so many steps compare loss and gradients with the float64 reference, and stop where they differ",
        check=_whole(0),
    )

    def __post_init__(self) -> None:
        _check_options(self)


def _check_steps(name: str, value: int) -> None:
    if value != -1:
        check.whole_number(name, value, 1)


# Of the options that transformers declares and takes as they come: those that would end a run late or change it quietly.
CHECKS_OF_TRANSFORMERS: dict[str, Callable[[str, Any], None]] = {
    "max_steps": _check_steps,  # -1: as many as the passes over the text take
    "per_device_eval_batch_size": _whole(1),
    "gradient_accumulation_steps": _whole(1),
    "weight_decay": check.non_negative_number,
    "adam_beta1": check.share,
    "adam_beta2": check.share,
    "adam_epsilon": check.non_negative_number,
    "max_grad_norm": check.non_negative_number,
    "warmup_steps": check.non_negative_number,
    "save_steps": check.positive_number,
    "eval_steps": check.positive_number,
    "seed": _whole(0, 2**32 - 1),
    "data_seed": _whole(0, 2**32 - 1),
    "dataloader_num_workers": _whole(0),
}


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """``transformers.TrainingArguments`` with SimCSE's defaults."""

    per_device_train_batch_size: int = _option(64, "documents in a batch, on each device", check=_whole(1))  # type: ignore[assignment]
    learning_rate: float = _option(3e-5, "highest learning rate", check=check.non_negative_number)  # type: ignore[assignment]
    gradient_cache_chunk_size: int = _option(  # type: ignore[assignment]
        0,
        "texts (segments) that the encoder takes at a time, while the loss is the whole batch's: memory for large "
        "batches at the price of a second forward pass; 0: all at once",
        check=_whole(0),
    )
    num_train_epochs: float = _option(1.0, "passes over the text", check=check.positive_number)  # type: ignore[assignment]
    logging_steps: float = _option(10, "steps between two lines of the log", check=check.positive_number)  # type: ignore[assignment]
    eval_strategy: IntervalStrategy | str = _option(  # type: ignore[assignment]
        "no", "no, steps or epoch; default: steps where --eval_steps is given", aliases=["--evaluation_strategy"]
    )
    logging_nan_inf_filter: bool = _option(  # type: ignore[assignment]
        False, "leave losses that are not finite out of the log's means; there is none, since one ends the run"
    )
    overwrite_output_dir: bool = _option(False, "delete the checkpoints of an earlier run in --output_dir")  # type: ignore[assignment]
    resume_from_checkpoint: str | None = _option(  # type: ignore[assignment]
        None, "last (the newest complete checkpoint in --output_dir), or a checkpoint's folder"
    )

    def __post_init__(self) -> None:
        _check_options(self)
        for name, check_value in CHECKS_OF_TRANSFORMERS.items():
            if (value := getattr(self, name)) is not None:
                check_value(name, value)
        if self.eval_steps is not None and IntervalStrategy(self.eval_strategy) == IntervalStrategy.NO:
            self.eval_strategy = IntervalStrategy.STEPS
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "stsb_spearman"
        self.remove_unused_columns = False  # the rows are text, which is no argument of the encoder
        try:
            super().__post_init__()
        except (TypeError, ImportError) as error:  # of an option that it can't do with what it was given or has here
            raise ValueError(" ".join(str(error).split())) from error
