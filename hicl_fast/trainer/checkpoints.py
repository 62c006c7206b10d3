"""Which checkpoint to go on from. One that a kill left half written is never chosen."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

UNFINISHED = ".unfinished-"  # folders that a checkpoint is written in before it is moved to its place


def choose_checkpoint(
    output_dir: str | Path, resume_from: str | None, *, world_size: int = 1, overwrite: bool = False
) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` means; None to start from the beginning.

    Raises:
        ValueError: the checkpoint is incomplete, there is none to go on from, or ``output_dir`` holds an earlier run's
            and the arguments do not say what should become of them.
    """
    folders = _checkpoints(Path(output_dir))
    complete = [folder for folder in folders if missing_from(folder, world_size) is None]
    if resume_from in ("last", "True", "true"):
        if not complete:
            raise ValueError(f"resume_from_checkpoint: expected a complete checkpoint in {output_dir}, found none")
        return complete[-1]
    if resume_from is not None:
        lacking = missing_from(Path(resume_from), world_size)
        if lacking is not None:
            raise ValueError(f"resume_from_checkpoint: expected a complete checkpoint, but in {resume_from} {lacking}")
        return Path(resume_from)
    if folders and not overwrite:
        raise ValueError(
            f"output_dir: {output_dir} holds {folders[-1].name} of an earlier run; expected --resume_from_checkpoint last "
            "to go on from it, --overwrite_output_dir to delete it, or another folder"
        )
    return None


def delete_checkpoints(output_dir: str | Path) -> None:
    for folder in (*_checkpoints(Path(output_dir)), *Path(output_dir).glob(f"{UNFINISHED}*")):
        shutil.rmtree(folder)


def missing_from(checkpoint: Path, world_size: int = 1) -> str | None:
    """What a checkpoint lacks, in words; None if it is complete.

    ``transformers`` writes ``trainer_state.json`` after everything else and deletes older checkpoints only then, so a
    whole one vouches for what was written before it by the same process.
    """
    random_states = ["rng_state.pth"] if world_size == 1 else [f"rng_state_{rank}.pth" for rank in range(world_size)]
    for name in ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", *random_states):
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if not _is_whole(path):
            return f"{name} is cut short"
    return None


def _is_whole(path: Path) -> bool:
    """Whether the file opens to its end: torch's files are zip archives, whose table of contents comes last."""
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return False
        return True
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return True
        except SafetensorError:
            return False
    return zipfile.is_zipfile(path)


def _checkpoints(output_dir: Path) -> list[Path]:
    """By step, oldest first."""
    found = [folder for folder in output_dir.glob("checkpoint-*") if folder.is_dir() and folder.name[11:].isdigit()]
    return sorted(found, key=lambda folder: int(folder.name[11:]))
