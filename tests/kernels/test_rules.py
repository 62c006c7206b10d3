"""The rules of InfoNCE's columns in Triton's interpreter: alone, in pairs, and all at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ops import rules
from tests.ops.rules import PAIRS, RULES, assert_exact, draw

pytestmark = [pytest.mark.triton, pytest.mark.interpret]

OF_ROWS = [name for name in RULES if name not in ("symmetric", "rows", "positives")]  # what log_sum_exp has


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sizes that cross tiles of 32 × 32, and chunks of one row tile."""
    from hicl_fast.ops.info_nce import triton as triton_info_nce

    monkeypatch.setattr(triton_info_nce, "CHUNK_BYTES", 1)
    monkeypatch.setattr(triton_info_nce, "MIN_CHUNK_ROWS", 1)
    for name, size in (("N", 33), ("M", 35), ("P", 33), ("B", 34), ("D", 7)):
        monkeypatch.setattr(rules, name, size)
    return triton_info_nce


@pytest.mark.parametrize("rule", RULES)
def test_each_alone(rule: str) -> None:
    names = {rule, "groups"} if rule == "positives" else {rule}
    assert_exact("info_nce", draw(names), "triton", torch.float32)


@pytest.mark.parametrize("pair", PAIRS, ids=", ".join)
def test_every_pair(pair: tuple[str, str]) -> None:
    assert_exact("info_nce", draw(pair, seed=1), "triton", torch.float32)


@pytest.mark.parametrize("rule", ["plain", *OF_ROWS])
def test_log_sum_exp_with_each(rule: str) -> None:
    assert_exact("log_sum_exp", draw({rule} - {"plain"}), "triton", torch.float32)


def test_everything_at_a_time() -> None:
    everything = set(OF_ROWS) - {"groups", "own negatives", "no batch", "several targets"}
    assert_exact("log_sum_exp", draw(everything), "triton", torch.float32)
    assert_exact("info_nce", draw(everything), "triton", torch.float32)
    assert_exact("info_nce", draw((everything - {"target"}) | {"symmetric", "rows"}), "triton", torch.float32)


def test_everything_with_several_targets() -> None:
    refused = {"margin of false negatives", "ratio of false negatives", "target"}
    everything = set(OF_ROWS) - {"groups", "own negatives", "no batch"} - refused
    assert_exact("log_sum_exp", draw(everything), "triton", torch.float32)
    assert_exact("info_nce", draw(everything | {"rows"}), "triton", torch.float32)


def test_two_sweeps(several_tiles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where exponentials would leave float32's range in one."""
    monkeypatch.setattr(several_tiles, "MAX_SPREAD", 0.0)
    for name in ("limit", "relations", "hard keys", "hard negatives", "several targets"):
        assert_exact("info_nce", draw({name}), "triton", torch.float32)


@pytest.mark.parametrize("name", ["negative", "positive"])
def test_rows_without_negatives(name: str) -> None:
    case = draw({"limit"}) | {"limit": torch.full((rules.N,), -2.0)}
    case["extra_logits"] = case["extra_logits"][:, :0]
    assert_exact("log_sum_exp", case, "triton", torch.float32)
