"""Opens and saves encoders: an ordinary ``transformers`` model whose config records how tokens are pooled."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from hicl_fast import _checks as check
from hicl_fast.trainer import modules as folder_modules
from hicl_fast.trainer.token_pooling import POOLERS

POOLING_KEY = "sentence_pooling"  # in config.json
DEFAULT_POOLER = "avg"
UNLIMITED = 2**31 - 1  # tokens, where neither tokenizer nor model sets a limit

logger = logging.getLogger("hicl_fast.trainer")


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer that pads on the right, as batches are made here, and so does the saved folder's wherever it is opened.

    Raises ValueError for a tokenizer without a fast (Rust) version or without a padding token.
    """
    subfolder = folder_modules.transformer_folder(folder_modules.read_modules(name_or_path))
    with _opened(name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path), subfolder=subfolder, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ValueError(f"model_name_or_path: expected a model with a fast tokenizer, got {type(tokenizer).__name__}")
    if tokenizer.pad_token is None:
        raise ValueError(f"model_name_or_path: expected a tokenizer with a padding token, got none in {name_or_path}")
    tokenizer.padding_side = "right"
    return tokenizer


def load_encoder(
    name_or_path: str | Path, pooler_type: str | None = None, *, default: str = DEFAULT_POOLER
) -> tuple[PreTrainedModel, str]:
    """The encoder and the pooler type: as given, or as its folder says, or ``default``.

    A folder says it in its config, where the trainer records it, or as a sentence-transformers folder in its modules.
    The encoder keeps its pooler layer only for ``cls``, so that no weight lies idle in training. Of an encoder-decoder
    such as T5 the encoder is opened.

    Raises:
        ValueError: there is no such pooler type, weights are missing, ``cls`` is asked of an encoder without a pooler
            layer, there is no encoder to open, or the folder's own modules are none that the trainer has.
    """
    if pooler_type is not None:
        check.one_of("pooler_type", pooler_type, POOLERS)
    modules = folder_modules.read_modules(name_or_path)
    subfolder = folder_modules.transformer_folder(modules)
    config = AutoConfig.from_pretrained(str(name_or_path), subfolder=subfolder, trust_remote_code=False)
    pooler_type = _pooler_type(name_or_path, pooler_type, config, modules) or default
    encoder, missing = _open_quietly(name_or_path, config, subfolder)
    lacking = sorted(key for key in missing if not key.startswith("pooler."))
    if lacking:
        raise ValueError(
            f"model_name_or_path: expected all weights in {name_or_path}, but {', '.join(lacking[:3])} … are missing"
        )
    if pooler_type == "cls":
        _pooler_layer(encoder)
    elif getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    return encoder, pooler_type


def is_own_folder(name_or_path: str | Path) -> tuple[bool, int | None]:
    """Whether the trainer's encoder gives what sentence-transformers would, and the max_seq_length the folder states."""
    config = AutoConfig.from_pretrained(
        str(name_or_path),
        subfolder=folder_modules.transformer_folder(folder_modules.read_modules(name_or_path)),
        trust_remote_code=False,
    )
    return folder_modules.own_max_seq_length(name_or_path, getattr(config, POOLING_KEY, None))


def _pooler_type(
    name_or_path: str | Path,
    given: str | None,
    config: PretrainedConfig,
    modules: list[folder_modules.Module] | None,
) -> str | None:
    recorded = getattr(config, POOLING_KEY, None)
    if modules is None or folder_modules.own_max_seq_length(name_or_path, recorded)[0]:
        return given or recorded
    own = folder_modules.names(modules)
    if given is not None:
        logger.warning(
            "%s: %s pooling of the Transformer alone, as asked, in place of its own %s", name_or_path, given, own
        )
        return given
    found = folder_modules.trainable_pooler(name_or_path, modules)
    logger.info("%s: %s pooling, as its own %s has it", name_or_path, found, own)
    return found


def renew_pooler(encoder: PreTrainedModel) -> None:
    """Random weights for the MLP of ``cls``: SimCSE's starts afresh, not from BERT's next-sentence prediction."""
    layer = _pooler_layer(encoder)
    nn.init.normal_(layer.weight, std=encoder.config.initializer_range)
    nn.init.zeros_(layer.bias)


def max_positions(encoder: nn.Module) -> int | None:
    """How many positions the encoder has for tokens; None where nothing limits them."""
    for module in encoder.modules():
        padding, table = getattr(module, "padding_idx", None), getattr(module, "position_embeddings", None)
        if isinstance(padding, int) and isinstance(table, nn.Embedding):
            return table.num_embeddings - padding - 1  # RoBERTa and its kind count from padding_idx + 1
    positions = getattr(encoder.config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None  # XLNet's is -1


def max_tokens(encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest text the model takes, in tokens, special ones included; ``UNLIMITED`` where it takes any."""
    return int(min(tokenizer.model_max_length, max_positions(encoder) or UNLIMITED, UNLIMITED))


def write_sentence_transformers_files(
    encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pooler_type: str, folder: str | Path
) -> bool:
    """Makes a saved encoder open in sentence-transformers with the same embeddings.

    Returns False, and writes nothing, for the pooler types that library does not have. What an earlier model of the folder
    said of itself is deleted.
    """
    for name in folder_modules.FILES:
        (Path(folder) / name).unlink(missing_ok=True)
    longest = max_tokens(encoder, tokenizer)
    files = folder_modules.files(pooler_type, encoder.config.hidden_size, None if longest == UNLIMITED else longest)
    for name, content in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if pooler_type == "cls":
        layer = _pooler_layer(encoder)
        weights = {"linear.weight": layer.weight, "linear.bias": layer.bias}
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(contiguous, Path(folder) / "2_Dense" / "model.safetensors")
    return bool(files)


@contextmanager
def _opened(name_or_path: str | Path) -> Iterator[None]:
    """Names the argument where there is no such model, a file is cut short or weights have other shapes."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"model_name_or_path: expected a model to open, got {name_or_path}: {reason}") from error


def _open_quietly(
    name_or_path: str | Path, config: PretrainedConfig, subfolder: str
) -> tuple[PreTrainedModel, set[str]]:
    """The encoder and the names of weights its folder lacks, without transformers' report: the caller judges them."""
    has_encoder = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    if config.is_encoder_decoder and not has_encoder:
        raise ValueError(
            f"model_name_or_path: expected an encoder, got {config.model_type!r} in {name_or_path}, an encoder-decoder "
            "whose encoder does not open alone"
        )
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with _opened(name_or_path):
            encoder, info = (AutoModelForTextEncoding if has_encoder else AutoModel).from_pretrained(
                str(name_or_path),
                subfolder=subfolder,
                output_loading_info=True,
                dtype=torch.float32,
                trust_remote_code=False,
            )
    finally:
        transformers_logging.set_verbosity(level)
    return encoder, set(info["missing_keys"])


def _pooler_layer(encoder: PreTrainedModel) -> nn.Linear:
    layer = getattr(getattr(encoder, "pooler", None), "dense", None)
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"pooler_type: expected an encoder with a pooler layer for cls, got {type(encoder).__name__}; use cls_before_pooler"
        )
    return layer
