"""Opens and saves encoders: an ordinary ``transformers`` model whose config records how tokens are pooled."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

POOLING_KEY = "sentence_pooling"  # in config.json
DEFAULT_POOLER = "avg"


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Raises ValueError for a tokenizer without a fast (Rust) version or without a padding token."""
    with _opened(name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path))
    if not tokenizer.is_fast:
        raise ValueError(f"model_name_or_path: expected a model with a fast tokenizer, got {type(tokenizer).__name__}")
    if tokenizer.pad_token is None:
        raise ValueError(f"model_name_or_path: expected a tokenizer with a padding token, got none in {name_or_path}")
    return tokenizer


def load_encoder(name_or_path: str | Path, pooler_type: str | None = None) -> tuple[PreTrainedModel, str]:
    """The encoder and the pooler type: as given, or as its config records, or ``avg``.

    The encoder keeps its pooler layer only for ``cls``, so that no weight lies idle in training.

    Raises:
        ValueError: weights are missing, or ``cls`` is asked of an encoder without a pooler layer.
    """
    encoder, missing = _open_quietly(name_or_path)
    recorded = getattr(encoder.config, POOLING_KEY, None)
    pooler_type = pooler_type or recorded or DEFAULT_POOLER
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


def renew_pooler(encoder: PreTrainedModel) -> None:
    """Random weights for the MLP of ``cls``: SimCSE's starts afresh, not from BERT's next-sentence prediction."""
    layer = _pooler_layer(encoder)
    nn.init.normal_(layer.weight, std=encoder.config.initializer_range)
    nn.init.zeros_(layer.bias)


def max_tokens(encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest text the model takes, in tokens, special ones included."""
    positions = getattr(encoder.config, "max_position_embeddings", tokenizer.model_max_length)
    return min(tokenizer.model_max_length, positions)


def write_sentence_transformers_files(
    encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pooler_type: str, folder: str | Path
) -> bool:
    """Makes a saved encoder open in sentence-transformers with the same embeddings.

    Returns False, and writes nothing, for the pooler types that library does not have.
    """
    mode = {"cls": "cls", "cls_before_pooler": "cls", "avg": "mean"}.get(pooler_type)
    if mode is None:
        return False
    folder, width = Path(folder), encoder.config.hidden_size
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    _write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": max_tokens(encoder, tokenizer), "do_lower_case": False}
    )
    _write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": width,
            "pooling_mode_cls_token": mode == "cls",
            "pooling_mode_mean_tokens": mode == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    )
    if pooler_type == "cls":
        modules.append(("2_Dense", "Dense"))
        _write_dense(_pooler_layer(encoder), folder / "2_Dense")
    types = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(modules)
    ]
    _write_json(folder / "modules.json", types)
    return True


@contextmanager
def _opened(name_or_path: str | Path) -> Iterator[None]:
    """Names the argument where there is no such model, a file is cut short or weights have other shapes."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"model_name_or_path: expected a model to open, got {name_or_path}: {reason}") from error


def _open_quietly(name_or_path: str | Path) -> tuple[PreTrainedModel, set[str]]:
    """The encoder and the names of weights its folder lacks, without transformers' report: the caller judges them."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with _opened(name_or_path):
            encoder, info = AutoModel.from_pretrained(str(name_or_path), output_loading_info=True, dtype=torch.float32)
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


def _write_dense(layer: nn.Linear, folder: Path) -> None:
    _write_json(
        folder / "config.json",
        {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        },
    )
    weights = {"linear.weight": layer.weight, "linear.bias": layer.bias}
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / "model.safetensors"
    )


def _write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
