"""How large a tile of similarities each architecture takes, and how the rows' kernels cut their rows.

The tiles themselves are data: kernels/tile_table.py. ``benchmarks/tiles.py`` times what else might suit a GPU, and ``python
-m tools.apply_tiles`` takes over what was faster.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from hicl_fast.kernels import tile_table


@dataclass(frozen=True)
class Tile:
    """One program's share of the similarities, and how it is run."""

    rows: int  # queries
    cols: int  # keys
    depth: int  # dimensions loaded at a time
    num_warps: int
    num_stages: int
    band: int = 8  # row tiles walked together down the columns, so that both operands stay in the level-2 cache
    max_registers: int | None = (
        None  # of a thread, where fewer than the compiler would take let more blocks run at once
    )
    described: bool = False  # the hardware copies blocks of the operands, by descriptors
    persistent: bool = False  # as many programs as multiprocessors, each with many tiles

    def blocks(self) -> dict[str, int]:
        """The launch's keyword arguments of a kernel that walks over its tiles itself."""
        return {
            **({"maxnreg": self.max_registers} if self.max_registers else {}),
            "BLOCK_ROWS": self.rows,
            "BLOCK_COLS": self.cols,
            "BLOCK_DEPTH": self.depth,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }

    def options(self) -> dict[str, int]:
        """The launch's keyword arguments."""
        return {**self.blocks(), "BAND": self.band, "PERSISTENT": self.persistent}


# What a tile of similarities is for: what is kept of it decides how many elements a thread has registers for.
EXP = "exp"
HEAVY_EXP = "heavy exp"  # with own negatives, or with a product
STATISTICS = "statistics"
RULED = "ruled"  # statistics with several positives, and what NARROW is for with a limit, relations or hardness
NARROW = "narrow"  # statistics by column, slopes
LISTED = "listed"  # exp and statistics with lists of columns that are left out
HARD_NEGATIVES = "hard negatives"  # each row keeps its best keys beside it
PARADIGM = "paradigm"  # the gradient paradigm's statistics and weights
PARADIGM_COLUMNS = "paradigm columns"  # its statistics by row and by column
PRODUCT = "product"  # of float32, in every digit
USES = (
    *(EXP, HEAVY_EXP, STATISTICS, RULED, NARROW, LISTED),
    *(HARD_NEGATIVES, PARADIGM, PARADIGM_COLUMNS, PRODUCT),
)
ANY = "any"  # what has no entry of its own


class Case(NamedTuple):
    """What an entry of the table is for."""

    arch: str  # "sm_90", "gfx942", "interpreter"
    operand: str  # "16 bit" (bfloat16, float16), "tf32", "fp32" (no matrix units: multiply-adds)
    use: str


class Entry(NamedTuple):
    tile: Tile
    measured: str = "not timed"


COLUMNS = ("arch", "operand", "use", "tile", "warps", "stages", "band", "regs", "how", "measured")


def read_table(text: str) -> dict[Case, Entry]:
    """The entries of one of kernels/tile_table.py's tables: two spaces or more between its columns."""
    _, *lines = text.strip().splitlines()
    return dict(_read_line(re.split(r" {2,}", line)) for line in lines)


def _read_line(cells: list[str]) -> tuple[Case, Entry]:
    arch, operand, use, shape, num_warps, num_stages, band, registers, how, measured = cells
    rows, cols, depth = (int(size) for size in shape.split("×"))
    tile = Tile(
        rows,
        cols,
        depth,
        num_warps=int(num_warps),
        num_stages=int(num_stages),
        band=int(band),
        max_registers=None if registers == "-" else int(registers),
        described="described" in how,
        persistent="persistent" in how,
    )
    return Case(arch, operand, use), Entry(tile, measured)


