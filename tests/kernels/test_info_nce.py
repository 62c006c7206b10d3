"""The InfoNCE kernels in Triton's interpreter, against the reference in float64.

Tiles there are 32 rows × 32 columns × 32 dimensions, so 1, 31, 32, 33 and 65 are each side of every tile's edge.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hicl_fast.functional as functional
import hicl_fast.reference as reference
from hicl_fast.ops.backends import BackendError

pytestmark = [pytest.mark.triton, pytest.mark.interpret]

EDGES = (1, 31, 32, 33, 65)
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Chunks of one row tile, so that 33 rows make two, and bfloat16 as on a GPU."""
    from hicl_fast.ops.common import triton
    from hicl_fast.ops.info_nce import triton as triton_info_nce
    from tests.kernels import interpreter_bf16

    interpreter_bf16.install()
    monkeypatch.setattr(triton, "INTERPRETER_KNOWS_BF16", True)
    monkeypatch.setattr(triton_info_nce, "CHUNK_BYTES", 1)
    monkeypatch.setattr(triton_info_nce, "MIN_CHUNK_ROWS", 1)
    return triton_info_nce


def _leaves(tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {name: x.detach().to(dtype or x.dtype).clone().requires_grad_() for name, x in tensors.items()}


def _run(function: Any, leaves: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients under an upstream gradient other than 1."""
    loss = function(**leaves, **options)
    upstream = torch.linspace(-1.0, 2.0, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    (loss * upstream).sum().backward() if loss.dim() else (3 * loss).backward()
    return loss.detach(), {name: x.grad for name, x in leaves.items() if x.grad is not None}


def _differences(tensors: dict[str, Tensor], options: dict[str, Any]) -> dict[str, float]:
    """The relative error of the loss and, in norm, of every gradient."""
    loss, gradients = _run(functional.info_nce, _leaves(tensors), {**options, "backend": "triton"})
    exact_options = {
        k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in options.items()
    }
    exact_options.pop("precision", None)
    exact, exact_gradients = _run(reference.info_nce, _leaves(tensors, torch.float64), exact_options)
    assert gradients.keys() == exact_gradients.keys()
    errors = {"loss": ((loss - exact).abs() / exact.abs().clamp_min(1e-30)).max().item()}
    for name, gradient in gradients.items():
        assert gradient.dtype == tensors[name].dtype
        size = exact_gradients[name].norm().clamp_min(1e-30)
        errors[name] = ((gradient.double() - exact_gradients[name]).norm() / size).item()
    return errors


def _assert_exact(tensors: dict[str, Tensor], options: dict[str, Any], tolerance: float = 3e-6) -> None:
    errors = _differences(tensors, options)
    assert max(errors.values()) < tolerance, errors


def _pairs(n: int = 33, m: int = 33, dim: int = 33, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n * 10007 + m * 101 + dim)
    query, key = (torch.randn(rows, dim, generator=generator) for rows in (n, m))
    shared = min(n, m)
    key[:shared] += query[:shared]  # so that some rows' softmax is peaked
    return {"query": query.to(dtype), "key": key.to(dtype)}


def _rows(n: int, dim: int = 33, seed: int = 1) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def _groups(n: int, seed: int) -> Tensor:
    return torch.randint(0, 7, (n,), generator=torch.Generator().manual_seed(seed))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "margin": {"margin": 0.3},
    "groups left out": {"query_group": _groups(33, 1), "key_group": _groups(65, 2)},
    "groups as negatives": {"query_group": _groups(33, 1), "key_group": _groups(65, 2), "same_group": "negative"},
    "groups as positives": {"query_group": _groups(33, 1), "key_group": _groups(65, 2), "same_group": "positive"},
    "targets, several of one key": {"target": torch.arange(33) % 5 * 13},
    "bank": {"bank": _rows(34)},
}
ADDED: dict[str, dict[str, Tensor]] = {
    "no more inputs": {},
    "temperature": {"temperature": torch.tensor(0.07)},
    "all inputs": {"temperature": torch.tensor(0.2), "negatives": _rows(33, seed=5), "extra_logits": _rows(33, 3, 6)},
}


@pytest.mark.parametrize("size", EDGES)
@pytest.mark.parametrize("dimension", ["n", "m", "dim"])
def test_every_tile_edge(dimension: str, size: int) -> None:
    sizes = {"n": 33, "m": 65, "dim": 33, dimension: size}
    options: dict[str, Any] = {}
    if sizes["dim"] == 1:  # every similarity is 1 or −1, whatever the inputs: the exact gradient is 0
        loss, gradients = _run(functional.info_nce, _leaves(_pairs(**sizes)), {"backend": "triton"})
        torch.testing.assert_close(loss, reference.info_nce(**_pairs(**sizes)))
        assert all(gradient.abs().max() < 1e-5 for gradient in gradients.values())
        return
    if sizes["n"] > sizes["m"]:
        options["target"] = torch.arange(sizes["n"]) % sizes["m"]
    _assert_exact(_pairs(**sizes), options)


@pytest.mark.parametrize("size", EDGES)
@pytest.mark.parametrize("kind", ["negatives", "bank", "extra_logits"])
def test_every_tile_edge_of_further_columns(kind: str, size: int) -> None:
    tensors, options = _pairs(), {}
    if kind == "bank":
        options["bank"] = _rows(size)
    else:
        tensors[kind] = _rows(size) if kind == "negatives" else _rows(33, size)
    _assert_exact(tensors, options)


@pytest.mark.parametrize("size", EDGES)
@pytest.mark.parametrize("same_group", ["negative", "exclude", "positive"])
def test_every_tile_edge_both_ways(size: int, same_group: str) -> None:
    groups = _groups(size, 3)
    options = {"symmetric": True, "query_group": groups, "key_group": groups.flip(0), "same_group": same_group}
    loss = functional.info_nce(**_pairs(size, size), **options, backend="triton")
    exact = reference.info_nce(**{k: x.double() for k, x in _pairs(size, size).items()}, **options)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-7)
    if size > 1:
        _assert_exact(_pairs(size, size), options, 1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("added", list(ADDED))
@pytest.mark.parametrize("name", list(OPTIONS))
def test_options(name: str, added: str, reduction: str) -> None:
    tensors = {**_pairs(m=65), **ADDED[added]}
    options = {**OPTIONS[name], "reduction": reduction}
    if "negatives" in tensors:
        options["hard_negative_weight"] = 1.5
    _assert_exact(tensors, options, 1e-5)


@pytest.mark.parametrize("added", ["no more inputs", "temperature"])
def test_symmetric_options(added: str) -> None:
    _assert_exact({**_pairs(), **ADDED[added]}, {"symmetric": True, "margin": 0.2, "reduction": "none"}, 1e-5)


@pytest.mark.parametrize("weight", [-2.0, 0.0, 3.0])
def test_one_sweep_and_two_agree(weight: float, small_chunks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {**_pairs(), "negatives": _rows(33), "temperature": torch.tensor(0.05)}
    options = {"hard_negative_weight": weight, "backend": "triton"}
    once = _run(functional.info_nce, _leaves(tensors), options)
    sweeps = []
    statistics = small_chunks._Sweeps.statistics
    monkeypatch.setattr(small_chunks._Sweeps, "statistics", lambda self: sweeps.append(1) or statistics(self))
    monkeypatch.setattr(small_chunks, "MAX_SPREAD", 0.0)
    twice = _run(functional.info_nce, _leaves(tensors), options)
    assert sweeps, "the second run was meant to take two sweeps"
    torch.testing.assert_close(once, twice, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("temperature", [0.01, 0.0166, 0.0168, 0.02, 0.05, 1.0])
@pytest.mark.parametrize("kind", ["same", "near", "unrelated", "opposite"])
def test_temperatures(temperature: float, kind: str) -> None:
    """From losses of e^−100 to 200, on either side of where one offset stops being enough."""
    tensors = _pairs()
    query = tensors["query"]
    tensors["key"] = {
        "same": query.clone(),
        "near": query + 0.1 * tensors["key"],
        "unrelated": tensors["key"],
        "opposite": -query,
    }[kind]
    exact = reference.info_nce(**{k: x.double() for k, x in tensors.items()}, temperature=temperature)
    if exact < 1e-37:
        assert functional.info_nce(**tensors, temperature=temperature, backend="triton") < 1e-37
        return
    # A logit's rounding, scale · 2^−24, is a relative error of the loss it makes.
    _assert_exact(tensors, {"temperature": temperature}, 2e-6 + 60 * 2**-24 / temperature * (1 + (kind == "same") * 10))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["plain", "symmetric", "none", "groups as positives", "temperature"])
def test_a_temperature_of_a_thousandth(name: str, dtype: torch.dtype) -> None:
    """Logits of ±1000, whose exponentials no type holds."""
    tensors, options = _pairs(65, 65, dtype=dtype), {"temperature": 1e-3}
    tensors["key"][::2] = _rows(33).to(dtype)  # losses of some hundreds beside those of next to nothing
    if name == "temperature":
        tensors["temperature"], options = torch.tensor(1e-3), {}
    elif name == "groups as positives":
        options |= {"query_group": _groups(65, 1), "key_group": _groups(65, 2), "same_group": "positive"}
    else:
        options |= {"plain": {}, "symmetric": {"symmetric": True}, "none": {"reduction": "none"}}[name]
    errors = _differences(tensors, options)
    assert max(errors.values()) < 60 * 2**-24 / 1e-3 + TOLERANCE[dtype], errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"reduction": "none"}, {"temperature": 0.012}], ids=str)
def test_16_bit(dtype: torch.dtype, options: dict[str, Any]) -> None:
    errors = _differences(_pairs(65, 65, dtype=dtype), options)
    assert errors.pop("loss") < 2e-5  # the inputs are multiplied exactly
    assert max(errors.values()) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_of_a_small_loss(dtype: torch.dtype, symmetric: bool) -> None:
    """Slopes far below float16's smallest number; upstream, a loss scale brings the gradient back into its range."""
    tensors = _pairs(65, 65, 65)
    tensors["key"] = tensors["query"] + 0.02 * tensors["key"]
    leaves = _leaves({k: x.to(dtype) for k, x in tensors.items()})
    options: dict[str, Any] = {"temperature": 0.04, "symmetric": symmetric}
    loss = functional.info_nce(**leaves, **options, backend="triton")
    assert loss < 1e-4
    (loss * 2.0**16).backward()
    exact = _leaves(leaves, torch.float64)
    (reference.info_nce(**exact, **options) * 2.0**16).backward()
    for name, x in leaves.items():
        error = (x.grad.double() - exact[name].grad).norm() / exact[name].grad.norm()  # type: ignore[union-attr]
        assert error < 2 * TOLERANCE[dtype], name


def test_precision_bf16_rounds_float32_operands() -> None:
    errors = _differences(_pairs(), {"precision": "bf16"})
    assert 1e-5 < max(errors.values()) < 2e-2, errors


def test_mixed_types_and_strides() -> None:
    tensors = _pairs(33, 65, 33)
    wide = torch.randn(33, 66)
    wide[:, ::2] = tensors["query"]
    leaves = {"query": wide[:, ::2].detach().requires_grad_(), "key": tensors["key"].bfloat16().requires_grad_()}
    loss, gradients = _run(functional.info_nce, leaves, {"backend": "triton"})
    exact, exact_gradients = _run(reference.info_nce, _leaves(leaves, torch.float64), {})
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients["query"].double(), exact_gradients["query"], rtol=1e-4, atol=1e-7)
    assert gradients["key"].dtype == torch.bfloat16


@pytest.mark.parametrize("wanted", ["query", "key", "negatives", "temperature", "extra_logits"])
def test_one_gradient_alone(wanted: str) -> None:
    tensors = {**_pairs(), **ADDED["all inputs"]}
    if wanted != "extra_logits":
        del tensors["extra_logits"]  # it takes two sweeps: the rest is tried in one
    _, together = _run(functional.info_nce, _leaves(tensors), {"backend": "triton"})
    leaves = {name: x.clone().requires_grad_(name == wanted) for name, x in tensors.items()}
    _, alone = _run(functional.info_nce, leaves, {"backend": "triton"})
    assert list(alone) == [wanted]
    torch.testing.assert_close(alone[wanted], together[wanted], rtol=0, atol=0)


def test_zero_rows_get_no_gradient() -> None:
    tensors = _pairs(33, 65)
    tensors["query"][3], tensors["key"][40] = 0, 0
    _assert_exact(tensors, {})
    _, gradients = _run(functional.info_nce, _leaves(tensors), {"backend": "triton"})
    assert not gradients["query"][3].any() and not gradients["key"][40].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"symmetric": True}], ids=str)
