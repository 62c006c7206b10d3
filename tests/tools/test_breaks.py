"""The breaks made by hand fit the source, and one that is seen is told from one that isn't."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import breaks

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("one", breaks.BREAKS, ids=lambda one: one.name)
def test_it_fits_the_source(one: breaks.Break) -> None:
    assert not breaks.misfit(one)
    files = [word for word in one.tests.split() if word.startswith("tests/")]
    assert files and all((ROOT / file).exists() for file in files)


def test_they_reach_every_layer() -> None:
    assert len(breaks.BREAKS) >= 30
    assert len({one.name for one in breaks.BREAKS}) == len(breaks.BREAKS)
    layers = {"torch", "cpp", "triton", "common", "arguments", "autograd", "module", "distributed", "trainer"}
    assert {one.layer for one in breaks.BREAKS} == layers


@pytest.mark.slow
def test_one_is_seen_and_one_that_changes_nothing_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    breaks.copy_of_the_checkout(tmp_path)
    real = next(one for one in breaks.BREAKS if one.name == "temperature-bound")
    seen = breaks.attempt(real, tmp_path)
    assert seen.is_seen and any("tests/losses" in test for test in seen.by) and seen.num_passed
    assert not breaks.misfit(real, tmp_path)  # it was undone
    idle = breaks.Break("idle", "module", real.file, real.old, f"{real.old}  # nothing", real.tests)
    assert not (unseen := breaks.attempt(idle, tmp_path)).is_seen and unseen.num_passed
    assert breaks.attempt(breaks.Break("gone", "module", real.file, "no such line", "", real.tests), tmp_path).problem
    assert "1 of 2" in breaks.table([seen, unseen]) and "NOBODY SAW IT" in breaks.table([unseen])
