"""The rules of InfoNCE's columns on every CPU backend: alone, in pairs, and many at a time, against the float64 reference."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hicl_fast
import hicl_fast.functional as HF
from hicl_fast import reference
from hicl_fast.ops.info_nce import torch as chunked_info_nce
from tests.ops import rules
from tests.ops.rules import PAIRS, RULES, TOGETHER, Case, assert_exact, draw, evaluate, fused, relative_error

BACKENDS = [s.name for s in hicl_fast.backends() if s.available and s.name in ("torch", "cpp")]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OF_ROWS = [name for name in RULES if name not in ("symmetric", "rows", "positives")]  # what log_sum_exp has

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few rows already make several chunks."""
    monkeypatch.setitem(chunked_info_nce.CHUNK_BYTES, "cpu", 16 * 40 * 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_each_alone(rule: str, dtype: torch.dtype, backend: str) -> None:
    names = {rule, "groups"} if rule == "positives" else {rule}
    assert_exact("info_nce", draw(names), backend, dtype)


@pytest.mark.parametrize("pair", PAIRS, ids=", ".join)
def test_every_pair(pair: tuple[str, str], backend: str) -> None:
    for dtype in (torch.float64, torch.float32):
        assert_exact("info_nce", draw(pair, seed=1), backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["plain", *OF_ROWS])
def test_log_sum_exp_with_each(rule: str, dtype: torch.dtype, backend: str) -> None:
    assert_exact("log_sum_exp", draw({rule} - {"plain"}), backend, dtype)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if set(pair) <= set(OF_ROWS)], ids=", ".join)
def test_log_sum_exp_with_every_pair(pair: tuple[str, str], backend: str) -> None:
    for dtype in (torch.float64, torch.float32):
        assert_exact("log_sum_exp", draw(pair, seed=2), backend, dtype)


@settings(max_examples=60)
@given(names=st.sets(st.sampled_from(list(RULES)), min_size=3), seed=st.integers(0, 999))
def test_many_at_a_time(names: set[str], seed: int, backend: str) -> None:
    for refused in TOGETHER:
        if refused <= names:
            names = names - {sorted(refused)[0]}
    case = draw(names, seed)
    assert_exact("info_nce", case, backend, torch.float64)
    assert_exact("info_nce", case, backend, torch.float32)
    if names <= set(OF_ROWS):
        assert_exact("log_sum_exp", case, backend, torch.float64)


@pytest.mark.parametrize("names", [(), ("limit", "relations", "hard keys", "hard negatives", "hard bank")], ids=str)
def test_small_losses_keep_their_digits(names: tuple[str, ...], backend: str) -> None:
    case = rules.typed(draw(names, spread=0.01), torch.float32)  # keys are their queries, but for a hundredth
    away = torch.zeros(rules.D)
    away[0] = 9.0
    case |= {name: away.expand(len(case[name]), -1) + case[name] for name in ("key", "query")}
    case |= {name: case[name] - away for name in ("negatives", "bank")}  # on the other side
    case |= {"key": torch.cat([case["key"][:1], case["negatives"], case["bank"]]), "query": case["query"]}
    case |= {"target": torch.zeros(rules.N, dtype=torch.int64), "extra_logits": case["extra_logits"][:, :0]}
    case.pop("key_group", None)
    if names:
        case["limit"] = torch.full((rules.N,), 0.5)  # far above those on the other side
    exact = evaluate(lambda c: reference.info_nce(**c), rules.typed(case, torch.float64))
    assert exact["output 0"] < 1e-6
    got = evaluate(lambda c: fused(HF.info_nce, c, backend=backend), case)
    for what in ("output 0", "gradient of query", "gradient of temperature", "gradient of negatives"):
        assert relative_error(got[what], exact[what]) < 1e-4, what
    rows = fused(HF.log_sum_exp, case, backend=backend)
    assert relative_error(torch.nn.functional.softplus(rows.negative - rows.positive).mean(), exact["output 0"]) < 1e-4


def test_what_is_left_out_has_no_part(backend: str) -> None:
    """A limit below everything leaves a row its positive alone."""
    case = draw({"limit"}) | {"limit": torch.full((rules.N,), -2.0, dtype=torch.float64)}
    case["extra_logits"] = case["extra_logits"][:, :0]
    found = evaluate(lambda c: fused(HF.log_sum_exp, c, backend=backend), case)
    assert (found["output 0"] == -torch.inf).all()
    assert (found["gradient of negatives"] == 0).all() and not found["gradient of query"].isnan().any()
    assert fused(HF.info_nce, case, backend=backend) == 0


