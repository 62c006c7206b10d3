"""Every kernel compiles for every architecture, without spills, within its shared memory, onto its matrix units.

``pytest -s`` prints the table. Needs Triton, and no GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from hicl_fast.kernels import info_nce, own_negatives, paradigm, products, rows, segment_pool  # noqa: E402
from hicl_fast.kernels.tiles import (  # noqa: E402
    ALIGNED,
    ANYWHERE,
    EXP,
    HEAVY_EXP,
    LISTED,
    NARROW,
    PARADIGM,
    PARADIGM_COLUMNS,
    PRODUCT,
    RULED,
    STATISTICS,
    Case,
    RowTile,
    Tile,
    row_tile,
    similarity_tile,
)

from tests.conftest import INTERPRETING
from tests.kernels.aot import SHARED_MEMORY_LIMIT, TARGETS, Resources, compile_for, resources_of  # noqa: E402

pytestmark = [
    pytest.mark.triton,
    pytest.mark.slow,
    pytest.mark.skipif(INTERPRETING, reason="the interpreter has taken the compiler's place"),
]

# The pointers' types; the operands' is filled in.
OPERANDS = (
    "query",
    "key",
    "exp_out",
    "gradient_out",
    "x_ptr",
    "y_ptr",
    "unit_ptr",
    "scaled_ptr",
    "other_ptr",
    "operand_ptr",
    "query_operand_ptr",
    "key_operand_ptr",
    "key_unit_ptr",
    "key_ptr",
    "query_ptr",
    "rows_ptr",
)
GROUPS = ("query_group_ptr", "key_group_ptr")
INDICES = (
    *GROUPS,
    "group_ptr",
    "special_ptr",
    "target_ptr",
    "partner_ptr",
    "begin_ptr",
    "offsets_ptr",
    "left_out_ptr",
    "left_out_offsets_ptr",
    "order_ptr",
    "index_ptr",
)
PLACES = ("nearest_ptr", "column_index_ptr")
SIZES = re.compile(r"num_\w+|dim|first_\w+|parts|part_cols|k|\w+_stride|distance")  # the other numbers are float32

NO_RULES = {"RELATIONS": 1, "LIMITED": False, "HARDENED": False, "LISTED": False}
RULES = {"RELATIONS": 2, "LIMITED": True, "HARDENED": True}
# With every feature on, a kernel needs the most; plain is what the plain loss runs.
FEATURES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "exp, plain": (info_nce.exp_kernel, {"SPECIAL": 1, "GROUPS": 0, "WANTS_DOT": False}, EXP),
    "exp, dot": (info_nce.exp_kernel, {"SPECIAL": 1, "GROUPS": 0, "WANTS_DOT": True}, HEAVY_EXP),
    "exp, own bias": (info_nce.exp_kernel, {"SPECIAL": 2, "GROUPS": 0, "WANTS_DOT": False}, HEAVY_EXP),
    "exp, groups": (info_nce.exp_kernel, {"SPECIAL": 1, "GROUPS": 1, "WANTS_DOT": False}, EXP),
    "exp, groups, dot": (info_nce.exp_kernel, {"SPECIAL": 1, "GROUPS": 1, "WANTS_DOT": True}, HEAVY_EXP),
    "exp, own bias, dot": (info_nce.exp_kernel, {"SPECIAL": 2, "GROUPS": 0, "WANTS_DOT": True}, HEAVY_EXP),
    "exp, rules": (info_nce.exp_kernel, {**RULES, "SPECIAL": 1, "GROUPS": 1, "WANTS_DOT": False}, HEAVY_EXP),
    "exp, rules, own, dot": (info_nce.exp_kernel, {**RULES, "SPECIAL": 2, "GROUPS": 1, "WANTS_DOT": True}, HEAVY_EXP),
    "exp, rules, lists": (
        info_nce.exp_kernel,
        {**RULES, "LISTED": True, "SPECIAL": 1, "GROUPS": 1, "WANTS_DOT": True},
        LISTED,
    ),
    "statistics, rules, lists": (
        info_nce.statistics_kernel,
        {**RULES, "LISTED": True, "SPECIAL": 1, "GROUPS": 1, "HAS_COLUMNS": False},
        LISTED,
    ),
    "statistics": (info_nce.statistics_kernel, {"SPECIAL": 1, "GROUPS": 0, "HAS_COLUMNS": False}, STATISTICS),
    "statistics, relations": (
        info_nce.statistics_kernel,
        {**RULES, "LIMITED": False, "SPECIAL": 1, "GROUPS": 1, "HAS_COLUMNS": False},
        HEAVY_EXP,
    ),
    "statistics, rules": (
        info_nce.statistics_kernel,
        {**RULES, "SPECIAL": 1, "GROUPS": 1, "HAS_COLUMNS": False},
        HEAVY_EXP,
    ),
    "statistics, limit, positives": (
        info_nce.statistics_kernel,
        {"LIMITED": True, "SPECIAL": 1, "GROUPS": 2, "HAS_COLUMNS": False},
        RULED,
    ),
    "statistics, symmetric": (info_nce.statistics_kernel, {"SPECIAL": 1, "GROUPS": 1, "HAS_COLUMNS": True}, NARROW),
    "statistics, positives": (
        info_nce.statistics_kernel,
        {"SPECIAL": 1, "GROUPS": 2, "HAS_COLUMNS": False},
        RULED,
    ),
    "gradients, symmetric": (
        info_nce.similarity_gradient_kernel,
        {"SPECIAL": 1, "GROUPS": 1, "HAS_COLUMNS": True, "WANTS_DOT": True},
        NARROW,
    ),
    "gradients, positives": (
        info_nce.similarity_gradient_kernel,
        {"SPECIAL": 1, "GROUPS": 2, "HAS_COLUMNS": False, "WANTS_DOT": True},
        NARROW,
    ),
    "gradients, limit, positives": (
        info_nce.similarity_gradient_kernel,
        {"LIMITED": True, "SPECIAL": 1, "GROUPS": 2, "HAS_COLUMNS": False, "WANTS_DOT": True},
        RULED,
    ),
    "gradients, relations": (
        info_nce.similarity_gradient_kernel,
        {**RULES, "LIMITED": False, "SPECIAL": 1, "GROUPS": 1, "HAS_COLUMNS": True, "WANTS_DOT": True},
        RULED,
    ),
    "statistics, both ways, relations": (
        info_nce.statistics_kernel,
        {**RULES, "LIMITED": False, "SPECIAL": 1, "GROUPS": 1, "HAS_COLUMNS": True},
        RULED,
    ),
}


def features_of(case: Case) -> list[str]:
    return [name for name, (_, _, use) in FEATURES.items() if use == case.use]


# Operand in the tile table -> its Triton type and how it is multiplied.
PRODUCTS = {"16 bit": ("bf16", "ieee"), "tf32": ("fp32", "tf32"), "fp32": ("fp32", "ieee")}
CONFIGURATIONS = [
    (arch, operand) for arch in TARGETS for operand in PRODUCTS if not (arch == "gfx942" and operand == "tf32")
]


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Lines of the table, printed at the end."""
    kernel = f"{'architecture':<14}{'operand':<9}{'kernel':<34}"
    lines = [kernel + f"{'registers':>9}{'spills':>8}{'shared':>9}{'matrix ops':>12}"]
    yield lines
    print("\n" + "\n".join(lines))


