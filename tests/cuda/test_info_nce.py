"""InfoNCE's kernels for small batches, emulated on the CPU, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hicl_fast.functional as HF
from hicl_fast import BackendError, reference

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("emulated")]

# Of the gradients' error, in norm, beyond what float32 has. In 16 bits a coefficient is rounded for the product and a
# gradient for its type, by half of 2⁻⁷ or 2⁻¹⁰ at most.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "margin": {"margin": 0.3},
    "sharp": {"temperature": 0.005},
    "flat": {"temperature": 2.0},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "ignored groups": {
        "query_group": torch.zeros(37).long(),
        "key_group": torch.zeros(70).long(),
        "same_group": "negative",
    },
    "groups": {"query_group": torch.arange(37) % 5, "key_group": torch.arange(70) % 7},
    "groups and targets": {
        "query_group": torch.arange(37) % 5,
        "key_group": torch.arange(70) % 5,
        "target": torch.arange(37) * 3 % 70,
    },
    "targets, several of one key": {"target": torch.arange(37) % 5 * 13},
}


def rows(n: int, d: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * n + d + seed)
    sizes = torch.logspace(-1, 1, n)[torch.randperm(n, generator=generator), None]  # norms differ a hundredfold
    return (torch.randn(n, d, generator=generator) * sizes).to(dtype)


def draw(
    n: int, m: int, d: int, dtype: torch.dtype, *, negatives: int = 0, extra: int = 0, learned: bool = False
) -> dict[str, Tensor]:
    query, key = rows(n, d, dtype), rows(m, d, dtype, seed=1)
    shared = min(n, m)
    direction = torch.nn.functional.normalize(query[:shared:2].float(), dim=1)
    key[:shared:2] += (key[:shared:2].float().norm(dim=1, keepdim=True) * direction).to(dtype)  # peaked rows
    inputs = {"query": query, "key": key}
    if negatives:
        inputs["negatives"] = rows(negatives, d, dtype, seed=2)
    if extra:
        inputs["extra_logits"] = 5 * torch.randn(n, extra, generator=torch.Generator().manual_seed(extra))
    if learned:
        inputs["temperature"] = torch.tensor(0.07)
    return inputs


def run(function: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Loss and gradients under an upstream gradient that keeps float16's gradients out of its subnormal numbers."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    loss = function(**leaves, **options)
    if loss.dim():
        upstream = torch.linspace(-100, 200, loss.numel()).to(loss.dtype)
    else:
        upstream = torch.tensor(300.0 if options.get("reduction") == "sum" else 300.0 * len(inputs["query"]))
    (loss * upstream).sum().backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves.values())]


def errors_of(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    """The loss's largest relative error, and the gradients', in norm."""
    loss = ((results[0] - exact[0]).abs() / exact[0].abs().clamp_min(1e-6)).max()
    gradients = (
        (x.double() - y).norm() / y.norm().clamp_min(1e-30) for x, y in zip(results[1:], exact[1:], strict=True)
    )
    return [float(loss), *map(float, gradients)]


def assert_exact(inputs: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype, slack: float = 1) -> None:
    ours = run(HF.info_nce, inputs, {**options, "backend": "cuda"})
    exact = run(reference.info_nce, {name: x.double() for name, x in inputs.items()}, options)
    eager = run(reference.info_nce, {name: x.float() for name, x in inputs.items()}, options)
    assert [x.dtype for x in ours[1:]] == [x.dtype for x in inputs.values()]
    errors, in_float32 = errors_of(ours, exact), errors_of(eager, exact)
    # Inputs are multiplied as they are and summed in float32, whatever their type.
    assert errors[0] <= max(1e-5, 4 * in_float32[0])
    assert all(e <= slack * TOLERANCE[dtype] + 4 * f for e, f in zip(errors[1:], in_float32[1:], strict=True)), errors


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any], dtype: torch.dtype) -> None:
    assert_exact(draw(37, 70, 40, dtype), options, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("weight", [0.0, 1.5])
def test_negatives_extra_logits_and_a_learned_temperature(weight: float, dtype: torch.dtype) -> None:
    inputs = draw(37, 70, 40, dtype, negatives=37, extra=9, learned=True)
    assert_exact(inputs, {"hard_negative_weight": weight, "margin": 0.2}, dtype)


# Tiles are 64 × 64; a step is 32 float32 or 64 16-bit dimensions; odd widths are not copied by 16 bytes.
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [2, 63, 64, 65, 130])
@pytest.mark.parametrize("dimension", ["n", "m", "d", "negatives", "extra"])
def test_every_tile_edge(dimension: str, size: int, dtype: torch.dtype) -> None:
    sizes = {"n": 8, "m": 9, "d": 24, "negatives": 3, "extra": 5, dimension: size}
    options = {"target": torch.arange(sizes["n"]) % sizes["m"]} if sizes["n"] > sizes["m"] else {}
    # In a plane little is left of a gradient once its part along the row is taken away, but all of its rounding.
    assert_exact(draw(**sizes, dtype=dtype), options, dtype, slack=10 if sizes["d"] == 2 else 1)


def test_long_rows_keep_float32s_digits() -> None:
    """Products are summed in short chains: in one over all dimensions they would lose ten times as much as eager's."""
    inputs = draw(40, 40, 1024, torch.float32)
    common = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    inputs = {name: x / x.norm(dim=1, keepdim=True) * 32 + 2 * common for name, x in inputs.items()}
    exact = run(reference.info_nce, {name: x.double() for name, x in inputs.items()}, {})
    ours, eager = (run(*how) for how in ((HF.info_nce, inputs, {"backend": "cuda"}), (reference.info_nce, inputs, {})))
    for error, of_eager in zip(errors_of(ours, exact), errors_of(eager, exact), strict=True):
        assert error <= 3 * of_eager, (errors_of(ours, exact), errors_of(eager, exact))


