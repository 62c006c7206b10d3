"""The command line: SimCSE's argument names where SimCSE has them, beside those of ``transformers.TrainingArguments``."""

from __future__ import annotations

from dataclasses import dataclass, field

import transformers
from transformers.trainer_utils import IntervalStrategy

from hicl_fast.reference.paradigm import MODIFIABLE, OBJECTIVES
from hicl_fast.trainer.methods import GATHER, METHODS
from hicl_fast.trainer.token_pooling import POOLERS


def _option(default: object, help: str, **metadata: object) -> object:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class ModelArguments:
    model_name_or_path: str = field(
        metadata={
            "help": "a hub name, a local folder, or scratch:small: a WordPiece vocabulary trained on the text "
            "and a small random BERT, with nothing downloaded"
        }
    )
    pooler_type: str = _option("cls", f"sentence embedding from token embeddings: {', '.join(POOLERS)}")  # type: ignore[assignment]
    mlp_only_train: bool = _option(False, "use the MLP of --pooler_type cls in training only")  # type: ignore[assignment]
    freeze_word_embeddings: bool = _option(False, "do not train the table of word embeddings")  # type: ignore[assignment]

    def __post_init__(self) -> None:
        _check_choice("pooler_type", self.pooler_type, POOLERS)
        if self.mlp_only_train and self.pooler_type != "cls":
            raise ValueError(
                f"mlp_only_train: expected --pooler_type cls, the one with an MLP, got {self.pooler_type!r}"
            )


@dataclass
class DataArguments:
    train_file: str = field(
        metadata={
            "help": "text of one document a line; or a .csv with a heading and 1 to 3 columns: "
            "sentence, positive, hard negative"
        }
    )
    max_seq_length: int | None = _option(  # type: ignore[assignment]
        None, "tokens kept of a document, special ones included; default: 32, with --method hicl 512"
    )
    max_train_samples: int | None = _option(None, "train on the first so many rows of the file")  # type: ignore[assignment]
    data_dir: str | None = _option(  # type: ignore[assignment]
        None, "SentEval's data folder: evaluate on STS-B dev every --eval_steps, on the seven STS tasks at the end"
    )


