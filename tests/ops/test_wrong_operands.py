"""Registered operators can be called with anything: whatever doesn't fit is an error, not a read of other memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import hicl_fast
from hicl_fast.ops.common.constants import Special
from hicl_fast.ops.info_nce import cpp
from hicl_fast.ops.info_nce.problem import KindOfColumn, Problem
from hicl_fast.ops.paradigm.settings import Settings

pytestmark = pytest.mark.skipif(
    not any(s.name == "cpp" and s.available for s in hicl_fast.backends()), reason="needs the C++ extension"
)

N, M, D, K, S = 6, 7, 4, 3, 9


def rows(n: int, *more: int) -> Tensor:
    return torch.randn(n, *more, generator=torch.Generator().manual_seed(n))


def to_last(n: int, end: int) -> Tensor:
    """Indices up to the last: with one place fewer it is out of range."""
    return torch.arange(end - n, end)


class Call(NamedTuple):
    """A right call, and what may be changed of it: beginnings of what ``changed`` calls a change."""

    operator: str
    arguments: dict[str, Any]
    allowed: tuple[str, ...] = ()


INFO_NCE: dict[str, Any] = {
    "query": rows(N, D),
    "key": rows(M, D),
    "target": to_last(N, M),
    "negatives": rows(N, D),
    "bank": rows(3, D),
    "extra_logits": rows(N, 2),
    "query_group": torch.arange(N)[:, None],
    "key_group": torch.arange(M)[:, None],
}
IDS = {"query_group": torch.arange(N), "key_group": torch.arange(M)}
PLAIN = {**dict.fromkeys(INFO_NCE), "query": rows(N, D), "key": rows(N, D)}


def columns(*kinds: KindOfColumn) -> dict[str, list[Any]]:
    """As the C++ operator takes them."""
    return {
        "column_tensors": [x for kind in kinds for x in cpp.tensors_of(kind)],
        "column_numbers": [float(x) for kind in kinds for x in cpp.numbers_of(kind)],
    }


LISTS = {"left_out": torch.arange(M), "left_out_offsets": torch.cat([torch.zeros(N).long(), torch.tensor([M])])}


LISTED_ALONE = {"special_column": None, "groups": 0, "query_group": None, "group": None}
LISTED_ALONE |= {"left_out": torch.arange(N), "left_out_offsets": torch.arange(N + 1)}


def keys(**rules: Any) -> KindOfColumn:
    in_groups = {"groups": 1, "query_group": torch.arange(N)[:, None], "group": torch.arange(M)[:, None]}
    return KindOfColumn(
        **{"name": "key", "vectors": rows(M, D), "wants_gradient": True, "special": 1}
        | {"special_column": to_last(N, M)}
        | in_groups
        | LISTS
        | rules
    )


def own(**rules: Any) -> KindOfColumn:
    return KindOfColumn(
        **{"name": "negatives", "vectors": rows(N, D), "wants_gradient": True, "special": 2, "bias": 0.5} | rules
    )


def plain_keys(n: int = N, d: int = D) -> KindOfColumn:
    return KindOfColumn("key", rows(n, d), wants_gradient=True, special=Special.POSITIVE)


KEYS, OWN, BANK = keys(), own(), KindOfColumn("bank", rows(3, D), wants_gradient=False)


def two_ids(n: int) -> Tensor:
    return torch.arange(2 * n).reshape(n, 2)


OF_QUERIES = {"groups": 1, "query_group": two_ids(N)}
RELATIONS = {"groups": 1, "query_group": two_ids(N), "group": two_ids(M)}
LIMITS = {"limit": rows(N), "false_negative_margin": 0.1, "false_negative_ratio": 0.9}
NO_LIMITS = {"limit": None, "false_negative_margin": math.inf, "false_negative_ratio": math.inf}
OPTIONS = {
    "negative_grad": None,
    "positive_grad": None,
    "row_weight": 1.0,
    "scale": 20.0,
    "margin": 0.0,
    "symmetric": False,
}
MIXES_NOTHING = {"mixed_pairs": None, "k": 0, "alpha": 0.5}
WANTS_ALL = {"wants_query": True, "wants_extra_logits": True, "wants_scale": True}
REST = OPTIONS | NO_LIMITS | MIXES_NOTHING | WANTS_ALL


PAIRS = torch.tensor([[[0, 1], [1, K - 1]]]).repeat(N, 1, 1)
MIXED = {
    "query": rows(N, D),
    "bank": rows(M, D),
    "index": to_last(N * K, N * K).reshape(N, K) % M,
    "pairs": PAIRS,
    "alpha": 0.5,
}
OFFSETS = torch.tensor([0, 2, 3, S])
COLUMNS = ("bank: dimension 0", "extra_logits: dimension 1")
CANDIDATES = ("bank: dimension 0 larger", "index: dimension 1 larger")

OWN_OFFSETS = torch.tensor([0, 0, 2, 3, 3, 8, S])
OWN_ROWS = {"query": rows(N, D), "rows": rows(S, D), "offsets": OWN_OFFSETS, "limit": rows(N)}
OWN_ROWS |= {"query_group": two_ids(N), "group": two_ids(S)}
OWN_NUMBERS = {"scale": 20.0, "hardness": 1.0}
OWN_GRADIENT = {"lse": rows(N), "lse_grad": rows(N)}

CPP = [
    Call(
        "info_nce",
        {"query": rows(N, D), **columns(KEYS, OWN, BANK), "extra_logits": rows(N, 2), "loss_grad": rows(N)} | REST,
        ("column_tensors[6]: dimension 0 larger", "column_tensors[12]: dimension 0", *COLUMNS),
    ),
    Call(
        "info_nce",
        {"query": rows(N, D), **columns(plain_keys()), "extra_logits": None, "loss_grad": None}
        | REST
        | {"symmetric": True},
    ),
    Call(
        "info_nce",
        {"query": rows(N, D), **columns(plain_keys()), "extra_logits": None, "loss_grad": None}
        | REST
        | {"mixed_pairs": PAIRS, "k": K},
        ("column_tensors[0]: dimension 0 larger", "mixed_pairs: dimension 1"),
    ),
    Call(
        "hard_negatives",
        {n: INFO_NCE[n] for n in ("query", "key", "target")} | IDS | {"k": K, "exclude_target": True},
    ),
    Call("mixed_negatives", MIXED, (*CANDIDATES, "pairs: dimension 1")),
    Call(
        "mixed_negatives_backward",
        MIXED
        | {name: rows(N, 2) for name in ("cosine", "inverse_norm", "upstream")}
        | {"want_query": True, "want_bank": True},
        CANDIDATES,
    ),
    Call(
        "segment_pool",
        {"segments": rows(S, D), "offsets": OFFSETS, "weights": rows(S).abs()},
        ("segments: dimension 1",),
    ),
    Call(
        "segment_pool_backward",
        {"segments": rows(S, D), "offsets": OFFSETS, "weights": rows(S).abs(), "pooled_grad": rows(3, D)}
        | {"want_segments": True, "want_weights": True},
    ),
    Call("paradigm_views", {"u": rows(N, D), "v": rows(N, D)}),
    Call("paradigm_statistics", {"x": rows(N, D), "y": rows(N, D), "temperature": 0.1, "columns": True}),
    Call(
        "paradigm_combine",
        {"x": rows(N, D), "y": rows(N, D), "t": rows(N, D), "weight": "softmax", "parameter": 0.1},
        ("t: dimension 1",),
    ),
    Call(
        "info_nce",
        {"query": rows(N, D), **columns(keys(special_column=None, **RELATIONS), own(group=two_ids(N), **OF_QUERIES))}
        | {"extra_logits": None, "loss_grad": None}
        | REST
        | LIMITS
        | {"negative_grad": rows(N), "positive_grad": rows(N)},
        ("column_tensors[0]: dimension 0 larger", "column_tensors[6]: dimension 0 larger"),
    ),
    Call("own_log_sum_exp", OWN_ROWS | OWN_NUMBERS),
    Call(
        "own_log_sum_exp_backward",
        OWN_ROWS | OWN_NUMBERS | OWN_GRADIENT | {"wants_query": True, "wants_rows": True, "wants_scale": True},
    ),
]


def of_another_shape(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "a dimension more", x[None]
    if x.numel() and x.dim():
        yield "a dimension less", x.select(0, 0)
    for dim, size in enumerate(x.shape):
        if size > 1:
            yield f"dimension {dim} smaller", x.narrow(dim, 0, size - 1).contiguous()
            yield f"dimension {dim} larger", torch.cat([x, x.narrow(dim, size - 1, 1)], dim)
            yield f"dimension {dim} empty", x.narrow(dim, 0, 0).contiguous()


def of_another_type(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    other = torch.int32 if x.dtype == torch.int64 else torch.float64
    yield str(other), x.to(other)
    yield "bool", x.to(torch.bool)


def not_contiguous(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "not contiguous", torch.stack([x, x], dim=-1)[..., 0]


def changed(call: Call, of_type: bool, takes_strides: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    def wrong(x: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield from of_another_shape(x)
        if of_type and takes_strides:
            yield from [*of_another_type(x)][1:] if x.is_floating_point() else [*of_another_type(x)]
        elif of_type:
            yield from (*of_another_type(x), *not_contiguous(x))

    for name, x in call.arguments.items():
        changes: list[tuple[str, Any]] = []
        if isinstance(x, Tensor):
            changes = [(f"{name}: {what}", value) for what, value in wrong(x)]
        elif isinstance(x, list) and any(isinstance(one, Tensor) for one in x):
            for place, one in enumerate(x):
                if isinstance(one, Tensor):
                    changes += [
                        (f"{name}[{place}]: {what}", [*x[:place], v, *x[place + 1 :]]) for what, v in wrong(one)
                    ]
        for what, value in changes:
            if not what.startswith(call.allowed):
                yield what, {**call.arguments, name: value}


@pytest.mark.parametrize("call", CPP, ids=lambda call: call.operator)
def test_operators_of_the_extension(call: Call) -> None:
    operator = getattr(torch.ops.hicl_fast_cpp, call.operator)
    operator(**call.arguments)
    takes_strides = call.operator == "hard_negatives"  # and any floating-point type
    for what, arguments in changed(call, of_type=True, takes_strides=takes_strides):
        with pytest.raises(RuntimeError, match=rf"{call.operator}: [\w\[\]]+: expected") as caught:
            operator(**arguments)
            pytest.fail(f"{call.operator} takes {what}")
        assert "tensor(" not in str(caught.value)


GRADIENT: dict[str, list[Any]] = {
    "rows": [rows(N, D), rows(M, D)],
    "factors": [rows(N), rows(N)],
    "sources": [None, to_last(N, M)],
    "targets": [None, torch.arange(N)],
}


@pytest.mark.parametrize("name", GRADIENT)
def test_gradients_of_terms(name: str) -> None:
    """The one operator of lists."""
    operator = torch.ops.hicl_fast_cpp.paradigm_gradient
    operator(rows(N, D), rows(N), **GRADIENT)
    wrong = [[*GRADIENT[name], *GRADIENT[name]], GRADIENT[name][:1]]
    for place, x in enumerate(GRADIENT[name]):
        if x is not None:
            for what, value in (*of_another_shape(x), *of_another_type(x), *not_contiguous(x)):
                if (name, place, what) != ("rows", 1, "dimension 0 larger"):
                    wrong.append([value if i == place else other for i, other in enumerate(GRADIENT[name])])
    for value in wrong:
        with pytest.raises(RuntimeError, match=r"paradigm_gradient: \w+: expected"):
            operator(rows(N, D), rows(N), **{**GRADIENT, name: value})


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        *(
            ("info_nce", CPP[0].arguments | columns(*kinds))
            for kinds in (
                (keys(special_column=torch.full((N,), M)), OWN, BANK),
                (keys(special_column=torch.full((N,), -1)), OWN, BANK),
                (KEYS, own(special_column=torch.full((N,), N)), BANK),
                (keys(query_group=None), OWN, BANK),
                (keys(query_group=None, group=None), OWN, BANK),
                (KEYS, own(groups=2), BANK),
                (keys(groups=3), OWN, BANK),
                (keys(groups=-1), OWN, BANK),
                (keys(special=2), OWN, BANK),
                (KEYS, own(special=1), BANK),
                (KEYS, own(special=3), BANK),
                (KEYS, own(special=-1), BANK),
                (KEYS, own(special=torch.nan), BANK),
                (KEYS, OWN, OWN),
                (keys(vectors=None), OWN, BANK),
                (keys(special=1.5), OWN, BANK),
                (keys(**RELATIONS | {"groups": 2}), OWN, BANK),
                (keys(query_group=two_ids(N)), OWN, BANK),
                (keys(left_out_offsets=None), OWN, BANK),
                (keys(left_out=None), OWN, BANK),
                (keys(left_out=LISTS["left_out"] + 1), OWN, BANK),
                (keys(left_out=LISTS["left_out"] - 1), OWN, BANK),
                (keys(left_out_offsets=LISTS["left_out_offsets"] + 1), OWN, BANK),
                (keys(left_out_offsets=LISTS["left_out_offsets"].flip(0)), OWN, BANK),
                (keys(groups=2), OWN, BANK),
                (KEYS, own(left_out=torch.arange(N), left_out_offsets=torch.arange(N + 1)), BANK),
                (),
            )
        ),
        *(
            ("info_nce", CPP[0].arguments | {name: changed})
            for name, x in columns(KEYS, OWN, BANK).items()
            for changed in (x[:-1], [*x, x[-1]], x[:4])
        ),
        ("info_nce", CPP[0].arguments | {"symmetric": True}),
        ("info_nce", CPP[0].arguments | {"negative_grad": rows(N)}),
        *(("info_nce", CPP[1].arguments | {name: value}) for name, value in LIMITS.items()),
        (
            "info_nce",
            CPP[1].arguments
            | columns(keys(vectors=rows(N, D), special_column=None, group=torch.arange(N)[:, None], groups=2)),
        ),
        ("info_nce", CPP[1].arguments | columns(keys(vectors=rows(N, D), **LISTED_ALONE))),
        ("info_nce", CPP[2].arguments | columns(keys(vectors=rows(N, D), **LISTED_ALONE))),
        ("info_nce", CPP[1].arguments | columns(plain_keys(N + 1, D))),
        ("info_nce", CPP[1].arguments | {"symmetric": False} | columns(plain_keys(N - 1, D))),
        ("info_nce", CPP[1].arguments | {"query": rows(0, D)} | columns(plain_keys(0, D))),
        ("info_nce", CPP[1].arguments | {"query": rows(N, 0)} | columns(plain_keys(N, 0))),
        ("info_nce", CPP[2].arguments | {"k": 0}),
        ("info_nce", CPP[2].arguments | {"k": N + 1}),
        ("info_nce", CPP[2].arguments | {"k": K - 1}),
        ("info_nce", CPP[2].arguments | {"mixed_pairs": PAIRS - 1}),
        *(
            ("own_log_sum_exp", OWN_ROWS | OWN_NUMBERS | {"offsets": torch.tensor(offsets)})
            for offsets in (
                [0, 2, 1, 3, 3, 8, S],
                [-1, 0, 2, 3, 3, 8, S],
                [0, 0, 2, 3, 3, 8, S + 1],
                [1, 1, 2, 3, 3, 8, S],
            )
        ),
        ("own_log_sum_exp", OWN_ROWS | OWN_NUMBERS | {"query_group": None}),
        ("own_log_sum_exp", OWN_ROWS | OWN_NUMBERS | {"query": rows(N, 0), "rows": rows(S, 0)}),
        ("hard_negatives", CPP[3].arguments | {"k": 0}),
        ("hard_negatives", CPP[3].arguments | {"k": M + 1}),
        ("hard_negatives", CPP[3].arguments | {"query": rows(N, 0), "key": rows(M, 0)}),
        ("mixed_negatives", MIXED | {"index": MIXED["index"] - 1}),
        ("mixed_negatives", MIXED | {"index": MIXED["index"] + 1}),
        ("mixed_negatives", MIXED | {"pairs": PAIRS + 1}),
        ("segment_pool", CPP[6].arguments | {"offsets": torch.tensor([0, 3, 2, S])}),
        ("segment_pool", CPP[6].arguments | {"offsets": torch.tensor([0, 3, 3, S])}),
        ("segment_pool", CPP[6].arguments | {"offsets": torch.tensor([-1, 3, S])}),
        ("segment_pool", CPP[6].arguments | {"offsets": torch.tensor([0, 3, S + 1])}),
        ("segment_pool", CPP[6].arguments | {"offsets": torch.tensor([0])}),
        ("paradigm_statistics", CPP[9].arguments | {"x": rows(0, D), "y": rows(0, D)}),
        ("paradigm_statistics", CPP[9].arguments | {"x": rows(N, 0), "y": rows(N, 0)}),
        ("random_pairs", {"num_rows": 2, "num_mixed": 3, "k": 1, "seed": 0, "first_row": 0}),
        ("random_pairs", {"num_rows": 2, "num_mixed": 3, "k": 1 << 17, "seed": 0, "first_row": 0}),
        ("random_pairs", {"num_rows": -2, "num_mixed": 3, "k": 2, "seed": 0, "first_row": 0}),
    ],
)
def test_numbers_out_of_range(operator: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=rf"{operator}: .*expected"):
        getattr(torch.ops.hicl_fast_cpp, operator)(**arguments)


def _problem(of: dict[str, Any], **options: Any) -> dict[str, Any]:
    defaults = {one.name: one.default for one in fields(Problem) if one.default is not MISSING}
    return defaults | {"scale": torch.tensor(20.0)} | of | options


STATISTICS = {"negative_lse": rows(N), "column_lse": rows(0), "loss_grad": rows(N)}
WANTED = {"wanted": [True] * 5}
CPP_BACKEND = {"backend": "cpp"}
# A scale of one element is a number; a statistic of the forward pass isn't looked at, since the sweep takes it again.
REFUSALS = (RuntimeError, ValueError, IndexError)
UNREAD = ("scale", "negative_lse", "column_lse")
REGISTERED = [
    Call(
        "info_nce_mean",
        _problem(INFO_NCE) | {"reduction": "mean"} | WANTED | CPP_BACKEND,
        (*COLUMNS, "negatives: dimension 0", *UNREAD),
    ),
    Call("info_nce_rows", _problem(PLAIN, symmetric=True) | CPP_BACKEND, UNREAD),
    Call(
        "info_nce_rows_backward",
        _problem(PLAIN) | STATISTICS | {"wanted": [True, True, False, False, True]} | CPP_BACKEND,
        ("key: dimension 0 larger", *UNREAD),
    ),
    Call(
        "log_sum_exp",
        _problem(INFO_NCE | {"limit": rows(N)}) | CPP_BACKEND,
        (*COLUMNS, "negatives: dimension 0", *UNREAD),
    ),
    Call(
        "log_sum_exp_backward",
        _problem(INFO_NCE)
        | {n: rows(N) for n in ("negative", "negative_grad", "positive_grad")}
        | WANTED
        | CPP_BACKEND,
        (*COLUMNS, "negatives: dimension 0", *UNREAD),
    ),
    Call("own_log_sum_exp", OWN_ROWS | {"scale": torch.tensor(20.0), "hardness": 1.0} | CPP_BACKEND, ("scale",)),
    Call(
        "own_log_sum_exp_backward",
        OWN_ROWS | {"scale": torch.tensor(20.0), "hardness": 1.0} | OWN_GRADIENT | {"wanted": [True] * 3} | CPP_BACKEND,
        ("scale",),
    ),
    Call("hard_negatives", CPP[3].arguments | CPP_BACKEND),
    Call("mixed_negatives", MIXED | CPP_BACKEND, (*CANDIDATES, "pairs: dimension 1")),
    Call(
        "mixed_negatives_backward",
        MIXED
        | {n: rows(N, 2) for n in ("cosine", "inverse_norm", "cosine_grad")}
        | {"wanted": [True] * 2}
        | CPP_BACKEND,
        CANDIDATES,
    ),
    Call("segment_pool", CPP[6].arguments | CPP_BACKEND, ("segments: dimension 1",)),
    Call(
        "segment_pool_backward",
        {n: CPP[7].arguments[n] for n in ("segments", "offsets", "weights", "pooled_grad")}
        | {"wanted": [True] * 2}
        | CPP_BACKEND,
    ),
]


each_backend = pytest.mark.parametrize("backend", ["cpp", "torch"])


@each_backend
@pytest.mark.parametrize("call", REGISTERED, ids=lambda call: call.operator)
def test_registered_operators(call: Call, backend: str) -> None:
    """Types and strides are theirs to bring in order; shapes are not."""
    operator = getattr(torch.ops.hicl_fast, call.operator)
    operator(**call.arguments | {"backend": backend})
    for what, arguments in changed(call, of_type=False):
        with pytest.raises(REFUSALS):
            operator(**arguments | {"backend": backend})
            pytest.fail(f"{call.operator} takes {what}")


@each_backend
def test_the_paradigm_operator(backend: str) -> None:
    views = {"u": rows(N, D), "v": rows(N, D)}
    settings = Settings(objective="mpt").flat()
    operator = torch.ops.hicl_fast.paradigm
    operator(*views.values(), *settings, True, backend)
    for _, arguments in changed(Call("paradigm", views), of_type=False):
        with pytest.raises(REFUSALS):
            operator(*arguments.values(), *settings, True, backend)


def test_none_is_forgotten() -> None:
    def names(namespace: str) -> set[str]:
        every = torch._C._dispatch_get_all_op_names()
        return {name.split("::")[1].split(".")[0] for name in every if name.startswith(f"{namespace}::")}

    others = {"paradigm_gradient", "random_pairs", "capability", "capabilities", "constants"}
    assert names("hicl_fast_cpp") == {call.operator for call in CPP} | others
    assert names("hicl_fast") == {call.operator for call in REGISTERED} | {"paradigm"}
