"""A checkpoint that a kill left half written is never gone on from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hicl_fast.trainer.checkpoints import choose_checkpoint, delete_checkpoints, missing_from


def write_checkpoint(output_dir: Path, step: int) -> Path:
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"weight": torch.zeros(64)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.zeros(64)}, folder / name)
    (folder / "trainer_state.json").write_text(
        json.dumps({"global_step": step, "log_history": [{"loss": 0.5}]}, indent=2)
    )
    return folder


FILES = ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]


def test_newest_by_step_not_by_name(tmp_path: Path) -> None:
    for step in (900, 1000, 20):
        write_checkpoint(tmp_path, step)
    assert choose_checkpoint(tmp_path, "last") == tmp_path / "checkpoint-1000"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut short"])
def test_incomplete_checkpoint_is_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    write_checkpoint(tmp_path, 2)
    path = write_checkpoint(tmp_path, 4) / name
    if damage == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(b"" if damage == "empty" else content[: len(content) * 2 // 3])
    assert choose_checkpoint(tmp_path, "last") == tmp_path / "checkpoint-2"
    with pytest.raises(
        ValueError, match=f"expected a complete checkpoint, but in .*checkpoint-4 {name} is (missing|cut short)"
    ):
        choose_checkpoint(tmp_path, str(tmp_path / "checkpoint-4"))


def test_every_process_needs_its_random_state(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 2)
    assert missing_from(folder, world_size=1) is None
    assert missing_from(folder, world_size=2) == "rng_state_0.pth is missing"


def test_nothing_to_go_on_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resume_from_checkpoint: expected a complete checkpoint in .*, found none"):
        choose_checkpoint(tmp_path, "last")


def test_earlier_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 2)
    with pytest.raises(ValueError, match="output_dir: .* holds checkpoint-2 of an earlier run"):
        choose_checkpoint(tmp_path, None)
    assert choose_checkpoint(tmp_path, None, overwrite=True) is None
    delete_checkpoints(tmp_path)
    assert choose_checkpoint(tmp_path, None) is None
