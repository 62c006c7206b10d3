"""The operators of csrc/cuda refuse tensors of a wrong shape, type or stride by name, as those of csrc/cpu do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ops.test_wrong_operands import (
    CANDIDATES,
    IDS,
    INFO_NCE,
    MIXED,
    OFFSETS,
    PLAIN,
    Call,
    D,
    K,
    M,
    N,
    S,
    changed,
    rows,
    to_last,
)

pytestmark = pytest.mark.usefixtures("emulated")

NUMBERS = {"scale": 20.0, "row_weight": 1.0, "own_bias": 0.0, "margin": 0.0, "wanted": 0b11111}
SMALL: dict[str, Any] = {name: x for name, x in INFO_NCE.items() if name != "bank"} | IDS
WEIGHTS = {"negative_grad": rows(N), "positive_grad": rows(N)}
NO_WEIGHTS = dict.fromkeys(WEIGHTS)
SEQUENCES = {"segments": rows(S, D), "offsets": OFFSETS, "weights": rows(S).abs()}
PARTNERS = {"coefficient": rows(N), "partner": to_last(N, M), "begin": None}
LISTED = {"coefficient": rows(M), "partner": torch.arange(M), "begin": torch.tensor([0, 1, 2, 3, 4, 5, M])}
GRADIENT = {"product": rows(N, D), "factor": rows(N), "x": rows(N, D), "inverse": rows(N), "floor": 1e-12}
OTHERS = {"other": rows(M, D), "other_inverse": rows(M)}

CALLS = [
    Call(
        "small_info_nce",
        SMALL | {"loss_grad": rows(N), "scale_on_device": torch.tensor(20.0)} | WEIGHTS | NUMBERS,
        ("extra_logits: dimension 1", "negatives: dimension 0", "scale_on_device: not contiguous"),
    ),
    Call(
        "small_info_nce",
        {name: PLAIN[name] for name in SMALL} | {"loss_grad": None, "scale_on_device": None} | NO_WEIGHTS | NUMBERS,
        ("key: dimension 0 larger", "query: dimension 0 smaller", "query: dimension 0 empty"),
    ),
    Call(
        "hard_negatives",
        {n: SMALL[n] for n in ("query", "key", "target", "query_group", "key_group")}
        | {"k": K, "exclude_target": True},
    ),
    Call("mixed_negatives", MIXED, ("bank: dimension 0", *CANDIDATES, "index: dimension 1", "pairs: dimension 1")),
    Call(
        "mixed_negatives_backward",
        MIXED
        | {name: rows(N, 2) for name in ("cosine", "inverse_norm", "cosine_grad")}
        | {"want_query": True, "want_bank": True, "addition_bytes": 1 << 20},
        ("bank: dimension 0", "index: dimension 1"),  # an index of no row or column is NaN
    ),
    Call("segment_pool", SEQUENCES, ("segments: dimension 1", "offsets: dimension 0")),
    Call("segment_pool_backward", SEQUENCES | {"pooled_grad": rows(3, D), "want_segments": True, "want_weights": True}),
    Call("normalise_rows", {"x": rows(N, D), "floor": 1e-12, "unit": rows(N, D)}),
    Call("scale_rows", {"x": rows(N, D), "factor": rows(N)}, ("x: dimension 1",)),
    Call(
        "positive_similarity",
        {
            "query": rows(N, D),
            "query_inverse": rows(N),
            "key": rows(M, D),
            "key_inverse": rows(M),
            "target": to_last(N, M),
        },
    ),
    Call("norm_gradient", GRADIENT | OTHERS | PARTNERS | {"gradient": rows(N, D)}, ("factor: not contiguous",)),
    Call("norm_gradient", GRADIENT | OTHERS | LISTED | {"gradient": rows(N, D)}, ("factor: not contiguous",)),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.operator)
def test_wrong_operands(call: Call) -> None:
    operator = getattr(torch.ops.hicl_fast_cuda, call.operator)
    operator(**call.arguments)
    for what, arguments in changed(call, of_type=True):
        with pytest.raises(RuntimeError, match=r"\w+: \w+: expected"):
            operator(**arguments)
            pytest.fail(f"{call.operator} takes {what}")
