"""What a benchmark measured, as a table, as JSON and as a plot.

A row holds ``batch``, ``name`` and either ``skipped``, the reason, or a timing in seconds (``median``, ``fastest``,
``slowest``), ``memory`` in bytes or None where it was not measured, ``ratio`` of the median to the baseline's, ``error``
where it was checked, and ``gpu``, the seconds that a GPU worked on it, where there is one. ``failed`` is true where it is
a failure of this library that there is no timing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hicl_fast
from hicl_fast._command import check_backend, input_file, output_file, usage

Row = dict[str, Any]

NOT_YET = "not timed: the run ended before it"


class Missing(Exception):
    """Why a candidate can't take part."""


class Wrong(Exception):
    """By how much a candidate computes something else."""


class Results:
    """The rows so far. Their JSON file is written anew with every one, should the next end badly."""

    def __init__(self, about: dict[str, Any], json_file: Path | None) -> None:
        self.about, self.rows = about, list[Row]()
        self._file = json_file

    def start(self, batch: int, name: str, **values: Any) -> Row:
        """A new row, without a timing as yet."""
        self.rows.append({"batch": batch, "name": name, **values, "skipped": NOT_YET})
        self._write()
        return self.rows[-1]

    def note(self, row: Row, **values: Any) -> None:
        row.update(values)
        if "median" in row and row.get("skipped") == NOT_YET:
            del row["skipped"]
        self._write()

    @contextlib.contextmanager
    def attempt(self, row: Row, *, ours: bool) -> Iterator[None]:
        """What goes wrong with one candidate is said in its row, and the others go on."""
        try:
            yield
        except (Missing, hicl_fast.BackendError) as reason:
            self.note(row, skipped=str(reason))
        except Wrong as difference:
            self.note(row, skipped=f"wrong: {difference}", **({"failed": True} if ours else {}))
        except Exception as error:  # whatever it is: report it and go on with the others
            said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            self.note(row, skipped=said, **({"failed": True} if ours else {}))

    def _write(self) -> None:
        if self._file is not None:
            self._file.write_text(json.dumps({"machine": self.about, "rows": self.rows}, indent=1) + "\n")


def exit_status(rows: list[Row]) -> int:
    return int(any(row.get("failed") for row in rows))


# --- options that the benchmarks share -------------------------------------------------------------------------------


def add_output_options(parser: argparse.ArgumentParser, *, plots: bool = True) -> None:
    parser.add_argument("--json", type=output_file, metavar="FILE", help="written anew with every row")
    if plots:
        parser.add_argument("--plot", type=plot_option, metavar="FILE.png")
        parser.add_argument(
            "--from",
            dest="measured",
            type=input_file,
            metavar="FILE.json",
            help="measure nothing: table and plot of what --json wrote",
        )


def plot_option(text: str) -> Path:
    """An argparse type: found out before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("expected matplotlib, which draws it: pip install 'hicl-fast[bench]'")
    return output_file(text)


def check_backends(args: argparse.Namespace, operator: str) -> None:
    """Ends the program where none of the backends does it on the device; the others' refusals are said in their rows."""
    refused = []
    for name in args.backends:
        try:
            check_backend(name, operator, args.device)
        except (ValueError, hicl_fast.BackendError) as refusal:
            refused.append(refusal)
    if args.backends and len(refused) == len(args.backends):
        with usage():
            raise refused[0]


def redraw(args: argparse.Namespace, baseline: str, ratio: str) -> list[Row]:
    """Table and plot of an earlier run's JSON file.

    Raises:
        ValueError: it is no such file.
    """
    try:
        measured = json.loads(args.measured.read_text())
        rows, about = measured["rows"], measured["machine"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"from: expected what --json writes, got {args.measured}") from error
    print_about(about)
    for batch in dict.fromkeys(row["batch"] for row in rows):
        print(table([row for row in rows if row["batch"] == batch], ratio))
    if args.plot:
        plot(rows, about, baseline, args.plot)
    return rows


