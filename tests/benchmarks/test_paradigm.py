"""The benchmark of the gradient paradigm, on batches small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import paradigm
import pytest
import torch
from report import exit_status
from torch import Tensor

SMALL = ["--batch-sizes", "24", "--dim", "16", "--seconds", "0.5", "--device", "cpu"]


def test_every_objective_is_checked_and_timed(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    paradigm.main([*SMALL, *files, "--eager"])
    rows = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    for name in paradigm.NAMES:
        for way in ("torch", "eager"):
            row = rows[f"{name}: {way}"]
            assert row["error"] < 1e-3 and row["median"] > 0 and row["products"] > 0
    assert rows[paradigm.LIMIT]["ratio"] == 1
    assert (tmp_path / "out.png").is_file()


def test_a_wrong_way_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = paradigm.candidate

    def wrong(u: Tensor, v: Tensor) -> Tensor:
        return right("mpt", "eager")(u, v) + right("mat", "eager")(u, v)

    monkeypatch.setattr(paradigm, "candidate", lambda name, way: wrong if way == "torch" else right(name, way))
    rows = paradigm.main([*SMALL, "--backends", "torch", "--objectives", "mpt", "--eager"])
    skipped = {row["name"]: row.get("skipped", "") for row in rows}
    assert skipped["mpt: torch"].startswith("wrong: relative error") and not skipped["mpt: eager"]
    assert exit_status(rows) == 1


def test_products() -> None:
    assert paradigm.products("mpt", 4096, 768) == 1 and paradigm.products("mhs+gd", 4096, 768) == 3
    assert paradigm.products("vicreg", 4096, 768) == 0.75 and paradigm.products("vicreg+gd", 64, 768) == 6
    assert paradigm.products("barlow_twins", 4096, 768) == 9 / 16


def test_an_objective_that_is_not_there() -> None:
    with pytest.raises(SystemExit):
        paradigm.parse(["--objectives", "mpt+gd"])
    args = paradigm.parse([])
    assert set(args.objectives) == set(paradigm.NAMES)
    assert "GB" in paradigm.hindrance("eager", 10**6, torch.device("cpu"))