# D = 384 to 1024 makes 6 to 16 steps in depth, so a tile's end weighs more than in a large product, and it needs
# registers: similarities, exponentials and masks of a 128×128 tile take 160 to 220 of a thread's 255, and a 128×256
# accumulator spills in all but the plainest kernels. What is known of an entry that was not timed is in
# tests/kernels/test_aot.py: it compiles to matrix instructions, fits, and doesn't spill. So, of those,
# - sm_90 has 3 stages of 32 KB in flight, of 227 KB;
# - sm_100's accumulator lies in tensor memory and is copied to registers: 128 columns spill;
# - sm_80's operands pass through registers, so it has half the depth and a stage more;
# - gfx942 has 64 KB of local memory in all;
# - fp32 is multiplied by each thread for itself: a small tile keeps the accumulator and both operands in registers;
# - the interpreter's is small enough for a test to cross every edge, large enough that it ends soon (0.6 ms a step
#   whatever its size);
# - lists are gone through at a tile's end by a loop, which can't run into the next tile's products: not persistent.
#
# On an H100 the first product at 8192 × 65536 × 768 in bfloat16 took 1.62 ms with its described tile, where PyTorch's takes
# 1.24, the best tile without descriptors 2.01, and 128 × 128 × 64 with 8 warps 2.66: a wide tile reads less from the level-2
# cache, and the next one's operands come while it ends.
ALIGNED = read_table(tile_table.ALIGNED)
ANYWHERE = read_table(tile_table.ANYWHERE)


def similarity_tile(arch: str, operand: str, use: str, can_describe: bool = False) -> Tile:
    """The tile for an architecture ("sm_90", "gfx942", "interpreter"), operand ("16 bit", "tf32", "fp32") and use.

    An architecture that has no entry takes the one before it that has: Blackwell's consumer cards (sm_120), with
    101 KB of shared memory, and everything older than Hopper take sm_80's. ``can_describe`` says that the operands' rows
    begin at multiples of 16 bytes.
    """
    tables = (ALIGNED, ANYWHERE) if can_describe else (ANYWHERE,)
    for like_arch, like_operand in _places(arch, operand):
        for table in tables:
            if own := table.get(Case(like_arch, like_operand, use)):
                return own.tile
            if shared := table.get(Case(like_arch, like_operand, ANY)):
                return _fitted(shared.tile, use)
    raise LookupError(f"no tile for {operand} on {arch}")


def _places(arch: str, operand: str) -> Iterator[tuple[str, str]]:
    """Whose entries serve, the nearest first."""
    yield arch, operand
    if arch == "interpreter":
        yield arch, "any"
    elif operand == "fp32":
        yield "any", operand
    else:
        yield "gfx942" if arch.startswith("gfx") else "sm_80", operand


def _fitted(tile: Tile, use: str) -> Tile:
    """A tile for any use, made as small as this one needs it."""
    if use in (RULED, NARROW, PARADIGM_COLUMNS) and tile.cols > 64:
        return replace(tile, cols=tile.cols // 2)
    if use == HARD_NEGATIVES:
        return replace(
            tile,
            rows=min(tile.rows, 32),
            cols=min(tile.cols, 64),
            num_warps=min(tile.num_warps, 4),
            num_stages=min(tile.num_stages, 2),
        )
    return tile


@dataclass(frozen=True)
class RowTile:
    """One program's share of a row-wise kernel: whole rows."""

    rows: int
    dim: int  # the rows' length, rounded up to a power of two
    num_warps: int

    def options(self) -> dict[str, int]:
        """The launch's keyword arguments."""
        return {"BLOCK_ROWS": self.rows, "BLOCK_DIM": self.dim, "num_warps": self.num_warps}


ROW_TILE_ELEMENTS = 4096  # 16 to 32 a thread with 4 or 8 warps: wide loads, no spills
MOST_ROWS = 16  # with 32 or 64, Triton 3.6 fails to compile loads by row inside a loop


def row_tile(dim: int) -> RowTile:
    """Rows of up to 1024 are taken a few at a time, longer ones with more warps."""
    padded = 1 << (dim - 1).bit_length()
    rows = max(1, min(MOST_ROWS, ROW_TILE_ELEMENTS // padded))
    return RowTile(rows, padded, num_warps=4 if padded <= 2048 else 8 if padded <= 16384 else 16)