def print_about(about: dict[str, Any]) -> None:
    print(", ".join(f"{name} {value}" for name, value in about.items()))


# --- table and plot --------------------------------------------------------------------------------------------------


def table(rows: list[Row], ratio: str) -> str:
    """``ratio`` names what a row's ratio is of."""
    has_gpu = any(row.get("gpu") for row in rows)
    width = max(32, *(len(row["name"]) + 2 for row in rows))
    lines = [f"\n{'N':>7}  {'':{width}}{'ms':>10}  {'fastest–slowest':>19}{ratio:>9}{'memory MB':>11}{'error':>9}"]
    lines[0] += f"{'GPU ms':>10}" if has_gpu else ""
    for row in sorted(rows, key=lambda row: row.get("median", float("inf"))):
        head = f"{row['batch']:>7}  {row['name']:{width}}"
        if "skipped" in row:
            lines.append(f"{head}skipped: {row['skipped']}")
            continue
        memory = "" if row["memory"] is None else f"{row['memory'] / 1e6:.1f}"
        error = f"{row['error']:.0e}" if "error" in row else ""
        of_baseline = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        spread = f"{row['fastest'] * 1e3:.3f}–{row['slowest'] * 1e3:.3f}"
        times = f"{row['median'] * 1e3:>10.3f}  {spread:>19}{of_baseline:>9}"
        gpu = f"{row['gpu'] * 1e3:>10.4f}" if row.get("gpu") else ""
        lines.append(f"{head}{times}{memory:>11}{error:>9}{gpu}")
    return "\n".join(lines)


def curve(rows: list[Row], name: str, field: str) -> tuple[list[int], list[float]]:
    """A candidate's values over all batch sizes: NaN, a gap in its line, where there is none to draw on a logarithmic axis."""
    batches = sorted({row["batch"] for row in rows})
    value = {row["batch"]: row.get(field) for row in rows if row["name"] == name and "median" in row}
    return batches, [value.get(batch) or math.nan for batch in batches]


def without_memory(rows: list[Row], name: str) -> str | None:
    """What the legend says of a candidate's points that the memory's axis can't show."""
    own = [row for row in rows if row["name"] == name and "median" in row]
    unknown = [str(row["batch"]) for row in own if row.get("memory") is None]
    nothing = [str(row["batch"]) for row in own if row.get("memory") == 0]
    said = [f"{what} at {', '.join(at)}" for what, at in (("not measured", unknown), ("none", nothing)) if at]
    return f"{name}: {', '.join(said)}" if said else None


def plot(rows: list[Row], about: dict[str, Any], baseline: str, path: Path) -> None:
    """Times and memory over batch sizes. What was not measured is left out, and named in the legend."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (time_axis, memory_axis) = plt.subplots(1, 2, figsize=(13, 5))
    for name in dict.fromkeys(row["name"] for row in rows if "median" in row):
        style: dict[str, Any] = {"marker": "o", "markersize": 4}
        if name == baseline:
            style |= {"linestyle": "--", "color": "black"}
        batches, seconds = curve(rows, name, "median")
        (line,) = time_axis.plot(batches, [1e3 * s for s in seconds], label=name, **style)
        _, memory = curve(rows, name, "memory")
        style["color"] = line.get_color()
        memory_axis.plot(batches, [m / 1e6 for m in memory], label=without_memory(rows, name), **style)
    for axis, label in ((time_axis, "forward + backward, ms"), (memory_axis, "memory beyond the inputs, MB")):
        drawn = any(math.isfinite(value) for line in axis.get_lines() for value in line.get_ydata())
        # matplotlib refuses a logarithmic axis that has nothing to show: no candidate's memory was measured, or none took any
        axis.set(xscale="log", yscale="log" if drawn else "linear", xlabel="batch size", ylabel=label)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8)
    figure.suptitle(f"{about['device']}, {about['dtype']}, D = {about['dim']}, torch {about['torch']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
