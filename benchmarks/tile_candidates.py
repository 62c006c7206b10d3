"""Which tiles are timed for a use, beside the one that it has: few, since each is compiled.

A tile of similarities is large for the sake of what it reads from the level-2 cache, and small for the sake of registers, of
which its end takes more or fewer. So plain exponentials and sums are offered 128 × 256, and everything else 128 × 128 and
less. Of each size there are those that hide a tile's end: behind the next tile's loads (persistent), or behind another tile's
product (fewer warps, so two blocks a multiprocessor). What spills, as tests/kernels/test_aot.py sees it, is not offered: 256
× 128, and 128 × 128 with no more than 128 registers a thread.
"""

from __future__ import annotations

from dataclasses import replace

from hicl_fast.kernels.tiles import (
    EXP,
    HARD_NEGATIVES,
    LISTED,
    PARADIGM,
    PARADIGM_COLUMNS,
    PRODUCT,
    RULED,
    STATISTICS,
    Tile,
)

WIDE = (
    Tile(128, 256, 64, num_warps=8, num_stages=3, described=True, persistent=True),
    Tile(128, 256, 64, num_warps=8, num_stages=3, described=True),
    Tile(128, 128, 64, num_warps=8, num_stages=4, described=True, persistent=True),
    Tile(128, 128, 64, num_warps=8, num_stages=3, described=True),
    Tile(128, 128, 64, num_warps=4, num_stages=3, described=True),
)
NARROWER = (
    Tile(128, 128, 64, num_warps=8, num_stages=4, described=True, persistent=True),
    Tile(128, 128, 64, num_warps=8, num_stages=3, described=True),
    Tile(128, 64, 64, num_warps=8, num_stages=4, described=True, persistent=True),
    Tile(128, 64, 64, num_warps=4, num_stages=4, described=True),
    Tile(64, 128, 64, num_warps=4, num_stages=4, described=True),
)
NARROWEST = NARROWER[2:]  # of several positives' statistics, 128 × 128 spill
# The kept keys lie beside the similarities, and rows wait for whichever has most to replace: few rows.
SEARCHED = (
    Tile(32, 64, 64, num_warps=4, num_stages=3, described=True),
    Tile(64, 64, 64, num_warps=4, num_stages=3, described=True),
    Tile(32, 128, 64, num_warps=4, num_stages=3, described=True),
    Tile(16, 128, 64, num_warps=4, num_stages=3),
)
# Every thread multiplies for itself: 16 to 64 sums each.
MULTIPLIED = (
    Tile(64, 64, 16, num_warps=4, num_stages=3),
    Tile(64, 64, 32, num_warps=8, num_stages=2),
    Tile(128, 64, 16, num_warps=8, num_stages=3),
    Tile(128, 128, 16, num_warps=8, num_stages=3),
)
# In the interpreter, where every launch takes seconds: as few as show that others than the table's are run.
INTERPRETED = (Tile(16, 32, 32, num_warps=1, num_stages=1, band=2),)

WITHOUT_DESCRIPTORS = (PARADIGM, PARADIGM_COLUMNS, PRODUCT)  # kernels that load for themselves


def candidates(use: str, arch: str, operand: str, now: Tile) -> list[Tile]:
    """The tile in use, and others; each once."""
    can_describe = copies_blocks(arch) and use not in WITHOUT_DESCRIPTORS
    others = (_run_as(tile, use, operand, can_describe) for tile in _others(use, arch, operand))
    return list(dict.fromkeys([now, *others]))


def _others(use: str, arch: str, operand: str) -> tuple[Tile, ...]:
    if arch == "interpreter":
        return INTERPRETED
    if operand == "fp32":
        return MULTIPLIED
    if use == HARD_NEGATIVES:
        return SEARCHED
    if use in (EXP, STATISTICS):
        return WIDE
    return NARROWEST if use == RULED else NARROWER


def copies_blocks(arch: str) -> bool:
    """Whether the hardware does, by descriptors: from Hopper on."""
    return arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 90


def _run_as(tile: Tile, use: str, operand: str, can_describe: bool) -> Tile:
    if not can_describe:
        tile = replace(tile, described=False, persistent=False)
    if use == LISTED:  # the loop over a list at a tile's end is none to run into the next tile's products
        tile = replace(tile, persistent=False)
    return replace(tile, depth=tile.depth // 2) if operand == "tf32" else tile


def name_of(tile: Tile) -> str:
    return ", ".join(
        [
            f"{tile.rows} × {tile.cols} × {tile.depth}",
            f"warps {tile.num_warps}",
            f"stages {tile.num_stages}",
            *([f"registers {tile.max_registers}"] if tile.max_registers else []),
            *(["described"] if tile.described else []),
            *(["persistent"] if tile.persistent else []),
        ]
    )