def _types(names: list[str], operand: str) -> dict[str, str]:
    types = {name: "*fp32" for name in names if name.endswith("_ptr")}
    types |= dict.fromkeys(OPERANDS, f"*{operand}") | dict.fromkeys(INDICES, "*i64") | dict.fromkeys(PLACES, "*i32")
    numbers = {name: "fp32" for name in names if name not in types and name.islower() and not SIZES.fullmatch(name)}
    return types | numbers | {"distance": "i64"}


def _check(arch: str, operand: str, name: str, needs: Resources, table: list[str]) -> None:
    table.append(
        f"{arch:<14}{operand:<9}{name:<34}{needs.registers:>9}{needs.spills:>8}{needs.shared:>9}"
        f"{needs.matrix_instructions:>12}"
    )
    assert needs.spills == 0
    assert needs.shared <= SHARED_MEMORY_LIMIT[arch]


def _compile_tiled(arch: str, operand: str, kernel: Any, features: dict[str, Any], tile: Tile) -> Any:
    element, precision = PRODUCTS[operand]
    options = {**tile.options(), "DESCRIBED": tile.described, "PRECISION": precision}
    constants = {key: value for key, value in {**NO_RULES, **features, **options}.items() if key in kernel.arg_names}
    types = _types(kernel.arg_names, element)
    if tile.described:
        sizes = {
            "query": (tile.rows, tile.depth),
            "key": (tile.cols, tile.depth),
            **dict.fromkeys(("exp_out", "gradient_out"), (tile.rows, tile.cols)),
        }
        types |= {name: f"tensordesc<{element}[{rows}, {cols}]>" for name, (rows, cols) in sizes.items()}
    return compile_for(arch, kernel, types, constants, tile.num_warps, tile.num_stages)