def test_a_positive_is_never_left_out(backend: str) -> None:
    case = draw({"groups", "positives"}) | {"limit": torch.full((rules.N,), -2.0, dtype=torch.float64)}
    assert_exact("info_nce", case, backend, torch.float64)


def test_duplicate_texts_are_left_out_by_their_ids(backend: str) -> None:
    """Keys that are the same text as the positive, and queries that are the same text: two relations."""
    query, key = torch.randn(6, 5).double(), torch.randn(6, 5).double()
    query[1], key[4] = query[0], key[2]
    ids = torch.stack([torch.tensor([0, 0, 2, 3, 4, 5]), torch.tensor([10, 11, 12, 13, 12, 15])], dim=1)
    got = HF.info_nce(query, key, query_group=ids, key_group=ids, reduction="none", backend=backend)
    mask = (ids[:, None] == ids[None]).any(dim=2).fill_diagonal_(False)
    logits = (reference.normalise(query) @ reference.normalise(key).T / 0.05).masked_fill(mask, -torch.inf)
    torch.testing.assert_close(got, torch.nn.functional.cross_entropy(logits, torch.arange(6), reduction="none"))
    assert mask.sum() == 4


@pytest.mark.parametrize("rule", ["hard keys", "hard negatives", "own negatives", "groups", "own negatives' weight"])
def test_mixtures_beside_them(rule: str, backend: str) -> None:
    """The loss with mixtures is the loss with their logits as further ones."""
    case = draw({rule})
    pairs = HF.random_pairs(rules.N, 4, 3, seed=0)
    groups = {name: case[name] for name in ("query_group", "key_group") if name in case}
    _, index = HF.hard_negatives(case["query"], case["key"], 3, backend="torch", **groups)

    def apart(c: Case) -> Tensor:
        query, key, temperature = c["query"], c["key"], c["temperature"]
        mixed = reference.mixed_negative_logits(query, key, index, pairs, alpha=0.3, temperature=temperature)
        return reference.info_nce(**c | {"extra_logits": torch.cat([c["extra_logits"], mixed], dim=1)})

    exact = evaluate(apart, case)
    mixing = HF.Mixing(3, pairs, 0.3)
    got = evaluate(lambda c: fused(HF.info_nce, c, mixing=mixing, backend=backend), case)
    for what, expected in exact.items():
        assert relative_error(got[what], expected) < 1e-9, what


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("limit", "mixing: expected None with a limit"),
        ("relations", "mixing: expected None with several relations"),
        ("no batch", "mixing: expected None with in_batch=False"),
    ],
)
def test_what_does_not_go_with_mixtures(rule: str, message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused(HF.info_nce, draw({rule}), mixing=HF.Mixing(3, HF.random_pairs(rules.N, 4, 3, seed=0)), backend=backend)


@pytest.mark.parametrize("kinds", [("own_negatives",), ("negatives",), ("bank", "own_negatives")], ids=str)
@pytest.mark.parametrize("more", [set(), {"symmetric"}, {"no batch"}], ids=str)
def test_groups_of_some_kinds_alone(kinds: tuple[str, ...], more: set[str], backend: str) -> None:
    """Eagerly and compiled: the keys have no groups, and both ways a key then has none to compare."""
    case = draw({"own negatives", "relations"} | more)
    for name in ("key", "negatives", "bank", "own_negatives"):
        if name not in kinds:
            case.pop("own_group" if name == "own_negatives" else f"{name}_group")
    assert_exact("info_nce", case, backend, torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(lambda c: fused(HF.info_nce, c, backend=backend), fullgraph=True, backend="aot_eager")
    eager = evaluate(lambda c: fused(HF.info_nce, c, backend=backend), case)
    for what, got in evaluate(compiled, case).items():
        torch.testing.assert_close(got, eager[what])


def test_several_targets_one_by_one(backend: str) -> None:
    """A row's loss is the mean of those with one of its positives and without the others."""
    query, key = (torch.randn(n, 5, generator=torch.Generator().manual_seed(n)).double() for n in (3, 7))
    lists = [[4], [0, 2, 2, 6], [5, 1]]
    offsets = torch.tensor([0, 1, 5, 7])
    got = HF.info_nce(
        query, key, target=torch.tensor(sum(lists, [])), target_offsets=offsets, reduction="none", backend=backend
    )
    for row, loss, positives in zip(query, got, lists, strict=True):
        others = [key[j] for j in range(7) if j not in positives]
        alone = [reference.info_nce(row[None], torch.stack([key[p], *others]), reduction="none") for p in positives]
        torch.testing.assert_close(loss, torch.cat(alone).mean())


def test_one_target_each_is_the_plain_loss(backend: str) -> None:
    case = draw({"target", "relations", "limit"})
    several = case | {"target_offsets": torch.arange(rules.N + 1)}
    plain = evaluate(lambda c: fused(HF.info_nce, c, backend=backend), case)
    for what, got in evaluate(lambda c: fused(HF.info_nce, c, backend=backend), several).items():
        torch.testing.assert_close(got, plain[what], rtol=1e-9, atol=1e-11)


def test_rows_whose_positives_are_all_there_is(backend: str) -> None:
    query, key = torch.randn(2, 4, dtype=torch.float64).requires_grad_(), torch.randn(3, 4, dtype=torch.float64)
    target, offsets = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 3, 4])
    loss = HF.info_nce(query, key, target=target, target_offsets=offsets, reduction="none", backend=backend)
    loss.sum().backward()
    assert loss[0] == 0 and loss[1] > 0 and (query.grad[0] == 0).all() and not query.grad.isnan().any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": None}, "target: expected an int64 tensor, since target_offsets is given, got None"),
        ({"target": torch.arange(2)}, r"target: expected shape \(T,\), one for each of the 3 queries at least, got"),
        ({"target": torch.arange(4).float()}, "target: expected an int64 tensor"),
        ({"target": torch.tensor([0, 1, 2, 9])}, "target: expected indices of keys, 0 to 4, got values from 0 to 9"),
        ({"target_offsets": torch.tensor([0, 1, 2])}, r"target_offsets: expected shape \(4,\), one more than queries"),
        (
            {"target_offsets": torch.tensor([0, 1, 2, 3])},
            "target_offsets: expected offsets from 0 to the number of targets, 4",
        ),
        ({"target_offsets": torch.tensor([0, 3, 2, 4])}, "target_offsets: expected rising offsets, got 3 and then 2"),
        (
            {"target_offsets": torch.tensor([0, 2, 2, 4])},
            "target_offsets: expected at least 1 of the targets for each query, got 0 for query 1",
        ),
        ({"false_negative_margin": 0.1}, "false_negative_margin: expected None with target_offsets"),
        ({"false_negative_ratio": 0.9}, "false_negative_ratio: expected None with target_offsets"),
        ({"symmetric": True}, "symmetric: expected as many queries as keys and no target"),
        ({"mixing": HF.Mixing(1, torch.zeros(3, 1, 2).long())}, "mixing: expected None with target_offsets"),
        (
            {"query_group": torch.arange(3), "key_group": torch.arange(5), "same_group": "positive"},
            "target_offsets: expected None with same_group='positive'",
        ),
    ],
)
def test_what_several_targets_refuse(changes: Case, message: str, backend: str) -> None:
    right = {"target": torch.tensor([0, 1, 2, 3]), "target_offsets": torch.tensor([0, 2, 3, 4])}
    HF.info_nce(torch.randn(3, 4), torch.randn(5, 4), **right, backend=backend)
    with pytest.raises((TypeError, ValueError), match=message):
        HF.info_nce(torch.randn(3, 4), torch.randn(5, 4), **right | changes, backend=backend)


