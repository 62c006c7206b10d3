"""tools/same_bits.py: sees one bit that differs, and names it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tools import same_bits


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The smallest size alone."""
    monkeypatch.setattr(same_bits, "SIZES", same_bits.SIZES[:1])
    path = tmp_path / "before.safetensors"
    assert same_bits.main(["record", str(path), "--backend", "torch"]) == 0
    return path


def changed(path: Path, name: str, value: torch.Tensor) -> None:
    with safe_open(str(path), "pt") as file:
        about = file.metadata()
    save_file(load_file(str(path)) | {name: value}, str(path), about)


def test_the_same_code_gives_the_same_bits(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert same_bits.main(["compare", str(recorded)]) == 0
    assert capsys.readouterr().out == "0 outputs differ\n"


def test_the_callers_number_of_threads_stays(recorded: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(same_bits.THREADS + 1)
    try:
        same_bits.main(["compare", str(recorded)])
        assert torch.get_num_threads() == same_bits.THREADS + 1
    finally:
        torch.set_num_threads(before)


def test_a_bit_that_differs_is_named(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "info_nce, margin, 5×7×3, float32"
    gradient = load_file(str(recorded))[f"{name}/out/key_grad"]
    gradient.view(torch.int32)[2, 1] ^= 1
    changed(recorded, f"{name}/out/key_grad", gradient)
    assert same_bits.main(["compare", str(recorded)]) == 1
    assert capsys.readouterr().out == f"{name}: key_grad\n1 outputs differ\n"


def test_the_recorded_inputs_are_what_is_computed_with(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "segment pool, 5×7×3, float64"
    changed(recorded, f"{name}/in/weights", load_file(str(recorded))[f"{name}/in/weights"] * 2 + 1)
    assert same_bits.main(["compare", str(recorded)]) == 1
    assert f"{name}: value\n" in capsys.readouterr().out


def test_cases_that_only_one_version_has(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = dict(same_bits.CASES)
    cases["new"] = cases.pop("segment pool")
    monkeypatch.setattr(same_bits, "CASES", cases)
    assert same_bits.main(["compare", str(recorded)]) == 1
    out = capsys.readouterr().out
    assert "segment pool, 5×7×3, float32: only recorded\n" in out and "new, 5×7×3, float32: not recorded\n" in out


def test_every_case_has_gradients_but_hard_negatives(recorded: Path) -> None:
    names = load_file(str(recorded)).keys()
    with_gradients = {name.split(", 5×7×3")[0] for name in names if name.endswith("_grad")}
    assert with_gradients == same_bits.CASES.keys() - {"hard negatives"}
