"""No kernel multiplies two sizes in 32 bits on the way to an address: N · D and N · M may be larger than 2³¹."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from hicl_fast.kernels import hard_negatives, info_nce, mixed_negatives, own_negatives, paradigm, rows, segment_pool  # noqa: E402
from hicl_fast.kernels.hard_negatives import hard_negatives_tile  # noqa: E402
from hicl_fast.kernels.tiles import NARROW, similarity_tile  # noqa: E402

from tests.conftest import INTERPRETING
from tests.kernels.aot import compile_for  # noqa: E402
from tests.kernels.test_aot import _types  # noqa: E402

pytestmark = [
    pytest.mark.triton,
    pytest.mark.slow,
    pytest.mark.skipif(INTERPRETING, reason="the interpreter has taken the compiler's place"),
]

# What an address is made of, step by step; anything else (a value that was loaded, a quotient) is where it begins.
_PASSED_ON = {"addi", "subi", "muli", "minsi", "maxsi", "extsi", "extui", "select"}
_PASSED_ON |= {"splat", "broadcast", "expand_dims", "reshape", "trans"}
_LINE = re.compile(r"^\s*(%[\w]+)(?::\d+)? = \"?(?:arith|tt|scf)\.(\w+)\"? ?(.*?)(?: loc\(.*)?$")


def products_in_32_bits(ttir: str) -> list[str]:
    """Lines of Triton's intermediate code that multiply two numbers known only at run time, or one with a stride."""
    steps: dict[str, tuple[str, list[str], str]] = {}
    addresses: list[str] = []
    for line in ttir.splitlines():
        match = _LINE.match(line)
        if match:
            name, operation, rest = match.groups()
            operands = re.findall(r"%\w+", rest)
            steps[name] = (operation, operands, line.strip())
            if operation == "addptr":
                addresses.append(operands[1])
    found, seen = [], set()

    def is_constant(name: str) -> bool:
        operation, operands, _ = steps.get(name, ("argument", [], ""))
        return operation == "constant" or (operation == "splat" and is_constant(operands[0]))

    while addresses:
        name = addresses.pop()
        if name in seen or name not in steps:
            continue
        seen.add(name)
        operation, operands, line = steps[name]
        if operation not in _PASSED_ON:
            continue
        addresses += operands
        is_narrow = re.search(r": (?:tensor<[\dx]*xi32>|i32)$", line.split(" loc(")[0]) is not None
        varying = [operand for operand in operands if not is_constant(operand)]
        if operation == "muli" and is_narrow and (len(varying) > 1 or any("stride" in x for x in varying)):
            found.append(line)
    return found


RULES = {"RELATIONS": 2, "LIMITED": True, "HARDENED": True, "LISTED": True}
TILED = {**RULES, **similarity_tile("sm_90", "16 bit", NARROW).options(), "PRECISION": "ieee", "DESCRIBED": False}
ROW = {"BLOCK_ROWS": 4, "BLOCK_DIM": 1024}
POOL = {"SUM_TYPE": tl.float32, "BLOCK_DIM": 512}
MIXED = {
    "MOST": 2.0**126,
    "SHRINK": 2.0**-80,
    "SUM_TYPE": tl.float32,
    "BLOCK_K": 16,
    "BLOCK_PAIRS": 16,
    "BLOCK_DIM": 64,
}
HARDEST = {**hard_negatives_tile("sm_90", "16 bit", 10).options(), "PRECISION": "ieee", "DESCRIBED": False, "KEPT": 16}
HARDEST["RELATIONS"] = 1
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "exp": (info_nce.exp_kernel, {**TILED, "SPECIAL": 2, "GROUPS": 1, "WANTS_DOT": True}),
    "statistics": (info_nce.statistics_kernel, {**TILED, "SPECIAL": 1, "GROUPS": 2, "HAS_COLUMNS": True}),
    "gradients": (
        info_nce.similarity_gradient_kernel,
        {**TILED, "SPECIAL": 1, "GROUPS": 2, "HAS_COLUMNS": True, "WANTS_DOT": True},
    ),
    "normalise": (rows.normalise_kernel, {**ROW, "WRITES_UNIT": True, "WRITES_OPERAND": True}),
    "prepare": (rows.prepare_kernel, {**ROW, "WRITES_UNIT": True, "WRITES_OPERAND": True, "WRITES_SCALE": True}),
    "scale rows": (rows.scale_rows_kernel, ROW),
    "rows of exponentials": (
        info_nce.exp_rows_kernel,
        {**ROW, "HAS_MARGIN": True, "WANTS_DOT": True, "BLOCK_TILES": 64},
    ),
    "log-sums": (info_nce.log_sum_kernel, {"ADDS": True, "BLOCK_ROWS": 32, "BLOCK_TILES": 32}),
    "positive": (rows.positive_kernel, ROW),
    **{f"gradient {kind}": (rows.gradient_kernel, {**ROW, "PARTNER": kind}) for kind in range(4)},
    "pool": (segment_pool.pool_kernel, {**POOL, "HAS_WEIGHTS": True}),
    "pool, to segments": (segment_pool.segments_gradient_kernel, {**POOL, "HAS_WEIGHTS": True}),
    "pool, to weights": (segment_pool.weights_gradient_kernel, POOL),
    "own negatives": (own_negatives.log_sum_exp_kernel, {**RULES, **ROW}),
    "own negatives, gradient": (own_negatives.gradient_kernel, {**RULES, **ROW, "WANTS_ROWS": True}),
    "hardest": (hard_negatives.hard_negatives_kernel, {**HARDEST, "SPECIAL": 1, "GROUPS": 1}),
    "mixed": (mixed_negatives.cosine_kernel, MIXED),
    "mixed, backward": (mixed_negatives.gradient_kernel, MIXED),
    "paradigm": (paradigm.statistics_kernel, {**TILED, "HAS_COLUMNS": True, "HAS_LSE": True}),
    "paradigm, weights": (paradigm.weights_kernel, {**TILED, "WEIGHT": 1}),
}


def ttir_of(kernel: Any, constants: dict[str, Any]) -> str:
    taken = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = _types(kernel.arg_names, "bf16") | {"pairs_ptr": "*i64", "index_ptr": "*i64", "best_ptr": "*i64"}
    types |= dict.fromkeys({"hardest_out"} & set(kernel.arg_names), "*fp32")
    return compile_for("sm_90", kernel, types, taken, num_warps=4).asm["ttir"]


@pytest.mark.parametrize("name", KERNELS)
def test_offsets_have_64_bits(name: str) -> None:
    ttir = ttir_of(*KERNELS[name])
    assert "tt.addptr" in ttir
    assert products_in_32_bits(ttir) == []


@triton.jit
def _narrow_kernel(x_ptr, num_rows, dim, BLOCK_DIM: tl.constexpr):  # noqa: ANN001, ANN202, N803
    row = tl.minimum(tl.program_id(0), num_rows)
    tl.store(x_ptr + row * dim + tl.arange(0, BLOCK_DIM), 0.0)


def test_a_narrow_offset_is_found() -> None:
    (line,) = products_in_32_bits(ttir_of(_narrow_kernel, {"BLOCK_DIM": 32}))
    assert "%dim" in line
