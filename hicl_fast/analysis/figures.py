"""Figures as PNG, and the numbers behind them as CSV of the same name."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

Row = dict[str, Any]


def write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()})


def heat_maps(rows: Sequence[Row], value: str, path: Path, *, highest: float, shaded: str | None = None) -> None:
    """A panel for each objective over μ_neg and μ_pos, given in units of π; where ``shaded`` is true it is greyed."""
    objectives = list(dict.fromkeys(row["objective"] for row in rows))
    figure, axes = plt.subplots(
        1, len(objectives), figsize=(3.4 * len(objectives) + 1, 3.4), squeeze=False, sharey=True
    )
    for axis, objective in zip(axes[0], objectives, strict=True):
        own = [row for row in rows if row["objective"] == objective]
        positive, negative = (sorted({row[name] for row in own}) for name in ("mu_pos", "mu_neg"))
        cell = {(row["mu_pos"], row["mu_neg"]): row for row in own}
        table = [[cell[p, n][value] for n in negative] for p in positive]
        mesh = axis.pcolormesh(negative, positive, table, vmin=0, vmax=highest, shading="nearest", cmap="viridis")
        if shaded:
            mask = [[0.25 if cell[p, n][shaded] else math.nan for n in negative] for p in positive]
            axis.pcolormesh(negative, positive, mask, vmin=0, vmax=1, shading="nearest", cmap="Greys", alpha=0.8)
        axis.set(title=objective, xlabel=r"$\mu_{neg}$ / $\pi$")
    axes[0, 0].set_ylabel(r"$\mu_{pos}$ / $\pi$")
    beyond = any(row[value] > highest for row in rows)  # has the last colour, and an arrow that says so
    figure.colorbar(mesh, ax=axes[0].tolist(), label=value, extend="max" if beyond else "neither")
    _save(figure, path)


def curves(rows: Sequence[Row], x: str, y: str, by: str, path: Path, *, dashed: str | None = None, xlabel: str) -> None:
    """A line of ``y`` over ``x`` for each value of ``by``; with ``dashed``, another column's beside it."""
    figure, axis = plt.subplots(figsize=(5.5, 4))
    for value in dict.fromkeys(row[by] for row in rows):
        own = [row for row in rows if row[by] == value]
        (line,) = axis.plot([row[x] for row in own], [row[y] for row in own], label=f"{by} = {value}")
        if dashed:
            axis.plot(
                [row[x] for row in own],
                [row[dashed] for row in own],
                "--",
                color=line.get_color(),
                linewidth=3,
                alpha=0.4,
            )
    axis.set(xlabel=xlabel, ylabel=y.replace("_", " "))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(figure, path)


def distributions(rows: Sequence[Row], path: Path) -> None:
    """Densities of the cosine similarity with negatives and with positives, a line for each name."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    for axis, pair in zip(axes, ("negative", "positive"), strict=True):
        for name in dict.fromkeys(row["name"] for row in rows):
            own = [row for row in rows if row["name"] == name]
            axis.plot([row["similarity"] for row in own], [row[pair] for row in own], label=name)
        axis.set(title=f"anchor–{pair} pairs", xlabel="cosine similarity", ylabel="density")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
