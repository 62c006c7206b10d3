"""The benchmark of tiles: which it offers, and, in Triton's interpreter, what it finds of every use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import tile_candidates  # noqa: E402
import tile_trials  # noqa: E402
import tiles  # noqa: E402
from hicl_fast.kernels import info_nce  # noqa: E402
from hicl_fast.kernels.tiles import HARD_NEGATIVES, LISTED, USES, Tile, similarity_tile  # noqa: E402

SMALL = ["--device", "cpu", "--dtype", "float32", "--dim", "32", "--rows", "33", "--columns", "40", "--seconds", "0.1"]
CASES = [(arch, operand) for arch in ("sm_80", "sm_90", "sm_100") for operand in ("16 bit", "tf32", "fp32")]


def test_every_use_has_a_trial() -> None:
    assert set(tile_trials.TRIALS) == set(USES)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("arch", "operand"), CASES)
def test_candidates(arch: str, operand: str, use: str) -> None:
    """The tile in use first, each once, and only such as the kernel and the hardware take."""
    now = similarity_tile(arch, operand, use, can_describe=use not in tile_candidates.WITHOUT_DESCRIPTORS)
    found = tile_candidates.candidates(use, arch, operand, now)
    assert found[0] == now and len(set(found)) == len(found) and 4 <= len(found) <= 6
    assert len({tile_candidates.name_of(tile) for tile in found}) == len(found)
    for tile in found:
        assert not tile.described or (arch != "sm_80" and use not in tile_candidates.WITHOUT_DESCRIPTORS)
        assert not tile.persistent or use not in (LISTED, HARD_NEGATIVES)
    sixteen_bit = {tile.depth for tile in tile_candidates.WIDE}
    assert operand == "16 bit" or not sixteen_bit & {tile.depth for tile in found}


@pytest.mark.interpret
@pytest.mark.slow
def test_every_use_is_timed_and_right(tmp_path: Path) -> None:
    file = tmp_path / "tiles.json"
    rows = tiles.main([*SMALL, "--json", str(file)])
    assert json.loads(file.read_text())["rows"] == rows
    for use in USES:
        of_use = [row for row in rows if row["use"] == use]
        assert [row["name"].removeprefix(f"{use}: ") for row in of_use][:3] == [
            tiles.PRODUCT_ALONE,
            tiles.AS_IT_IS,
            tiles.AGAIN,
        ]
        assert len({Tile(**row["tile"]) for row in of_use[1:]}) == 2  # another than the one in use, too
        for row in of_use[1:]:
            assert row["arch"] == "interpreter" and row["operand"] == "fp32" and row["error"] < 1e-4
            assert row["fastest"] <= row["median"] <= row["slowest"]


# What a kernel could get wrong, by use, and the words that it is found by.
FAULTS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "stored": ("exp", "exp_similarities", {"amplitude": 1.1}, "exponentials"),
    "their product": ("heavy exp", "exp_similarities", {"wants_dot": False}, "their products"),
    "by column": ("narrow", "similarity_gradients", {"by_column": None}, "slopes"),
}


@pytest.mark.interpret
@pytest.mark.parametrize(("use", "function", "changed", "words"), FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_is_not_timed(
    use: str, function: str, changed: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(info_nce, function)

    def wrong(similarities: Any, scale: Any, by_row: Any, third: Any, *rest: Any, **options: Any) -> None:
        third = changed.get("by_column", third)
        named = {name: value for name, value in changed.items() if name != "by_column"}
        right(similarities, scale, by_row, third, *rest, **{**options, **named})

    monkeypatch.setattr(info_nce, function, wrong)
    rows = tiles.main([*SMALL, "--uses", use])
    in_use = [row for row in rows if "tile" in row]
    assert in_use and all("median" not in row and row["skipped"].startswith(f"wrong: {words}") for row in in_use)
    assert [row.get("failed", False) for row in in_use] == [True, True, False]


@pytest.mark.interpret
def test_what_is_not_written_is_not_right() -> None:
    """A launch that leaves everything as it was isn't taken for the one before it."""
    query, key = torch.randn(20, 32), torch.randn(30, 32)
    problem = tile_trials.InfoNCE(query, key, "ieee")
    tile = similarity_tile("interpreter", "fp32", "exp")
    problem.stored.zero_()
    problem.exp(tile, wants_dot=False)  # not launched
    assert problem.stored.isnan().all() and problem.sums(1, tile).isnan().all()
