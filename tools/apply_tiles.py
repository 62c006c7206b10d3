"""Takes over, into kernels/tile_table.py, the tiles that benchmarks/tiles.py found to be faster than those in use.

    python -m tools.apply_tiles tiles.json

For each architecture, operand and use in the file: the fastest tile that was right, where it is faster than the one in use
by more than noise; else the one in use, beside its time. Noise is what the tile in use, timed twice, differs from itself,
twice over, and at least 2 %. The same file again changes nothing. Run tests/kernels/test_aot.py afterwards: it compiles each
entry with all rules.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hicl_fast._command import Parser, command, input_file, needs, usage

with needs("triton", __name__):
    from hicl_fast.kernels.tiles import COLUMNS, Case, Entry, Tile, read_table, similarity_tile

TABLE = Path(__file__).resolve().parents[1] / "kernels" / "tile_table.py"
LEAST_NOISE = 0.02

Entries = dict[Case, Entry]


@command("triton")
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with usage():
        trials = read_trials(args.file)
    text = args.table.read_text()
    tables = {name: read_table(section(text, name)) for name in ("ALIGNED", "ANYWHERE")}
    for trial in trials:
        entry, said = decide(trial)
        print(f"{', '.join(trial.case)}: {said}")
        if entry is not None:
            tables["ALIGNED" if trial.aligned else "ANYWHERE"][trial.case] = entry
    for name, entries in tables.items():
        text = text.replace(section(text, name), f"\n{write_table(entries)}\n")
    args.table.write_text(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=input_file, metavar="FILE.json", help="what benchmarks/tiles.py --json wrote")
    parser.add_argument("--table", type=input_file, default=TABLE, metavar="FILE.py", help="default: the kernels' own")
    return parser.parse_args(argv)


# --- what was measured -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """What a file has of one use."""

    case: Case
    aligned: bool  # whether operands' rows began at multiples of 16 bytes
    seconds: dict[
        Tile, list[float]
    ]  # medians, of the tile in use more than one; none where there was no room for a tile
    where: str  # the card and the day

    def measured(self, tile: Tile) -> str:
        return f"{1e3 * min(self.seconds[tile]):.3f} ms, {self.where}"


def read_trials(file: Path) -> list[Trial]:
    """Raises:
    ValueError: it is no such file, or was not measured on a GPU.
    """
    try:
        measured = json.loads(file.read_text())
        where = f"{short(measured['machine']['device'])}, {measured['machine']['date']}"
        return list(_trials([row for row in measured["rows"] if "tile" in row], where))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"file: expected what benchmarks/tiles.py writes, got {file}") from error


def _trials(rows: list[dict[str, Any]], where: str) -> Iterator[Trial]:
    found: dict[tuple[Case, bool], dict[Tile, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        case = Case(row["arch"], row["operand"], row["use"])
        if case.arch == "interpreter":
            raise ValueError("file: expected times of a GPU; those of Triton's interpreter say nothing")
        seconds = found[case, row["aligned"]][Tile(**row["tile"])]
        if "skipped" not in row and "failed" not in row and "error" in row:  # it was right, and was timed
            seconds.append(row["median"])
    for (case, aligned), of_tiles in found.items():
        yield Trial(case, aligned, dict(of_tiles), where)


def short(card: str) -> str:
    """ "H100" of "NVIDIA H100 80GB HBM3"."""
    found = re.search(r"[A-Z]*\d+\w*", card)
    return found[0] if found else card


# --- what follows ----------------------------------------------------------------------------------------------------


def decide(trial: Trial) -> tuple[Entry | None, str]:
    """The table's entry, None: as it is; and why."""
    now = similarity_tile(*trial.case, can_describe=trial.aligned)
    timed = {tile: min(seconds) for tile, seconds in trial.seconds.items() if seconds}
    if not timed:
        return None, "as it is, since none was timed"
    if now not in trial.seconds:
        return None, "as it is, since the tile in use was not among those that were tried"
    best = min(timed, key=lambda tile: timed[tile])
    chosen = best if now not in timed or timed[best] < timed[now] * (1 - noise(trial.seconds[now])) else now
    entry = Entry(chosen, trial.measured(chosen))
    if chosen == now:
        return entry, f"as it is, {entry.measured}"
    before = f"{1e3 * timed[now]:.3f} ms" if now in timed else "no time: it was wrong or did not run"
    return entry, f"{entry.measured}, by another tile; the one before had {before}"


def noise(seconds: list[float]) -> float:
    return max(LEAST_NOISE, 2 * (max(seconds) / min(seconds) - 1))


# --- the table's text ------------------------------------------------------------------------------------------------


def section(text: str, name: str) -> str:
    """What is between a table's quotes."""
    found = re.search(rf'^{name} = """(.*?)"""', text, re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError(f"table: expected {name} in it")
    return found[1]


def write_table(entries: Entries) -> str:
    lines = [COLUMNS, *(_cells(case, entries[case]) for case in sorted(entries))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _cells(case: Case, entry: Entry) -> tuple[str, ...]:
    tile = entry.tile
    how = [word for word, holds in (("described", tile.described), ("persistent", tile.persistent)) if holds]
    return (
        *case,
        f"{tile.rows}×{tile.cols}×{tile.depth}",
        *map(str, (tile.num_warps, tile.num_stages, tile.band, tile.max_registers or "-")),
        ", ".join(how) or "-",
        entry.measured,
    )


if __name__ == "__main__":
    sys.exit(main())