@pytest.mark.parametrize(("arch", "operand"), CONFIGURATIONS)
def test_info_nce_kernels(arch: str, operand: str, table: list[str]) -> None:
    names = (
        list(FEATURES) if operand == "16 bit" else ["exp, groups, dot", "statistics, symmetric", "gradients, symmetric"]
    )
    for name in names:
        kernel, features, use = FEATURES[name]
        compiled = _compile_tiled(arch, operand, kernel, features, similarity_tile(arch, operand, use))
        needs = resources_of(compiled)
        _check(arch, operand, name, needs, table)
        assert (needs.matrix_instructions > 0) == (operand != "fp32" or arch == "gfx942")
        if arch == "sm_90" and operand == "16 bit":
            assert "wgmma.mma_async" in compiled.asm["ptx"]


@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case in {**ALIGNED, **ANYWHERE} if case.arch in TARGETS for name in features_of(case)],
    ids=str,
)
def test_info_nce_kernels_under_tiles_of_their_own(case: Case, name: str, table: list[str]) -> None:
    """Those that the table has for one use on one architecture."""
    kernel, features, _ = FEATURES[name]
    for entry in (entries[case] for entries in (ALIGNED, ANYWHERE) if case in entries):
        compiled = _compile_tiled(case.arch, case.operand, kernel, features, entry.tile)
        _check(case.arch, case.operand, f"{name} *", resources_of(compiled), table)
        if entry.tile.described:
            assert "cp.async.bulk.tensor" in compiled.asm["ptx"] and "wgmma.mma_async" in compiled.asm["ptx"]


# Their operands are unit rows in float32. Of the weights, powers need the most; softmax is below.
PARADIGM_KERNELS = {
    "paradigm, statistics": (paradigm.statistics_kernel, {"HAS_COLUMNS": True, "HAS_LSE": True}, PARADIGM_COLUMNS),
    "paradigm, powers": (paradigm.weights_kernel, {"WEIGHT": paradigm.POWER.value}, PARADIGM),
}


@pytest.mark.parametrize(("arch", "operand"), [c for c in CONFIGURATIONS if c[1] != "16 bit"])
def test_paradigm_kernels(arch: str, operand: str, table: list[str]) -> None:
    for name, (kernel, features, use) in PARADIGM_KERNELS.items():
        tile = similarity_tile(arch, operand, use)
        needs = resources_of(_compile_tiled(arch, operand, kernel, features, tile))
        _check(arch, operand, name, needs, table)
        assert (needs.matrix_instructions > 0) == (operand != "fp32" or arch == "gfx942")


