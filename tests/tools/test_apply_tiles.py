"""tools/apply_tiles.py: which measured tiles it takes over, what it refuses, and the table that it writes."""

from __future__ import annotations

import json
import runpy
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from hicl_fast.kernels.tiles import ANY, EXP, PRODUCT, RULED, Case, Entry, Tile, read_table, similarity_tile  # noqa: E402

from tools import apply_tiles  # noqa: E402

MACHINE = {"device": "NVIDIA H100 80GB HBM3", "date": "2030-01-02"}
NOW = similarity_tile("sm_90", "16 bit", RULED, can_describe=True)
OTHER = replace(NOW, rows=64, cols=128, described=True, persistent=True, max_registers=128)
WORSE = replace(NOW, num_stages=7)


def row(tile: Tile, milliseconds: float | None, **values: Any) -> dict[str, Any]:
    about = {"arch": "sm_90", "operand": "16 bit", "use": RULED, "aligned": True, "tile": asdict(tile)}
    timing = {"skipped": "no room"} if milliseconds is None else {"median": milliseconds / 1e3, "error": 1e-3}
    return {"batch": 8, "name": "", **about, **timing, **values}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return Path(shutil.copy(apply_tiles.TABLE, tmp_path / "tile_table.py"))


def apply(table: Path, *rows: dict[str, Any]) -> dict[str, dict[Case, Entry]]:
    """What the tables hold afterwards."""
    file = table.with_name("tiles.json")
    file.write_text(json.dumps({"machine": MACHINE, "rows": [{"name": "product alone", "median": 1.0}, *rows]}))
    apply_tiles.main([str(file), "--table", str(table)])
    return {name: read_table(text) for name, text in runpy.run_path(str(table)).items() if name.isupper()}


def chosen(table: Path, *rows: dict[str, Any]) -> Entry | None:
    return apply(table, *rows)["ALIGNED"].get(Case("sm_90", "16 bit", RULED))


def test_the_fastest_is_taken_with_its_time(table: Path) -> None:
    found = chosen(table, row(NOW, 2.0), row(NOW, 2.01), row(WORSE, 1.6), row(OTHER, 1.5))
    assert found == Entry(OTHER, "1.500 ms, H100, 2030-01-02")


@pytest.mark.parametrize("again", [2.0, 2.1])
def test_only_where_it_is_faster_by_more_than_noise(table: Path, again: float) -> None:
    """At least 2 %, and twice what the tile in use differs from itself."""
    within = 2.0 * (1 - 0.019 if again == 2.0 else 1 - 0.09)
    found = chosen(table, row(NOW, 2.0), row(NOW, again), row(OTHER, within))
    assert found == Entry(NOW, "2.000 ms, H100, 2030-01-02")
    beyond = 2.0 * (1 - 0.021 if again == 2.0 else 1 - 0.11)
    assert chosen(table, row(NOW, 2.0), row(NOW, again), row(OTHER, beyond)) == Entry(
        OTHER, f"{beyond:.3f} ms, H100, 2030-01-02"
    )


@pytest.mark.parametrize(
    "fault",
    [{"skipped": "wrong: relative error"}, {"failed": True}, {"error": None}],
    ids=["skipped", "failed", "not checked"],
)
def test_what_was_wrong_or_not_checked_is_not_taken(table: Path, fault: dict[str, Any]) -> None:
    bad = {name: value for name, value in row(OTHER, 0.1, **fault).items() if value is not None}
    found = chosen(table, row(NOW, 2.0), bad, row(WORSE, 3.0))
    assert found is not None and found.tile == NOW


def test_what_was_not_timed_is_not_taken(table: Path) -> None:
    before = table.read_text()
    assert chosen(table, row(NOW, None), row(OTHER, None)) is None
    assert table.read_text() == before


def test_a_tile_in_use_that_does_not_run_is_replaced(table: Path) -> None:
    found = chosen(table, row(NOW, None, failed=True), row(OTHER, 5.0))
    assert found is not None and found.tile == OTHER


def test_without_the_tile_in_use_nothing_is_known(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = table.read_text()
    assert chosen(table, row(OTHER, 0.1)) is None
    assert table.read_text() == before and "was not among those" in capsys.readouterr().out


def test_the_same_file_again_changes_nothing(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(NOW, 2.0), row(NOW, 1.9), row(OTHER, 1.5), row(WORSE, 1.51)]
    chosen(table, *rows)
    once = table.read_text()
    monkeypatch.setattr(apply_tiles, "similarity_tile", lambda *case, can_describe: OTHER)  # as the new table says
    chosen(table, *rows)
    assert table.read_text() == once


def test_other_entries_stay(table: Path) -> None:
    before = apply(table)
    after = apply(table, row(NOW, 2.0), row(OTHER, 1.0))
    assert after["ANYWHERE"] == before["ANYWHERE"]
    assert {case: entry for case, entry in after["ALIGNED"].items() if case.use != RULED} == before["ALIGNED"]


def test_operands_anywhere_have_a_table_of_their_own(table: Path) -> None:
    """One architecture's tile for what all others go on sharing."""
    now = similarity_tile("sm_90", "fp32", PRODUCT)
    of_product = {"operand": "fp32", "use": PRODUCT, "aligned": False}
    tables = apply(table, row(now, 9.0, **of_product), row(WORSE, 4.0, **of_product))
    assert tables["ANYWHERE"][Case("sm_90", "fp32", PRODUCT)].tile == WORSE
    assert tables["ANYWHERE"][Case("any", "fp32", ANY)] == Entry(now)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps({"machine": MACHINE, "rows": [row(NOW, 1.0, arch="interpreter")]}), "expected times of a GPU"),
        (json.dumps({"gpu": "NVIDIA H100", "rows": []}), "expected what benchmarks/tiles.py writes"),
        ("[]", "expected what benchmarks/tiles.py writes"),
        ("no JSON", "expected what benchmarks/tiles.py writes"),
    ],
)
def test_other_files_are_refused(
    text: str, words: str, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = table.read_text()
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(SystemExit) as end:
        apply_tiles.main([str(tmp_path / "other.json"), "--table", str(table)])
    assert end.value.code == 2 and words in capsys.readouterr().err
    assert table.read_text() == before


def test_the_table_is_written_as_it_is_read() -> None:
    """The file is what the program writes, and every column comes back."""
    text = apply_tiles.TABLE.read_text()
    for name in ("ALIGNED", "ANYWHERE"):
        section = apply_tiles.section(text, name)
        assert apply_tiles.write_table(read_table(section)) == section.strip()
    entries = {Case("sm_90", "tf32", EXP): Entry(OTHER, "1.000 ms, H100, 2030-01-02"), Case("a", "b", "c"): Entry(NOW)}
    assert read_table(apply_tiles.write_table(entries)) == entries


@pytest.mark.parametrize(
    ("card", "name"),
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-40GB", "A100"), ("AMD Instinct MI300X", "MI300X")],
)
def test_a_card_has_a_short_name(card: str, name: str) -> None:
    assert apply_tiles.short(card) == name
