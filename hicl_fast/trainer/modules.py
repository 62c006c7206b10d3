"""What a sentence-transformers folder says of its embeddings, in modules.json and the files that it names.

The trainer writes such files itself. Of other folders' modules the trainer has a few alone; all of them are that library's
own to compute (:class:`hicl_fast.trainer.encoder.SentenceTransformersEncoder`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils import cached_file

_LIBRARY = "sentence_transformers."
_MODULES = "modules.json"
_POOLING = "1_Pooling/config.json"
_DENSE = "2_Dense/config.json"
_PROMPTS = "config_sentence_transformers.json"
_TRANSFORMER = "sentence_bert_config.json"
_TRANSFORMERS = [  # as the library named them through the years
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]

FILES = (_MODULES, _TRANSFORMER, _POOLING, _DENSE, _PROMPTS)

_MODES = {"cls": "cls", "cls_before_pooler": "cls", "avg": "mean", "last_token": "lasttoken"}
_MODE_KEYS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
_OLD_MODES = ("cls", "mean", "max", "mean_sqrt_len_tokens")  # which a release of any age looks for


class Module(NamedTuple):
    kind: str  # its class's name: Transformer, Pooling, ...
    path: str  # its folder, "" for the model's own


def read_modules(name_or_path: str | Path) -> list[Module] | None:
    """What modules.json lists, in order; None where there is none.

    Raises:
        ValueError: it is no list of modules, or names a class from elsewhere: code that came with a model is never run.
    """
    entries = _read_json(name_or_path, _MODULES)
    if entries is None:
        return None
    try:
        types = [(str(entry["type"]), str(entry["path"])) for entry in entries]
    except (TypeError, KeyError):
        types = []
    if not types:
        raise ValueError(
            f"model_name_or_path: expected a list of modules in {name_or_path}/{_MODULES}, got something else"
        )
    foreign = next((kind for kind, _ in types if not kind.startswith(_LIBRARY)), None)
    if foreign is not None:
        raise ValueError(
            f"model_name_or_path: expected modules of sentence-transformers alone in {name_or_path}/{_MODULES}, "
            f"since code that comes with a model is not run, got {foreign!r}"
        )
    return [Module(kind.rpartition(".")[2], path) for kind, path in types]


def names(modules: list[Module]) -> str:
    return ", ".join(module.kind for module in modules)


def transformer_folder(modules: list[Module] | None) -> str:
    """Where in the model's folder the encoder lies: at its root, or as old releases have it in 0_Transformer."""
    return "" if modules is None else next((module.path for module in modules if module.kind == "Transformer"), "")


def own_max_seq_length(name_or_path: str | Path, pooler_type: str | None) -> tuple[bool, int | None]:
    """Whether the files are word for word as the trainer writes them for ``pooler_type``, and their max_seq_length.

    Then the trainer's encoder gives the same embeddings. A folder that sentence-transformers has since saved differs.
    """
    folder, length = Path(name_or_path), None
    if pooler_type not in _MODES or not folder.is_dir() or (folder / _PROMPTS).exists():
        return False, None
    found = {name: _read_json(folder, name) for name in (_MODULES, _TRANSFORMER, _POOLING, _DENSE)}
    if isinstance(found[_TRANSFORMER], dict) and isinstance(found[_POOLING], dict):
        length, width = found[_TRANSFORMER].get("max_seq_length"), found[_POOLING].get("word_embedding_dimension")
        if found == {_DENSE: None, **files(pooler_type, width, length)}:
            return True, length
    return False, None


def files(pooler_type: str, width: int, max_seq_length: int | None) -> dict[str, Any]:
    """The JSON files that describe an encoder of this width to sentence-transformers, by name.

    Empty for the pooler types that library does not have.
    """
    mode = _MODES.get(pooler_type)
    if mode is None:
        return {}
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    content: dict[str, Any] = {
        _TRANSFORMER: {"max_seq_length": max_seq_length, "do_lower_case": False},
        _POOLING: {
            "word_embedding_dimension": width,
            **{_MODE_KEYS[name]: name == mode for name in [*_OLD_MODES, mode]},
        },
    }
    if pooler_type == "cls":
        modules.append(("2_Dense", "Dense"))
        content[_DENSE] = {
            "in_features": width,
            "out_features": width,
            "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        }
    content[_MODULES] = [
        {"idx": index, "name": str(index), "path": path, "type": f"{_LIBRARY}models.{kind}"}
        for index, (path, kind) in enumerate(modules)
    ]
    return content


def trainable_pooler(name_or_path: str | Path, modules: list[Module]) -> str:
    """The pooler type that trains what the modules compute, but for a last Normalize, which no cosine sees.

    Raises:
        ValueError: the trainer has no such one.
    """
    kinds = [module.kind for module in modules]
    if kinds in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        pooling = _read_json(name_or_path, f"{modules[1].path}/config.json") or {}
        mode = pooling.get("pooling_mode") or [name for name, key in _MODE_KEYS.items() if pooling.get(key)] or ["mean"]
        mode = mode[0] if isinstance(mode, list) and len(mode) == 1 else mode
        found = {"cls": "cls_before_pooler", "mean": "avg", "lasttoken": "last_token"}.get(str(mode))
        if found is not None and not _changes_texts(name_or_path, modules[0]):
            return found
    raise ValueError(
        f"pooler_type: expected the pooling to go on with, since {name_or_path}'s own is not among them: modules "
        f"{', '.join(kinds)}, of which Transformer and Pooling by cls, mean or lasttoken can be trained, without a "
        "default prompt or do_lower_case; the pooler type given takes the Transformer alone"
    )


def _changes_texts(name_or_path: str | Path, transformer: Module) -> bool:
    prompts = _read_json(name_or_path, _PROMPTS) or {}
    settings = [_read_json(name_or_path, f"{transformer.path}/{name}".lstrip("/")) or {} for name in _TRANSFORMERS]
    has_prompt = bool((prompts.get("prompts") or {}).get(prompts.get("default_prompt_name")))
    return has_prompt or any(setting.get("do_lower_case") for setting in settings)


def _read_json(name_or_path: str | Path, name: str) -> Any:
    """None where there is no such file, in a folder or on the hub."""
    try:
        path = cached_file(
            str(name_or_path),
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError as error:  # neither a folder nor a name that the hub could have
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"model_name_or_path: expected a model to open, got {name_or_path}: {reason}") from error
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model_name_or_path: expected JSON in {path}, got: {error}") from None