@pytest.mark.parametrize("arch", TARGETS)
def test_product_kernel(arch: str, table: list[str]) -> None:
    tile = similarity_tile(arch, "fp32", PRODUCT)
    blocks = {"BLOCK_ROWS": tile.rows, "BLOCK_COLS": tile.cols, "BLOCK_DEPTH": tile.depth}
    kernel = products.product_kernel
    for adds in (False, True):
        constants = {**blocks, "ADDS": adds, "b_col_stride": 1, "out_col_stride": 1}
        types = dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), "*fp32")
        compiled = compile_for(arch, kernel, types, constants, tile.num_warps, tile.num_stages)
        _check(arch, "fp32", f"product, adds={adds}", resources_of(compiled), table)


ROW_KERNELS = {
    "normalise": (rows.normalise_kernel, {"WRITES_UNIT": True, "WRITES_OPERAND": True}),
    "scale rows": (rows.scale_rows_kernel, {}),
    "prepare": (rows.prepare_kernel, {"WRITES_UNIT": True, "WRITES_OPERAND": True, "WRITES_SCALE": True}),
    "rows of exponentials": (info_nce.exp_rows_kernel, {"HAS_MARGIN": True, "WANTS_DOT": True, "BLOCK_TILES": 64}),
    "positive": (rows.positive_kernel, {}),
    "gradient, same index": (rows.gradient_kernel, {"PARTNER": 2}),
    "gradient, listed": (rows.gradient_kernel, {"PARTNER": 3}),
    "sum by target": (paradigm.sum_by_target_kernel, {}),
    "own negatives": (own_negatives.log_sum_exp_kernel, {"LIMITED": True, "RELATIONS": 2}),
    "own negatives, gradient": (
        own_negatives.gradient_kernel,
        {"LIMITED": True, "RELATIONS": 2, "WANTS_ROWS": True},
    ),
}


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dim", [16, 768, 4096])
def test_row_kernels(arch: str, dim: int, table: list[str]) -> None:
    tile: RowTile = row_tile(dim)
    for name, (kernel, features) in ROW_KERNELS.items():
        if dim == 4096 and not any(word in name for word in ("listed", "own", "prepare", "rows of")):
            continue  # those that keep most in registers stand for the others
        blocks = {"BLOCK_ROWS": tile.rows, "BLOCK_DIM": tile.dim}
        constants = {**features, **{block: size for block, size in blocks.items() if block in kernel.arg_names}}
        compiled = compile_for(arch, kernel, _types(kernel.arg_names, "bf16"), constants, tile.num_warps)
        _check(arch, f"D={dim}", name, resources_of(compiled), table)


# What comes between two sweeps, a few numbers a row.
BETWEEN = {
    "log-sums": (info_nce.log_sum_kernel, {"ADDS": True, "BLOCK_ROWS": 32, "BLOCK_TILES": 32}, []),
    "log-sums of columns": (
        info_nce.log_sum_kernel,
        {"ADDS": False, "BLOCK_ROWS": 32, "BLOCK_TILES": 32},
        ["hardest_ptr", "hardest_out"],
    ),
    "losses": (info_nce.loss_rows_kernel, {"BLOCK_ROWS": 128}, []),
    "losses, one direction": (
        info_nce.loss_rows_kernel,
        {"BLOCK_ROWS": 128},
        ["column_lse_ptr", "column_ptr", "loss_grad_ptr"],
    ),
}


@pytest.mark.parametrize("arch", TARGETS)
def test_kernels_between_sweeps(arch: str, table: list[str]) -> None:
    for name, (kernel, features, absent) in BETWEEN.items():
        types = _types(kernel.arg_names, "bf16") | dict.fromkeys(("hardest_out", "positive_out"), "*fp32")
        compiled = compile_for(arch, kernel, types, {**features, **dict.fromkeys(absent)}, num_warps=4)
        _check(arch, "fp32", name, resources_of(compiled), table)