def test_orders_of_warps_and_lanes(order: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_exact(draw(66, 67, 136, dtype, negatives=66, extra=70), {"hard_negative_weight": 0.5}, dtype)


def test_two_runs_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for order in ("0", "5"):
        monkeypatch.setenv("HICL_EMULATION_ORDER", order)
        results.append(run(HF.info_nce, draw(70, 70, 72, torch.bfloat16, extra=3), {"backend": "cuda"}))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_small_losses_keep_their_digits() -> None:
    query = torch.eye(8)[:4].repeat(1, 5)
    inputs = {"query": query, "key": query + 1e-3 * rows(4, 40, torch.float32)}
    assert run(reference.info_nce, inputs, {"temperature": 0.05})[0] < 1e-6
    for dtype in (torch.float32, torch.bfloat16):  # float16 has no such small gradients
        assert_exact({k: x.to(dtype) for k, x in inputs.items()}, {"temperature": 0.05}, dtype)


def test_a_row_alone_has_no_loss_and_no_gradient() -> None:
    loss, *gradients = run(HF.info_nce, draw(1, 1, 16, torch.float32), {"backend": "cuda"})
    assert loss == 0 and not any(gradient.any() for gradient in gradients)


def test_zero_rows_get_no_gradient() -> None:
    inputs = draw(20, 20, 24, torch.float32, negatives=4)
    for x in inputs.values():
        x[2] = 0
    assert_exact(inputs, {}, torch.float32)
    assert not any(gradient[2].any() for gradient in run(HF.info_nce, inputs, {"backend": "cuda"})[1:])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["query", "key", "negatives", "extra_logits"])
def test_what_is_not_finite_shows(where: str, value: float) -> None:
    inputs = draw(20, 20, 24, torch.float32, negatives=4, extra=2)
    inputs[where][3, 1] = value
    loss, *_ = run(HF.info_nce, inputs, {"backend": "cuda"})
    assert loss.isnan()


def test_extra_logits_may_be_minus_infinity() -> None:
    inputs = draw(20, 20, 24, torch.float32, extra=3)
    inputs["extra_logits"][:, 1] = -torch.inf
    inputs["extra_logits"][4] = -torch.inf
    exact = run(reference.info_nce, {name: x.double() for name, x in inputs.items()}, {})
    ours = run(HF.info_nce, inputs, {"backend": "cuda"})
    assert max(errors_of(ours, exact)) <= 1e-5 and not ours[3][4].any()


def test_extra_logits_alone() -> None:
    inputs = {"query": rows(1, 8, torch.float32), "key": rows(1, 8, torch.float32, seed=1)}
    assert_exact({**inputs, "extra_logits": torch.tensor([[3.0, 20.0]])}, {}, torch.float32)