@dataclass
class MethodArguments:
    method: str = _option("simcse", f"the training objective: {', '.join(METHODS)}")  # type: ignore[assignment]
    temp: float = _option(0.05, "temperature of the softmax", aliases=["--temperature"])  # type: ignore[assignment]
    hard_negative_weight: float = _option(0.0, "simcse: added to the logit of a row's own hard negative")  # type: ignore[assignment]
    segment_length: int = _option(32, "hicl: tokens of a segment, special ones included")  # type: ignore[assignment]
    local_weight: float = _option(0.3, "hicl: weight of the loss between segments")  # type: ignore[assignment]
    global_weight: float | None = _option(  # type: ignore[assignment]
        None, "hicl: weight of the loss between pooled documents; default: 1 - local_weight"
    )
    same_sequence: str = _option(  # type: ignore[assignment]
        "exclude", "hicl: what segments of one document are to each other: exclude, negative or positive"
    )
    segment_pooling: str = _option("length", "hicl: weight of a segment in its document: length or mean")  # type: ignore[assignment]
    num_hard_negatives: int = _option(  # type: ignore[assignment]
        10, "hncse-hnm: a row's hardest negatives, two of which are mixed; in a smaller batch as many as there are"
    )
    require_hard_negatives: bool = _option(  # type: ignore[assignment]
        False, "hncse-hnm: stop at a batch whose rows have fewer than --num_hard_negatives"
    )
    num_mixed: int = _option(40, "hncse-hnm: mixtures for each row")  # type: ignore[assignment]
    mixing_alpha: float = _option(0.5, "hncse-hnm: share of the first of two mixed negatives")  # type: ignore[assignment]
    bank: str = _option(  # type: ignore[assignment]
        "batch", "hncse-hnm: where hard negatives are looked for: batch, or previous (the keys of previous batches)"
    )
    queue_size: int = _option(1024, "hncse-hnm: keys of previous batches that are kept with --bank previous")  # type: ignore[assignment]
    positive_threshold: float = _option(  # type: ignore[assignment]
        0.1, "hncse-pm: a positive is mixed where it leads the hardest negative by less than this share"
    )
    positive_weights: str = _option("1.0,0.1", "hncse-pm: the two weights of the mixture, or search")  # type: ignore[assignment]
    objective: str = _option("info_nce", f"paradigm: {', '.join(OBJECTIVES)}")  # type: ignore[assignment]
    modified: str = _option(  # type: ignore[assignment]
        "", f"paradigm: what {', '.join(MODIFIABLE)} have of the paper's gradient, as gd,w,r"
    )
    paradigm_margin: float | None = _option(None, "paradigm: the objective's margin; default: the paper's")  # type: ignore[assignment]
    strength: float = _option(1.0, "paradigm: weight of what drives the rows apart, where not contrastive")  # type: ignore[assignment]
    ratio: str | None = _option(  # type: ignore[assignment]
        None,
        "paradigm: of custom a number, arccon, met or mat (default 1); of modified forms a number (default: paper's)",
    )
    dissipation: str = _option("softmax", "paradigm, custom: softmax, none or a margin")  # type: ignore[assignment]
    weight: str = _option("softmax", "paradigm, custom: softmax, uniform, hardest, or power:3")  # type: ignore[assignment]
    log_gradient_terms: bool = _option(  # type: ignore[assignment]
        False, "paradigm: log the means of dissipation, weight and ratio"
    )
    backend: str = _option("auto", "of the loss: auto, torch, cpp, triton or cuda")  # type: ignore[assignment]
    gather: str = _option(  # type: ignore[assignment]
        "none",
        "with several processes: none (a process's documents are compared with each other), all (with those of all "
        "processes, which are gathered) or ring (the same, passed round)",
    )
    check_every: int = _option(  # type: ignore[assignment]
        0, "every so many steps compare loss and gradients with the float64 reference, and stop where they differ"
    )

    def __post_init__(self) -> None:
        _check_choice("method", self.method, METHODS)
        _check_choice("same_sequence", self.same_sequence, ("exclude", "negative", "positive"))
        _check_choice("objective", self.objective, OBJECTIVES)
        _check_choice("bank", self.bank, ("batch", "previous"))
        _check_choice("gather", self.gather, GATHER)
        _check_choice("segment_pooling", self.segment_pooling, ("length", "mean"))


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """``transformers.TrainingArguments`` with SimCSE's defaults."""

    per_device_train_batch_size: int = _option(64, "documents in a batch, on each device")  # type: ignore[assignment]
    learning_rate: float = _option(3e-5, "highest learning rate")  # type: ignore[assignment]
    gradient_cache_chunk_size: int = _option(  # type: ignore[assignment]
        0,
        "texts (segments) that the encoder takes at a time, while the loss is the whole batch's: memory for large "
        "batches at the price of a second forward pass; 0: all at once",
    )
    num_train_epochs: float = _option(1.0, "passes over the text")  # type: ignore[assignment]
    logging_steps: float = _option(10, "steps between two lines of the log")  # type: ignore[assignment]
    eval_strategy: IntervalStrategy | str = _option(  # type: ignore[assignment]
        "no", "no, steps or epoch; default: steps where --eval_steps is given", aliases=["--evaluation_strategy"]
    )
    overwrite_output_dir: bool = _option(False, "delete the checkpoints of an earlier run in --output_dir")  # type: ignore[assignment]
    resume_from_checkpoint: str | None = _option(  # type: ignore[assignment]
        None, "last (the newest complete checkpoint in --output_dir), or a checkpoint's folder"
    )

    def __post_init__(self) -> None:
        if self.gradient_cache_chunk_size < 0:
            raise ValueError(
                f"gradient_cache_chunk_size: expected at least 1 text, or 0 for all, got {self.gradient_cache_chunk_size}"
            )
        if self.eval_steps is not None and IntervalStrategy(self.eval_strategy) == IntervalStrategy.NO:
            self.eval_strategy = IntervalStrategy.STEPS
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "stsb_spearman"
        self.remove_unused_columns = False  # the rows are text, which is no argument of the encoder
        super().__post_init__()


def _check_choice(name: str, value: str, allowed: object) -> None:
    if value not in allowed:  # type: ignore[operator]
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")  # type: ignore[arg-type]
