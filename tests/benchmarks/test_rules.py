"""The benchmark of the rules, on inputs small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import rules
from torch import Tensor

SMALL = ["--batch-sizes", "12", "--dim", "8", "--seconds", "0.1", "--device", "cpu", "--backends", "torch"]


def test_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules.main([*SMALL, "--json", str(tmp_path / "out.json")])
    rows = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    ours = {f"hicl_fast torch: {rule}" for rule in [*rules.OURS, "as many, shared"]}
    assert rows.keys() == ours | rules.EAGER.keys()
    for name, row in rows.items():
        assert row["fastest"] <= row["median"] <= row["slowest"]
        assert name.endswith("shared") or row["error"] < 1e-5
    assert rows["hicl_fast torch: plain"]["ratio"] == 1
    assert "x plain" in capsys.readouterr().out


def test_a_loss_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_mask(query: Tensor, key: Tensor, own: Tensor, ids: Tensor) -> Tensor:
        return rules.HF.info_nce(query, key, temperature=rules.TEMPERATURE, backend="torch")

    monkeypatch.setitem(rules.EAGER, "eager: mask", (without_mask, "limit, 2 relations"))
    rows = {row["name"]: row for row in rules.main(SMALL)}
    assert rows["eager: mask"]["skipped"].startswith("wrong: relative error") and "median" in rows["eager: einsum"]
