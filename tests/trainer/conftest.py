"""A few hundred made-up lines of text, and a run of the trainer on them in seconds."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

WORDS = [
    f"{stem}{ending}"
    for stem in ("kal", "mor", "tes", "vin", "dar", "lop", "sen")
    for ending in ("a", "em", "ist", "our", "y")
]


def make_documents(count: int, words: tuple[int, int], seed: int = 0) -> list[str]:
    """Documents of made-up words, their number of words drawn from a range."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(*words))) for _ in range(count)]


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    path = tmp_path / "sentences.txt"
    path.write_text("\n".join(make_documents(160, (3, 12))) + "\n")
    return path


@pytest.fixture
def paragraphs(tmp_path: Path) -> Path:
    path = tmp_path / "paragraphs.txt"
    path.write_text("\n".join(make_documents(80, (5, 80))) + "\n")
    return path


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., list[str]]:
    """The trainer's arguments for a short run on the CPU into ``tmp_path / name``."""

    def build(train_file: Path, name: str = "run", /, **options: object) -> list[str]:
        settings: dict[str, object] = {
            "model_name_or_path": "scratch:small",
            "train_file": train_file,
            "output_dir": tmp_path / name,
            "pooler_type": "avg",
            "per_device_train_batch_size": 16,
            "learning_rate": 1e-3,
            "max_steps": 6,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        }
        return [argument for key, value in settings.items() for argument in (f"--{key}", str(value))]

    return build
