"""What a benchmark measured, as a table, as JSON and as a plot.

A row holds ``batch``, ``name`` and either ``skipped``, the reason, or a timing in seconds (``median``, ``fastest``,
``slowest``), ``memory`` in bytes or None, ``ratio`` of the median to the baseline's, ``error`` where it was checked, and
``gpu``, the seconds that a GPU worked on it, where there is one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

from hicl_fast._command import output_file

Row = dict[str, Any]


def plot_option(text: str) -> Path:
    """An argparse type: found out before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("expected matplotlib, which draws it: pip install 'hicl-fast[bench]'")
    return output_file(text)


def write(
    rows: list[Row], about: dict[str, Any], baseline: str, json_file: Path | None, plot_file: Path | None
) -> None:
    if json_file:
        json_file.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    if plot_file:
        plot(rows, about, baseline, plot_file)


def table(rows: list[Row], ratio: str) -> str:
    """``ratio`` names what a row's ratio is of."""
    has_gpu = any(row.get("gpu") for row in rows)
    lines = [f"\n{'N':>7}  {'':32}{'ms':>10}  {'fastest–slowest':>19}{ratio:>9}{'memory MB':>11}{'error':>9}"]
    lines[0] += f"{'GPU ms':>10}" if has_gpu else ""
    for row in sorted(rows, key=lambda row: row.get("median", float("inf"))):
        head = f"{row['batch']:>7}  {row['name']:32}"
        if "skipped" in row:
            lines.append(f"{head}skipped: {row['skipped']}")
            continue
        memory = "" if row["memory"] is None else f"{row['memory'] / 1e6:.1f}"
        error = f"{row['error']:.0e}" if "error" in row else ""
        spread = f"{row['fastest'] * 1e3:.3f}–{row['slowest'] * 1e3:.3f}"
        times = f"{row['median'] * 1e3:>10.3f}  {spread:>19}{row['ratio']:>9.2f}"
        gpu = f"{row['gpu'] * 1e3:>10.4f}" if row.get("gpu") else ""
        lines.append(f"{head}{times}{memory:>11}{error:>9}{gpu}")
    return "\n".join(lines)


def plot(rows: list[Row], about: dict[str, Any], baseline: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (time_axis, memory_axis) = plt.subplots(1, 2, figsize=(13, 5))
    for name in dict.fromkeys(row["name"] for row in rows if "median" in row):
        own = [row for row in rows if row["name"] == name and "median" in row]
        style = {"linestyle": "--", "color": "black"} if name == baseline else {"marker": "o", "markersize": 4}
        time_axis.plot([r["batch"] for r in own], [r["median"] * 1e3 for r in own], label=name, **style)
        if name != baseline:
            memory_axis.plot(
                [r["batch"] for r in own], [max(r["memory"] or 0, 1) / 1e6 for r in own], label=name, **style
            )
    for axis, label in ((time_axis, "forward + backward, ms"), (memory_axis, "memory beyond the inputs, MB")):
        axis.set(xscale="log", yscale="log", xlabel="batch size", ylabel=label)
        axis.grid(alpha=0.3)
    time_axis.legend(fontsize=8)
    figure.suptitle(f"{about['device']}, {about['dtype']}, D = {about['dim']}, torch {about['torch']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