POOL_KERNELS = {
    "pool": (segment_pool.pool_kernel, {"HAS_WEIGHTS": True}, 512),
    "pool, to segments": (segment_pool.segments_gradient_kernel, {"HAS_WEIGHTS": True}, 512),
    "pool, to weights": (segment_pool.weights_gradient_kernel, {}, 1024),
}


@pytest.mark.parametrize("arch", TARGETS)
def test_pool_kernels(arch: str, table: list[str]) -> None:
    for name, (kernel, features, block_dim) in POOL_KERNELS.items():
        constants = {**features, "SUM_TYPE": tl.float32, "BLOCK_DIM": block_dim}
        compiled = compile_for(arch, kernel, _types(kernel.arg_names, "bf16"), constants, num_warps=4)
        _check(arch, "fp32", name, resources_of(compiled), table)


# A launch makes constants of integers that are 1 and of pointers that are None: code of its own for every such call.
ALONE = {
    "num_rows": 1,
    "num_cols": 1,
    "num_others": 1,
    "dim": 1,
    "exp_stride": 1,
    "gradient_stride": 1,
    "weights_stride": 1,
    "first_own": 1,
    "factor_stride": 1,
}
LEFT_OUT = {
    "exp": (info_nce.exp_kernel, {"SPECIAL": 0, "GROUPS": 0, "WANTS_DOT": False}, ["special_ptr", "offset_ptr"]),
    "statistics": (
        info_nce.statistics_kernel,
        {"SPECIAL": 1, "GROUPS": 0, "HAS_COLUMNS": False},
        ["column_partials_ptr", "positive_logit_ptr"],
    ),
    "gradients": (
        info_nce.similarity_gradient_kernel,
        {"SPECIAL": 1, "GROUPS": 0, "HAS_COLUMNS": False, "WANTS_DOT": False},
        ["column_offset_ptr", "column_factor_ptr", "positives_share_ptr"],
    ),
    "paradigm": (
        paradigm.statistics_kernel,
        {"HAS_COLUMNS": False, "HAS_LSE": False},
        ["column_hardest_ptr", "column_index_ptr", "partials_ptr"],
    ),
    "paradigm, softmax": (paradigm.weights_kernel, {"WEIGHT": paradigm.SOFTMAX.value}, []),
    "normalise": (rows.normalise_kernel, {"WRITES_UNIT": False, "WRITES_OPERAND": False}, ["unit_ptr"]),
    "gradient": (rows.gradient_kernel, {"PARTNER": 0}, ["coefficient_ptr", "partner_ptr", "begin_ptr"]),
    "pool": (segment_pool.pool_kernel, {"HAS_WEIGHTS": False, "SUM_TYPE": tl.float32}, ["weights_ptr"]),
    "pool, to segments": (
        segment_pool.segments_gradient_kernel,
        {"HAS_WEIGHTS": False, "SUM_TYPE": tl.float64},
        ["weights_ptr"],
    ),
}


@pytest.mark.parametrize("name", list(LEFT_OUT))
def test_arguments_that_are_one_or_none(name: str) -> None:
    kernel, features, absent = LEFT_OUT[name]
    tile = similarity_tile("sm_90", "16 bit", NARROW)
    blocks = {**tile.options(), "BLOCK_DIM": 64, "PRECISION": "ieee", "DESCRIBED": False}
    rules = (*GROUPS, "limit_ptr", "left_out_ptr", "left_out_offsets_ptr")
    constants = {**NO_RULES, **features, **ALONE, **blocks, **dict.fromkeys([*absent, *rules])}
    taken = {key: value for key, value in constants.items() if key in kernel.arg_names}
    compiled = compile_for("sm_90", kernel, _types(kernel.arg_names, "bf16"), taken, num_warps=8)
    assert resources_of(compiled).spills == 0
