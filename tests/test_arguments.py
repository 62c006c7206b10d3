"""Every option of every constructor and function, with every kind of value that is wrong for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import hicl_fast.functional as HF
from hicl_fast import (
    FusedHiCLLoss,
    FusedInfoNCELoss,
    GradientParadigmLoss,
    HardNegativeMixing,
    NegativeQueue,
    PositiveMixing,
    SegmentPooling,
    _checks,
)
from hicl_fast.distributed import check_gather, joined_rows, ranks_of

NAN, INF = float("nan"), float("inf")
TENSOR = torch.full((40, 30), 7.7777)
ARRAY = np.full((40, 30), 7.7777)
TEXT = "word " * 1000

# Of no use to any option.
FOREIGN = [TENSOR, ARRAY, TEXT, [TENSOR] * 50, {"a": [TEXT] * 9, TEXT: ARRAY}, object(), 10**5000, b"x" * 999]
NUMBER = [*FOREIGN, None, True, "0.05", NAN, INF, -INF, 1j, torch.tensor(0.5)]
FLAG = [*FOREIGN, None, 0, 1, "true", NAN]
CHOICE = [*FOREIGN, "avg", True, 1, NAN]
WHOLE = [*FOREIGN, None, True, 2.5, "3", NAN, INF, -1]
MODULE = [*FOREIGN, True, 1, NAN, torch.nn.Linear(2, 2), HardNegativeMixing]
BACKEND = [*CHOICE, None, "cudaa", "CPP"]
PRECISION = [*CHOICE, "fp8", "float16"]
SAME_GROUP = [*CHOICE, None, "positives"]
GATHER = [*CHOICE[:-3], "all", None, 2]
GROUP = [*FOREIGN, True, "world", 3]

TEMPERATURE = [*NUMBER[:-1], 0, 0.0, -0.05]
MARGIN = [*NUMBER, -1, -1e-9, 4.0]
WEIGHTS = [*NUMBER, None, 1, (1.0,), (1.0, NAN), (1.0, "0.1"), (1.0, TENSOR), (True, 1.0), "grid", [INF, 1.0]]

INFO_NCE = {
    "margin": MARGIN,
    "symmetric": FLAG,
    "hard_negative_weight": NUMBER,
    "same_group": SAME_GROUP,
    "reduction": [*CHOICE, None],
    "precision": PRECISION,
    "backend": BACKEND,
}
MIXING = {"hard_negative_mixing": [*MODULE, PositiveMixing()], "positive_mixing": [*MODULE, HardNegativeMixing()]}
JOINED = {"gather": GATHER, "process_group": GROUP}
PARADIGM = {
    "objective": [*CHOICE, None, "simclr"],
    "modified": [*FOREIGN, None, 3, "gd", ("q",), (TENSOR,), ("gd", None)],
    "temperature": TEMPERATURE,
    "strength": [*NUMBER, 0, -1],
    "margin": [*NUMBER[:8], *NUMBER[9:]],  # None is the default
    "ratio": NUMBER,
    "dissipation": [*FOREIGN[:3], True, 0.3, NAN],
    "weight": [*FOREIGN[:3], None, ("power", 2), 3],
    "backend": BACKEND,
}

u, v = torch.randn(4, 3), torch.randn(4, 3)
index, pairs = torch.tensor([[1, 2]] * 4), torch.zeros(4, 5, 2, dtype=torch.int64)
offsets = torch.tensor([0, 2, 4])
MATRIX = [None, 3, [[1.0]], ARRAY, TEXT, torch.randn(4), torch.randn(2, 3, 3), torch.zeros(4, 3, dtype=torch.int64)]
INDICES = [3, [0, 1], ARRAY, TEXT, torch.randn(4), torch.zeros(3, dtype=torch.int64), torch.zeros(4)]

Make = Callable[..., object]
TABLE: dict[str, tuple[Make, dict[str, list[Any]]]] = {
    "FusedInfoNCELoss": (
        FusedInfoNCELoss,
        {
            "temperature": TEMPERATURE,
            "learnable_temperature": FLAG,
            "queue_size": WHOLE,
            **INFO_NCE,
            **MIXING,
            **JOINED,
        },
    ),
    "FusedHiCLLoss": (
        FusedHiCLLoss,
        {
            "temperature": TEMPERATURE,
            "local_weight": [*NUMBER, 2, 1.0001, -0.1],
            "global_weight": [*NUMBER[:8], *NUMBER[9:], -0.1],
            "same_sequence": SAME_GROUP,
            "pooling": [*CHOICE, None],
            "queue_size": WHOLE,
            "precision": PRECISION,
            "backend": BACKEND,
            **MIXING,
            **JOINED,
        },
    ),
    "HardNegativeMixing": (
        HardNegativeMixing,
        {
            "k": [*WHOLE, 0, 1, 129, "all"],
            "num_mixed": [*WHOLE, 0],
            "alpha": [*NUMBER, 1.01, -0.01],
            "bank": [*CHOICE, None, "last"],
            "queue_size": [*WHOLE, 0, 1],
            "seed": [*FOREIGN[:6], True, 1.5, "7", NAN],
            "backend": BACKEND,
        },
    ),
    "PositiveMixing": (PositiveMixing, {"threshold": [*NUMBER, -0.1], "weights": WEIGHTS, "backend": BACKEND}),
    "SegmentPooling": (SegmentPooling, {"pooling": [*CHOICE, None, "sum"], "backend": BACKEND}),
    "NegativeQueue": (NegativeQueue, {"size": [*WHOLE, 0]}),
    "GradientParadigmLoss": (
        lambda **options: GradientParadigmLoss(**{"objective": "vicreg", "modified": ("gd", "r"), **options}),
        {**PARADIGM, "log_gradient_terms": FLAG, "gather": [*GATHER, "ring"], "process_group": GROUP},
    ),
    "info_nce": (
        lambda **options: HF.info_nce(**{"query": u, "key": v, **options}),
        {
            **INFO_NCE,
            "query": MATRIX,
            "key": [*MATRIX, torch.randn(3, 3), torch.randn(4, 2)],
            "negatives": [*MATRIX[1:], torch.randn(4, 2)],
            "bank": [*MATRIX[1:], torch.randn(4, 2)],
            "extra_logits": [*MATRIX[1:], torch.randn(3, 2)],
            "target": [*INDICES, torch.tensor([0, 1, 2, 4]), torch.tensor([0, 1, 2, -1])],
            "temperature": [*TEMPERATURE, torch.tensor([0.5]), torch.tensor(1)],
            "mixing": [*FOREIGN, True, 3, (2, pairs), HardNegativeMixing()],
        },
    ),
    "hard_negatives": (
        lambda **options: HF.hard_negatives(**{"query": u, "key": v, "k": 2, **options}),
        {
            "query": MATRIX,
            "key": [*MATRIX, torch.randn(4, 2)],
            "k": [*WHOLE, 0, 4, 129],
            "target": [*INDICES, torch.tensor([0, 1, 2, 4])],
            "exclude_target": FLAG,
            "backend": BACKEND,
        },
    ),
    "mixed_negative_logits": (
        lambda **options: HF.mixed_negative_logits(
            **{"query": u, "bank": v, "index": index, "pairs": pairs, **options}
        ),
        {
            "query": MATRIX,
            "bank": [*MATRIX, torch.randn(4, 2)],
            "index": [*INDICES, index + 3, index[:3]],
            "pairs": [*INDICES, pairs + 2, pairs[:3]],
            "alpha": [*NUMBER, 1.01, -0.01],
            "temperature": [*TEMPERATURE, torch.tensor([0.5])],
            "backend": BACKEND,
        },
    ),
    "positive_mixing": (
        lambda **options: HF.positive_mixing(**{"query": u, "positive": v, "negative": v, **options}),
        {
            "query": MATRIX,
            "positive": [*MATRIX, torch.randn(3, 3)],
            "negative": [*MATRIX, torch.randn(3, 3)],
            "threshold": [*NUMBER, -0.1],
            "weights": WEIGHTS,
        },
    ),
    "paradigm": (
        lambda **options: HF.paradigm(**{"u": u, "v": v, "objective": "vicreg", "modified": ("gd", "r"), **options}),
        {**PARADIGM, "u": MATRIX, "v": [*MATRIX, torch.randn(3, 3)]},
    ),
    "paradigm's hinges": (
        lambda **options: HF.paradigm(u, v, "met", **options),
        {"margin": [*NUMBER[:8], *NUMBER[9:], -0.1], "strength": [2.0], "ratio": [2.0], "modified": [("gd",)]},
    ),
    "paradigm's own": (
        lambda **options: HF.paradigm(u, v, "custom", **options),
        {
            "margin": [0.5],
            "dissipation": [*NUMBER[:8], *NUMBER[9:12], "margin"],
            "weight": [*NUMBER, ("power", "2"), ("power", NAN), ("root", 2), (TENSOR, 2), "softmin"],
            "ratio": [*NUMBER[:8], NAN, "mpt"],
        },
    ),
    "segment_pool": (
        lambda **options: HF.segment_pool(**{"segments": u, "offsets": offsets, **options}),
        {
            "segments": MATRIX,
            "offsets": [None, *INDICES, torch.tensor([0, 0, 4]), torch.tensor([1, 4]), torch.tensor([0, 3])],
            "weights": [
                *[3, ARRAY, TEXT, [1.0] * 4, torch.ones(3), torch.ones(4, 1), torch.ones(4, dtype=torch.complex64)],
                *[torch.tensor([1.0, 2.0, 3.0, bad]) for bad in (-1.0, NAN, INF)],
                torch.tensor([1, 2, 3, -1]),
            ],
            "backend": BACKEND,
        },
    ),
    "random_pairs": (
        lambda **options: HF.random_pairs(**{"num_rows": 3, "num_mixed": 2, "k": 5, "seed": 0, **options}),
        {
            "num_rows": WHOLE,
            "num_mixed": WHOLE,
            "k": [*WHOLE, 0, 1, 65537],
            "seed": [*FOREIGN[:6], None, True, 1.5, "7"],
            "first_row": WHOLE,
        },
    ),
    "joined_rows": (
        lambda **options: joined_rows(**{"rows": u, **options}),
        {"rows": MATRIX, "process_group": GROUP},
    ),
    "ranks_of": (ranks_of, {"process_group": GROUP}),
    "check_gather": (lambda **options: check_gather(**{"gather": True, "process_group": None, **options}), JOINED),
}


def cases() -> Iterator[Any]:
    for owner, (make, arguments) in TABLE.items():
        for name, values in arguments.items():
            yield pytest.param(make, name, values, id=f"{owner}-{name}")


@pytest.mark.parametrize(("make", "name", "values"), list(cases()))
def test_what_is_wrong_is_named_at_once_and_briefly(make: Make, name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises((ValueError, TypeError)) as said:
            make(**{name: value})
        message = str(said.value)
        assert message.startswith(f"{name}: expected ") and "got " in message, message
        assert len(message) < 500 and "7.77" not in message, message


@pytest.mark.parametrize(
    "make",
    [
        lambda: FusedHiCLLoss(local_weight=0.0, global_weight=0.0),
        lambda: FusedHiCLLoss(local_weight=NAN),
        lambda: FusedInfoNCELoss(symmetric=True, positive_mixing=PositiveMixing()),
    ],
)
def test_combinations_that_are_wrong(make: Make) -> None:
    with pytest.raises(ValueError, match=r"^\w+: expected "):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: FusedHiCLLoss(1, local_weight=2, global_weight=1),
        lambda: FusedHiCLLoss(np.float32(0.1), local_weight=np.float64(1.0)),
        lambda: FusedHiCLLoss(local_weight=0.0),
        lambda: FusedInfoNCELoss(3, hard_negative_weight=-1.5, margin=0, queue_size=0),
        lambda: HardNegativeMixing("auto", alpha=1, seed=-7),
        lambda: PositiveMixing(0, [1, 0]),
        lambda: PositiveMixing(weights=(-0.5, 2)),
        lambda: GradientParadigmLoss("met", margin=0),
        lambda: GradientParadigmLoss("custom", dissipation=-0.5, weight=["power", 2], ratio=lambda rows: rows.positive),
        lambda: GradientParadigmLoss("mhs", modified=["r"], strength=0.5, ratio=np.float32(2)),
        lambda: HF.segment_pool(u, offsets, torch.tensor([True, False, False, False])),
        lambda: HF.segment_pool(u, offsets, torch.tensor([3, 0, 0, 0], dtype=torch.uint8)),
        lambda: HF.info_nce(u, v, temperature=np.float32(0.5), hard_negative_weight=-1, negatives=v),
    ],
)
def test_what_is_right_is_not_refused(make: Make) -> None:
    make()


def test_an_unknown_backend_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HICL_FAST_BACKEND", "fortran")
    with pytest.raises(ValueError, match="^HICL_FAST_BACKEND: expected 'auto' or one of"):
        HF.info_nce(u, v)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (TENSOR, "a tensor of shape (40, 30), torch.float32, on cpu"),
        (ARRAY, "an array of shape (40, 30), float64"),
        (0.05, "0.05 (float)"),
        (None, "None (NoneType)"),
        ("avg", "'avg' (str)"),
        ([1, "a"], "[1, 'a'] (list)"),
        (("power", ARRAY), "('power', an array of shape (40, 30), float64) (tuple)"),
        (list(range(1000)), "[0, 1, 2, 3, … 1000 in all] (list)"),
        (u.double, "a builtin_function_or_method (builtin_function_or_method)"),
    ],
)
def test_describe(value: object, words: str) -> None:
    assert _checks.describe(value) == words


def test_describe_is_short_whatever_it_is_given() -> None:
    deep: list[Any] = [TEXT]
    for _ in range(50):
        deep = [deep, {TEXT: deep}, (TENSOR, ARRAY)]
    for value in (*FOREIGN, deep, [[TEXT] * 9] * 9, {i: [TEXT] * 9 for i in range(99)}, np.array([TEXT])[0]):
        assert len(_checks.describe(value)) < 300


@pytest.mark.parametrize(("temperature", "weight"), [(1e300, 0.0), (1e-40, 0.0), (0.05, 1e39), (0.05, -1e39)])
def test_numbers_that_float32_does_not_hold(temperature: float, weight: float) -> None:
    """They would come out as NaN or infinity."""
    with pytest.raises(ValueError, match="(temperature|hard_negative_weight): expected .* float32"):
        FusedInfoNCELoss(temperature, hard_negative_weight=weight)
