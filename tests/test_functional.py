"""What bad arguments get: the argument's name, what was expected, what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hicl_fast
import hicl_fast.functional as HF

Q, K = torch.randn(4, 3), torch.randn(4, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query: .*list"),
        ({"query": torch.randn(4)}, ValueError, r"query: expected .*\(N, D\)"),
        ({"query": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "query: expected float64"),
        ({"query": torch.randn(0, 3)}, ValueError, "query: expected at least one row"),
        ({"key": torch.randn(4, 5)}, ValueError, "key: expected rows of length 3"),
        ({"key": torch.randn(3, 3)}, ValueError, "key: expected at least 4 rows"),
        ({"key": torch.randn(4, 3, device="meta")}, ValueError, "key: expected a tensor on cpu"),
        ({"target": torch.zeros(4)}, TypeError, "target: expected an int64"),
        ({"target": torch.tensor([0, 1, 2, 4])}, ValueError, "target: expected indices of keys, 0 to 3"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a number above 0"),
        ({"temperature": torch.tensor(0.0)}, ValueError, "temperature: expected a number above 0, got 0.0"),
        ({"temperature": torch.tensor(torch.inf)}, ValueError, "temperature: expected a number above 0, got inf"),
        ({"temperature": torch.tensor(-1.0)}, ValueError, "temperature: expected a number above 0, got -1.0"),
        ({"temperature": "low"}, TypeError, "temperature: expected a number"),
        ({"negatives": torch.randn(4, 2)}, ValueError, "negatives: expected rows of length 3"),
        ({"hard_negative_weight": 1.0}, ValueError, "hard_negative_weight: .* got no negatives"),
        ({"bank": torch.randn(2)}, ValueError, "bank: "),
        ({"extra_logits": torch.randn(3, 2)}, ValueError, "extra_logits: expected 4 rows"),
        ({"query_group": torch.zeros(4).long()}, ValueError, "key_group: .* got None"),
        ({"same_group": "ignore"}, ValueError, "same_group: expected one of 'exclude'"),
        ({"reduction": "median"}, ValueError, "reduction: "),
        ({"margin": -0.1}, ValueError, "margin: "),
        ({"precision": "int8"}, ValueError, "precision: "),
        ({"symmetric": True, "key": torch.randn(5, 3)}, ValueError, "symmetric: .* 4 queries and 5 keys"),
        ({"backend": "fortran"}, ValueError, "backend: expected 'auto' or one of"),
    ],
)
def test_info_nce_says_what_is_wrong(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HF.info_nce(**{"query": Q, "key": K, **change})


def test_backend_that_is_not_there_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    if any(status.name == "triton" and status.available for status in hicl_fast.backends()):
        pytest.skip("triton is there")
    with pytest.raises(hicl_fast.BackendError, match="'triton' can't run info_nce here: .*Those that can: torch"):
        HF.info_nce(Q, K, backend="triton")
    monkeypatch.setenv("HICL_FAST_BACKEND", "triton")
    with pytest.raises(hicl_fast.BackendError, match="triton"):
        HF.info_nce(Q, K)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.randn(3), torch.tensor([0, 3])), ValueError, "segments: "),
        ((torch.randn(3, 2), torch.tensor([0.0, 3.0])), TypeError, "offsets: expected an int64"),
        ((torch.randn(3, 2), torch.tensor([0])), ValueError, "offsets: .*B ≥ 1"),
        ((torch.randn(3, 2), torch.tensor([0, 3]), torch.ones(2)), ValueError, r"weights: expected shape \(3,\)"),
    ],
)
def test_segment_pool_says_what_is_wrong(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HF.segment_pool(*arguments)
