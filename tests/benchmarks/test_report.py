"""What benchmarks write: every row at once, and plots that show what was measured and nothing else."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import loss_throughput
import measure
import pytest
import report
import torch
from matplotlib.axes import Axes
from report import NOT_YET, Missing, Results, Row, Wrong

ABOUT = {"device": "a processor", "dtype": "float32", "dim": 8, "torch": "2"}
COMMITTED = sorted((Path(__file__).resolve().parents[2] / "benchmarks" / "results").glob("*-zen3-*.json"))


def timed(batch: int, name: str, memory: int | None = 1000, **values: Any) -> Row:
    row = {"batch": batch, "name": name, "median": 1e-3, "fastest": 1e-3, "slowest": 2e-3, "ratio": 1.0}
    return {**row, "memory": memory, **values}


def drawn(monkeypatch: pytest.MonkeyPatch, rows: list[Row], tmp_path: Path) -> dict[tuple[str, str], list[float]]:
    """The lines' y values, of both axes."""
    lines: dict[tuple[str, str], list[float]] = {}
    real = Axes.set

    def keep(self: Axes, **options: Any) -> Any:
        for line in self.lines:
            lines[options["ylabel"].split(",")[0], str(line.get_label())] = list(map(float, line.get_ydata()))
        return real(self, **options)

    monkeypatch.setattr(Axes, "set", keep)
    report.plot(rows, ABOUT, "limit", tmp_path / "out.png")
    return lines


def test_what_was_not_measured_is_not_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [timed(n, "limit") for n in (64, 512, 4096)]
    rows += [timed(64, "ours"), timed(512, "ours", memory=None), timed(4096, "ours", memory=0)]
    rows += [timed(64, "theirs"), {"batch": 512, "name": "theirs", "skipped": "too large"}, timed(4096, "theirs")]
    lines = drawn(monkeypatch, rows, tmp_path)
    ours = lines["memory beyond the inputs", "ours: not measured at 512, none at 4096"]
    assert ours[0] == 1e-3 and math.isnan(ours[1]) and math.isnan(ours[2])
    assert not any(math.isnan(y) for y in lines["forward + backward", "ours"])
    theirs = lines["forward + backward", "theirs"]  # a gap, and no line over it
    assert [math.isnan(y) for y in theirs] == [False, True, False]


@pytest.mark.parametrize("memory", [None, 0])
def test_no_memory_to_draw_at_all(memory: int | None, tmp_path: Path) -> None:
    report.plot([timed(24, name, memory=memory) for name in ("limit", "ours")], ABOUT, "limit", tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_every_point_of_a_committed_figure_was_measured(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = json.loads(file.read_text())["rows"]
    measured = {"forward + backward": 1e3, "memory beyond the inputs": 1e-6}
    field = {"forward + backward": "median", "memory beyond the inputs": "memory"}
    for (axis, _), values in drawn(monkeypatch, rows, tmp_path).items():
        there = [row[field[axis]] * measured[axis] for row in rows if row.get(field[axis])]
        assert all(math.isnan(y) or any(math.isclose(y, x) for x in there) for y in values)


def test_a_figure_out_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, figure = tmp_path / "results.json", tmp_path / "out.png"
    file.write_text(json.dumps({"machine": ABOUT, "rows": [timed(64, "ours"), timed(64, loss_throughput.LIMIT)]}))
    loss_throughput.main(["--from", str(file), "--plot", str(figure)])
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "a processor" in (said := capsys.readouterr().out) and "ours" in said
    for text in ("[]", "{", '{"rows": 3}'):
        file.write_text(text)
        with pytest.raises(SystemExit, match="from: expected what --json writes"):
            loss_throughput.main(["--from", str(file)])
    with pytest.raises(SystemExit, match="nowhere.json"):
        loss_throughput.main(["--from", str(tmp_path / "nowhere.json")])


def test_every_row_is_written_at_once(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    results = Results(ABOUT, file)

    def written() -> list[Row]:
        return json.loads(file.read_text())["rows"]

    row = results.start(64, "ours")
    assert written() == [{"batch": 64, "name": "ours", "skipped": NOT_YET}]
    results.note(row, median=1.0)
    assert written() == [{"batch": 64, "name": "ours", "median": 1.0}]
    for error, skipped, failed in (
        (Missing("too large"), "too large", False),
        (Wrong("by 3"), "wrong: by 3", True),
        (RuntimeError("CUDA error\nand more"), "RuntimeError: CUDA error", True),
    ):
        row = results.start(64, "another")
        with results.attempt(row, ours=True):
            raise error
        assert written()[-1].get("skipped") == skipped and bool(row.get("failed")) is failed
        with results.attempt(results.start(64, "a rival"), ours=False):
            raise error
        assert "failed" not in written()[-1]
    assert report.exit_status(results.rows) == 1


def test_machines_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert measure.machine(torch.device("cpu"))["commit"] == "unknown"