def test_statistics() -> None:
    inputs = draw(20, 25, 24, torch.float32, negatives=4, extra=4)
    expected = HF.info_nce_with_statistics(**inputs, backend="torch")
    got = HF.info_nce_with_statistics(**inputs, backend="cuda")
    for ours, right in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(ours, right)


def test_mixed_types_and_precision() -> None:
    inputs = draw(20, 20, 24, torch.bfloat16)
    assert_exact({**inputs, "query": inputs["query"].float()}, {}, torch.bfloat16)
    exact = run(reference.info_nce, {k: x.double() for k, x in inputs.items()}, {})
    in_float32 = run(HF.info_nce, {k: x.float() for k, x in inputs.items()}, {"backend": "cuda", "precision": "bf16"})
    error = float((in_float32[1].double() - exact[1]).norm() / exact[1].norm())
    assert TOLERANCE[torch.float32] < error < TOLERANCE[torch.bfloat16]


def test_a_temperature_that_only_the_device_knows() -> None:
    inputs, scale = draw(20, 20, 24, torch.float32), 20.0
    known, unknown = (
        torch.ops.hicl_fast_cuda.small_info_nce(
            inputs["query"], inputs["key"], *8 * [None], tensor, number, 0.05, 0.0, 0.0, 19
        )
        for tensor, number in ((None, scale), (torch.tensor(scale), 0.0))
    )
    assert all(torch.equal(a, b) for a, b in zip(known, unknown, strict=True))


def test_a_target_out_of_range_on_the_device_makes_nan() -> None:
    inputs = draw(20, 20, 24, torch.float32)
    target = torch.arange(20)
    target[3] = 20
    loss, *_ = torch.ops.hicl_fast_cuda.small_info_nce(
        inputs["query"], inputs["key"], target, *8 * [None], 20.0, 1.0, 0.0, 0.0, 0
    )
    assert loss[3].isnan() and loss.isnan().sum() == 1


@pytest.mark.parametrize("name", ["plain", "margin", "sharp", "groups", "groups and targets"])
def test_log_sum_exp(name: str) -> None:
    inputs = draw(37, 70, 40, torch.float32, negatives=37, extra=5, learned=name != "sharp")

    def rows(operator: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> list[Tensor]:
        leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
        found = operator(**leaves, **options)[:2]
        weights = torch.linspace(-1, 2, 37).to(found[0].dtype), torch.linspace(3, 1, 37).to(found[0].dtype)
        sum((x * w).sum() for x, w in zip(found, weights, strict=True)).backward()
        return [torch.stack(found).detach(), *(leaf.grad for leaf in leaves.values())]

    ours = rows(HF.log_sum_exp, inputs, {**OPTIONS[name], "hard_negative_weight": 1.5, "backend": "cuda"})
    options = {**OPTIONS[name], "hard_negative_weight": 1.5}
    exact = rows(reference.log_sum_exp, {name: x.double() for name, x in inputs.items()}, options)
    eager = rows(reference.log_sum_exp, inputs, options)
    for got, expected, plain in zip(ours, exact, eager, strict=True):
        error, of_eager = (float((x.double() - expected).norm() / expected.norm()) for x in (got, plain))
        assert error <= 4 * of_eager + TOLERANCE[torch.float32]


TOO_MANY = "more than 1024 rows, columns or dimensions"
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("a bank", {"bank": torch.ones(2, 8)}),
    ("several positives", {"query_group": torch.arange(4), "key_group": torch.arange(4), "same_group": "positive"}),
    ("a symmetric loss", {"symmetric": True}),
    ("several relations", {"query_group": torch.zeros(4, 2).long(), "key_group": torch.zeros(4, 2).long()}),
    ("a limit", {"false_negative_margin": 0.1}),
    ("hardness", {"negatives": HF.Columns(torch.ones(4, 8), hardness=1.0)}),
    (TOO_MANY, {"negatives": torch.ones(1025, 8)}),
    (TOO_MANY, {"extra_logits": torch.ones(4, 1025)}),
]


@pytest.mark.parametrize(("what", "options"), REFUSED, ids=[f"{what}, {list(options)[0]}" for what, options in REFUSED])
def test_what_it_leaves_to_others(what: str, options: dict[str, Any]) -> None:
    with pytest.raises(BackendError, match=f"does not take {what}. Those that can: torch"):
        HF.info_nce(torch.ones(4, 8), torch.ones(4, 8), backend="cuda", **options)
