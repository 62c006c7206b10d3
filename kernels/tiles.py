"""How large a tile of similarities each architecture takes, and how the rows' kernels cut their rows."""

from __future__ import annotations

from dataclasses import dataclass, replace


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


# Keyed by architecture and operand: "16 bit" (bfloat16, float16), "tf32", "fp32" (no matrix units: multiply-adds).
# D = 384 to 1024 makes 6 to 16 steps in depth, so a tile's end weighs more than in a large product, and it needs
# registers: similarities, exponentials and masks of a 128×128 tile take 160 to 220 of a thread's 255, and a 128×256
# accumulator spills. What is known of each entry is in tests/kernels/test_aot.py: it compiles to matrix instructions,
# fits, and doesn't spill. None has been timed yet.
SIMILARITY_TILES: dict[tuple[str, str], Tile] = {
    # 3 stages of 32 KB in flight, of 227 KB
    ("sm_90", "16 bit"): Tile(128, 128, 64, num_warps=8, num_stages=3),
    ("sm_90", "tf32"): Tile(128, 128, 32, num_warps=8, num_stages=3),
    # the accumulator lies in tensor memory and is copied to registers: 128 columns spill
    ("sm_100", "16 bit"): Tile(128, 64, 64, num_warps=8, num_stages=3),
    ("sm_100", "tf32"): Tile(128, 64, 32, num_warps=8, num_stages=3),
    # operands pass through registers here, so half the depth and a stage more
    ("sm_80", "16 bit"): Tile(128, 128, 32, num_warps=8, num_stages=4),
    ("sm_80", "tf32"): Tile(128, 64, 32, num_warps=8, num_stages=3),
    # 64 KB of local memory in all
    ("gfx942", "16 bit"): Tile(128, 128, 64, num_warps=8, num_stages=2),
    # each thread multiplies for itself: a small tile keeps the accumulator and both operands in registers
    ("any", "fp32"): Tile(64, 64, 16, num_warps=8, num_stages=3),
    # small enough for a test to cross every edge, large enough that it ends soon (0.6 ms a step whatever its size)
    ("interpreter", "any"): Tile(32, 32, 32, num_warps=1, num_stages=1, band=2),
}


# What a tile of similarities is for: what is kept of it decides how many elements a thread has registers for.
EXP = "exp"
HEAVY_EXP = "exp with own negatives, or with a product"
STATISTICS = "statistics"
RULED = "statistics with several positives, and what NARROW is for with a limit, relations or hardness"
NARROW = "statistics by column, slopes"
LISTED = "exp and statistics with lists of columns that are left out"

# Where the operands' rows begin at multiples of 16 bytes, so that they can be described to the hardware. On an H100 the
# first product at 8192 × 65536 × 768 in bfloat16 took 1.62 ms with the first of these, where PyTorch's takes 1.24, the best
# tile without descriptors 2.01, and 128 × 128 × 64 with 8 warps 2.66: a wide tile reads less from the level-2 cache, and
# the next one's operands come while it ends.
DESCRIBED_TILES: dict[tuple[str, str, str], Tile] = {
    ("sm_90", "16 bit", EXP): Tile(128, 256, 64, num_warps=8, num_stages=3, described=True, persistent=True),
    ("sm_90", "16 bit", HEAVY_EXP): Tile(128, 128, 64, num_warps=8, num_stages=4, described=True, persistent=True),
    ("sm_90", "16 bit", STATISTICS): Tile(128, 256, 64, num_warps=8, num_stages=3, described=True, persistent=True),
    ("sm_90", "16 bit", NARROW): Tile(128, 128, 64, num_warps=8, num_stages=4, described=True, persistent=True),
    # not persistent: the loop over a list at a tile's end is none to run into the next tile's products
    ("sm_90", "16 bit", LISTED): Tile(128, 128, 64, num_warps=8, num_stages=4, described=True),
    **{
        ("interpreter", "16 bit", use): replace(SIMILARITY_TILES["interpreter", "any"], described=True, persistent=True)
        for use in (EXP, HEAVY_EXP, STATISTICS, RULED, NARROW, LISTED)
    },
}


def similarity_tile(arch: str, operand: str, use: str, can_describe: bool = False) -> Tile:
    """The tile for an architecture ("sm_90", "gfx942", "interpreter"), operand ("16 bit", "tf32", "fp32") and use.

    An architecture that has no entry takes the one before it that has: Blackwell's consumer cards (sm_120), with
    101 KB of shared memory, and everything older than Hopper take sm_80's.
    """
    if can_describe and (tile := DESCRIBED_TILES.get((arch, operand, use))):
        return tile
    tile = _undescribed_tile(arch, operand)
    return replace(tile, cols=tile.cols // 2) if use in (RULED, NARROW) and tile.cols > 64 else tile


def _undescribed_tile(arch: str, operand: str) -> Tile:
    if arch == "interpreter":
        return SIMILARITY_TILES["interpreter", "any"]
    if operand == "fp32":
        return SIMILARITY_TILES["any", "fp32"]
    fallback = "gfx942" if arch.startswith("gfx") else "sm_80"
    return SIMILARITY_TILES.get((arch, operand)) or SIMILARITY_TILES[fallback, operand]


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