def test_what_is_not_finite_makes_the_loss_nan(value: float, options: dict[str, Any]) -> None:
    tensors = _pairs()
    tensors["key"][5, 2] = value
    assert functional.info_nce(**tensors, **options, backend="triton").isnan()
    assert _run(functional.info_nce, _leaves(tensors), {**options, "backend": "triton"})[0].isnan()


def test_rows_without_negatives_lose_nothing() -> None:
    groups = torch.zeros(33, dtype=torch.int64)
    tensors = _pairs()
    options = {"query_group": groups, "key_group": groups, "backend": "triton"}
    for more in ({}, {"temperature": 0.01}, {"symmetric": True}):
        loss, gradients = _run(functional.info_nce, _leaves(tensors), {**options, **more})
        assert loss == 0 and not any(gradient.any() for gradient in gradients.values())


def test_statistics_for_logging() -> None:
    tensors, groups = _pairs(), _groups(33, 4)
    for options in ({}, {"query_group": groups, "key_group": groups}, {"temperature": 0.01}):
        for grad in (False, True):
            leaves = {name: x.clone().requires_grad_(grad) for name, x in tensors.items()}
            _, positive, hardest, _ = functional.info_nce_with_statistics(**leaves, **options, backend="triton")
            _, expected, expected_hardest, _ = functional.info_nce_with_statistics(**leaves, **options, backend="torch")
            torch.testing.assert_close(positive, expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(hardest, expected_hardest, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"symmetric": True}, {"target": torch.arange(33) % 4}], ids=["", "both", "target"]
)
def test_runs_give_the_same_bits(options: dict[str, Any]) -> None:
    runs = [_run(functional.info_nce, _leaves(_pairs()), {**options, "backend": "triton"}) for _ in range(2)]
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_two_forwards_before_a_backward() -> None:
    first, second = _leaves(_pairs()), _leaves(_pairs(32, 65, 31))
    losses = [functional.info_nce(**leaves, backend="triton") for leaves in (first, second)]
    for loss in losses:
        loss.backward()
    for leaves in (first, second):
        _, alone = _run(functional.info_nce, _leaves(leaves), {"backend": "triton"})
        torch.testing.assert_close(leaves["query"].grad * 3, alone["query"])  # type: ignore[operator]


def test_float64_is_refused() -> None:
    with pytest.raises(BackendError, match="float64"):
        functional.info_nce(**_pairs(dtype=torch.float64), backend="triton")