@pytest.mark.parametrize("excluded", ["target", "several targets"])
@pytest.mark.parametrize("name", ["negative", "positive"])
def test_one_upstream_gradient_alone(name: str, excluded: str, backend: str) -> None:
    refused = {"margin of false negatives", "ratio of false negatives"} if excluded == "target" else set()
    case = draw(set(OF_ROWS) - {"groups", "own negatives", excluded} - refused)

    def gradients(operator: object, of: Case) -> tuple[Tensor, ...]:
        leaves = {one: of[one].clone().requires_grad_() for one in rules.DIFFERENTIABLE if one in of}
        value = getattr(operator(of | leaves), name)  # type: ignore[operator]
        weights = torch.linspace(-1, 2, len(value)).double()
        return torch.autograd.grad(
            (value * weights).sum(), list(leaves.values()), materialize_grads=True, allow_unused=True
        )

    exact = gradients(lambda c: reference.log_sum_exp(**c), case)
    for got, expected in zip(gradients(lambda c: fused(HF.log_sum_exp, c, backend=backend), case), exact, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("weights", [(1e-30, 1), (1e-21, 1e21), (1e-12, 1), (1e12, 1), (1e21, 1e-21)])
def test_upstream_gradients_of_other_sizes(weights: tuple[float, float], backend: str) -> None:
    """Each part of the gradient keeps its digits, however small it is beside the other."""
    query, key, negatives = (torch.randn(5, 4, generator=torch.Generator().manual_seed(s)) for s in range(3))

    def gradients(operator: object, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in (query, key, negatives)]
        rows = operator(leaves[0], leaves[1], negatives=leaves[2])  # type: ignore[operator]
        return torch.autograd.grad((rows.negative * weights[0] + rows.positive * weights[1]).sum(), leaves)

    exact = gradients(reference.log_sum_exp, torch.float64)
    got = gradients(lambda *a, **k: HF.log_sum_exp(*a, **k, backend=backend), torch.float32)
    for one, expected in zip(got, exact, strict=True):
        assert relative_error(one, expected) < 1e-5


def test_far_positives_take_no_digits(backend: str) -> None:
    """Of float32, whose exponentials end at e^±88, with 1 / τ = 1000."""
    query = torch.nn.functional.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    key = torch.cat([query, -query + 0.1])
    exact = reference.log_sum_exp(query.double(), key.double(), temperature=0.001)
    got = HF.log_sum_exp(query, key, temperature=0.001, backend=backend)
    assert relative_error(got.negative, exact.negative) < 1e-6 and relative_error(got.positive, exact.positive) < 1e-6


@pytest.mark.parametrize(
    "rule", ["plain", "relations", "limit", "hard negatives", "own negatives", "no batch", "several targets"]
)
def test_twice(rule: str, backend: str) -> None:
    case = draw({rule} - {"plain"})
    names = [name for name in rules.DIFFERENTIABLE if name in case]

    def rows(*inputs: Tensor) -> Tensor:
        return torch.cat(fused(HF.log_sum_exp, case | dict(zip(names, inputs, strict=True)), backend=backend))

    inputs = [case[name].clone().requires_grad_() for name in names]
    first = torch.autograd.grad(rows(*inputs).square().sum(), inputs, create_graph=True)
    again = [x.detach().clone().requires_grad_() for x in inputs]
    plain = torch.cat(reference.log_sum_exp(**case | dict(zip(names, again, strict=True)))[:2])
    expected = torch.autograd.grad(plain.square().sum(), again, create_graph=True)
    got = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    for one, other in zip(got, torch.autograd.grad(sum(g.square().sum() for g in expected), again), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("rule", ["relations", "several targets"])
def test_forward_mode_and_functions(rule: str, backend: str) -> None:
    case = draw({"limit", rule})

    def total(query: Tensor) -> Tensor:
        rows = fused(HF.log_sum_exp, case | {"query": query}, backend=backend)
        return rows.negative.sum() + rows.positive.square().sum()

    (expected,) = torch.autograd.grad(total(query := case["query"].clone().requires_grad_()), query)
    torch.testing.assert_close(torch.func.grad(total)(case["query"]), expected)


@pytest.mark.parametrize(
    "names",
    [
        ("limit", "relations", "hard keys"),
        ("margin of false negatives",),
        ("own negatives", "limit"),
        ("no batch", "own negatives", "relations"),
        ("several targets", "own negatives"),
    ],
    ids=", ".join,
)
def test_compiled(names: tuple[str, ...], backend: str) -> None:
    case = rules.typed(draw(names), torch.float32)
    for operator in (HF.log_sum_exp, HF.info_nce):
        torch._dynamo.reset()
        compiled = torch.compile(lambda c: fused(operator, c, backend=backend), fullgraph=True, backend="aot_eager")  # noqa: B023
        eager = evaluate(lambda c: fused(operator, c, backend=backend), case)  # noqa: B023
        for what, got in evaluate(compiled, case).items():
            torch.testing.assert_close(got, eager[what])


@pytest.mark.parametrize(
    "names",
    [(), ("rows",), ("own negatives", "relations"), ("no batch", "own negatives"), ("several targets",)],
    ids=str,
)
def test_saved_tensors_are_unpacked_once(names: tuple[str, ...], backend: str) -> None:
    """As a checkpoint, which computes them again for one unpacking, and as hooks that move them to and fro."""
    case = draw(names)
    linear = torch.nn.Linear(rules.D, rules.D).double()

    def loss(query: Tensor) -> Tensor:
        rows = fused(HF.log_sum_exp, case | {"query": linear(query)}, backend=backend) if not names else None
        if rows is not None:
            return (rows.negative - rows.positive).sum()
        return fused(HF.info_nce, case | {"query": linear(query)}, backend=backend).sum()

    (expected,) = torch.autograd.grad(loss(case["query"]), linear.weight)
    (got,) = torch.autograd.grad(checkpoint(loss, case["query"], use_reentrant=False), linear.weight)
    torch.testing.assert_close(got, expected)
    counts = {"packed": 0, "unpacked": 0}

    def count(what: str) -> Any:
        def hook(x: Tensor) -> Tensor:
            counts[what] += 1
            return x

        return hook

    with torch.autograd.graph.saved_tensors_hooks(count("packed"), count("unpacked")):
        torch.autograd.grad(loss(case["query"]), linear.weight)
    assert counts["unpacked"] <= counts["packed"]


@pytest.mark.parametrize("place", [-1, 17, 99])
def test_targets_out_of_range_without_the_batch(place: int, backend: str) -> None:
    query, key, negatives = torch.randn(3, 4), torch.randn(17, 4), torch.randn(2, 4)
    target = torch.tensor([0, place, 2])
    with pytest.raises(ValueError, match="target: expected indices of keys, 0 to 16, got values from"):
        HF.info_nce(query, key, target=target, negatives=negatives, in_batch=False, backend=backend)


def test_registered_operator(backend: str) -> None:
    from hicl_fast.ops.info_nce.problem import Problem

    q, k = torch.randn(5, 4).requires_grad_(), torch.randn(6, 4).requires_grad_()
    problem = Problem(q, k, torch.tensor(20.0), limit=torch.full((5,), 0.3)).flat()
    torch.library.opcheck(torch.ops.hicl_fast.log_sum_exp.default, (*problem, backend))
    targets = {"targets": torch.arange(6), "target_offsets": torch.tensor([0, 1, 2, 3, 4, 6])}
    problem = Problem(q, k, torch.tensor(20.0), **targets).flat()
    torch.library.opcheck(torch.ops.hicl_fast.log_sum_exp.default, (*problem, backend))


def test_backward_again_and_autocast(backend: str) -> None:
    query, key = torch.randn(6, 5).requires_grad_(), torch.randn(6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        rows = HF.log_sum_exp(query, key, backend=backend)
    assert rows.negative.dtype == torch.float32
    (rows.negative - rows.positive).sum().backward(retain_graph=True)
    once = query.grad.clone()
    (rows.negative - rows.positive).sum().backward()
    torch.testing.assert_close(query.grad, 2 * once)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("operator", ["info_nce", "log_sum_exp"])
def test_no_matrix_of_all_pairs(operator: str, backend: str) -> None:
    """N = 16384 with everything on: one float32 matrix of all pairs is 1074 MB."""
    program = f"""
import torch, hicl_fast.functional as HF
q, k, n = (torch.randn(16384, 8).requires_grad_() for _ in range(3))
ids = torch.arange(16384)[:, None] // torch.tensor([2, 3])
def call(rows):
    c = lambda x: HF.Columns(x[rows], group=ids[rows], hardness=3.0)
    return HF.{operator}(q[rows], c(k), negatives=c(n), bank=c(n.detach()), query_group=ids[rows], limit=torch.rand(16384)[rows],
                         false_negative_margin=0.1, backend={backend!r})
def total(x):
    return x.sum() if isinstance(x, torch.Tensor) else (x.negative - x.positive).sum()
total(call(slice(0, 64))).backward()
open("/proc/self/clear_refs", "w").write("5")
status = lambda field: int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1]) // 1024
before = status("VmRSS")
total(call(slice(None))).backward()
print(status("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 300, f"{done.stdout} MB"
