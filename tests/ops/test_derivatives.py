"""Derivatives beyond the first, forward mode and torch.func, of every operator on every CPU backend, in float64.

What a gradient's own gradient is measured against: finite differences of the backend's first derivative, or, where the
equations hold something constant, the reference differentiated twice.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import hicl_fast
import hicl_fast.functional as HF
from hicl_fast import reference

BACKENDS = [s.name for s in hicl_fast.backends() if s.available and s.name in ("torch", "cpp")]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


GROUPS = {"query_group": torch.tensor([0, 0, 1, 2]), "key_group": torch.tensor([0, 0, 1, 1, 3])}
OFFSETS = torch.tensor([0, 1, 4])
PAIRS = torch.tensor([[[0, 1], [1, 0], [1, 1]]]).expand(4, 3, 2)
INDEX = torch.tensor([[0, 1], [4, 2], [3, 1], [2, 0]])

# Of query (4, 3), key (5, 3), negatives (4, 3), extra logits (4, 2) and a temperature.
INFO_NCE: dict[str, dict[str, Any]] = {
    "plain": {},
    "rows": {"reduction": "none"},
    "sum, margin": {"reduction": "sum", "margin": 0.2},
    "target, groups": {"target": torch.tensor([3, 1, 1, 0]), **GROUPS},
    "own group positive": {"same_group": "positive", **GROUPS},
    "own group negative, bank": {"same_group": "negative", "bank": rows(3, 3, seed=7), **GROUPS},
    "own negatives": {"hard_negative_weight": 0.5},
    "mixing": {"mixing": HF.Mixing(2, PAIRS, 0.3)},
    "mixing rows": {"mixing": HF.Mixing(2, PAIRS, 0.3), "reduction": "none"},
}


def info_nce_of(case: str, backend: str) -> Callable[..., Tensor]:
    options = INFO_NCE[case]

    def loss(query: Tensor, key: Tensor, negatives: Tensor, extra: Tensor, temperature: Tensor) -> Tensor:
        return HF.info_nce(
            query, key, negatives=negatives, extra_logits=extra, temperature=temperature, backend=backend, **options
        )

    return loss


def info_nce_inputs() -> tuple[Tensor, ...]:
    leaves = (rows(4, 3), rows(5, 3, seed=1), rows(4, 3, seed=2), rows(4, 2, seed=3), torch.tensor(0.6).double())
    return tuple(x.requires_grad_() for x in leaves)


@each_backend
@pytest.mark.parametrize("case", INFO_NCE)
def test_info_nce_twice(case: str, backend: str) -> None:
    assert torch.autograd.gradgradcheck(info_nce_of(case, backend), info_nce_inputs())


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("with_negatives", [False, True])
def test_symmetric_twice(with_negatives: bool, reduction: str, backend: str) -> None:
    def loss(query: Tensor, key: Tensor, negatives: Tensor) -> Tensor:
        more = {"negatives": negatives} if with_negatives else {}
        return HF.info_nce(query, key, symmetric=True, temperature=0.5, reduction=reduction, backend=backend, **more)

    assert torch.autograd.gradgradcheck(loss, tuple(rows(4, 3, seed=s).requires_grad_() for s in range(3)))


@each_backend
def test_the_other_operators_twice(backend: str) -> None:
    h, w = rows(4, 3).requires_grad_(), (rows(4, seed=1).abs() + 0.5).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda h, w: HF.segment_pool(h, OFFSETS, w, backend=backend), (h, w))
    assert torch.autograd.gradgradcheck(lambda h: HF.segment_pool(h, OFFSETS, backend=backend), (h,))
    query, bank, tau = rows(4, 3).requires_grad_(), rows(5, 3, seed=1).requires_grad_(), torch.tensor(0.3).double()

    def mixed(query: Tensor, bank: Tensor, tau: Tensor) -> Tensor:
        return HF.mixed_negative_logits(query, bank, INDEX, PAIRS, temperature=tau, backend=backend)

    assert torch.autograd.gradgradcheck(mixed, (query, bank, tau.requires_grad_()))
    for weights in ((1.0, 0.3), "search"):
        positives = rows(4, 3, seed=4).requires_grad_(), rows(4, 3, seed=5).requires_grad_()
        mix = lambda p, n: HF.positive_mixing(query.detach(), p, n, threshold=0.9, weights=weights).square()  # noqa: E731,B023
        assert torch.autograd.gradgradcheck(mix, positives)


def penalised(loss: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The gradient of a loss and of its own gradients' squares."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    first = torch.autograd.grad(value, leaves, create_graph=True)
    assert all(g.requires_grad for g in first)
    return torch.autograd.grad(value + 10 * sum(g.square().sum() for g in first), leaves)


def assert_as_in_reference(fused: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    for got, expected in zip(penalised(fused, *inputs), penalised(plain, *inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


PARADIGM: list[dict[str, Any]] = [
    *({"objective": name} for name in ("info_nce", "arccon", "mpt", "met", "mat", "mhe", "mhs")),
    {"objective": "custom", "weight": ("power", 1.5), "dissipation": 0.3, "ratio": "mat"},
    *({"objective": name, "modified": ("gd", "w", "r"), "ratio": 1.5} for name in ("mhe", "vicreg", "barlow_twins")),
    {"objective": "vicreg"},
    {"objective": "barlow_twins", "strength": 0.1},
]


@each_backend
@pytest.mark.parametrize("options", PARADIGM, ids=lambda o: " ".join(map(str, o.values())))
def test_paradigm_penalised(options: dict[str, Any], backend: str) -> None:
    u, v = rows(6, 4), rows(6, 4, seed=1)
    fused = lambda u, v: HF.paradigm(u, v, backend=backend, **options)  # noqa: E731
    assert_as_in_reference(fused, lambda u, v: reference.paradigm(u, v, **options), u, v)


@each_backend
def test_hicl_penalised(backend: str) -> None:
    loss = hicl_fast.FusedHiCLLoss(0.3, backend=backend)
    lengths = torch.tensor([5.0, 3.0, 8.0, 1.0], dtype=torch.float64)
    assert_as_in_reference(
        lambda x, y: loss(x, y, OFFSETS, lengths),
        lambda x, y: reference.hicl_loss(x, y, OFFSETS, lengths, temperature=0.3),
        rows(4, 3),
        rows(4, 3, seed=1),
    )


@each_backend
def test_third_derivatives(backend: str) -> None:
    key = rows(4, 3, seed=1)

    def third(loss: Callable[..., Tensor]) -> Tensor:
        query = rows(4, 3).requires_grad_()
        value = loss(query, key, temperature=0.5)
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, query, create_graph=True)
            value = gradient.square().sum()
        return gradient

    torch.testing.assert_close(third(lambda *a, **k: HF.info_nce(*a, **k, backend=backend)), third(reference.info_nce))


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_tensor_as_query_and_key(reduction: str, backend: str) -> None:
    assert_as_in_reference(
        lambda x: HF.info_nce(x, x, temperature=0.5, reduction=reduction, backend=backend).sum(),
        lambda x: reference.info_nce(x, x, temperature=0.5, reduction=reduction).sum(),
        rows(5, 3),
    )


@each_backend
def test_backward_with_create_graph(backend: str) -> None:
    query, key = rows(4, 3).requires_grad_(), rows(4, 3, seed=1)
    HF.info_nce(query, key, backend=backend).backward(create_graph=True)
    assert query.grad is not None and query.grad.requires_grad
    (second,) = torch.autograd.grad(query.grad.sum(), query)
    exact = hessian(lambda q: reference.info_nce(q, key))(query.detach()).sum(dim=(0, 1))
    torch.testing.assert_close(second, exact)


def test_half_precision_and_autocast() -> None:
    """Second derivatives have the input's type and aren't rounded by autocast on their way."""
    query, key = rows(6, 8).bfloat16(), rows(6, 8, seed=1).bfloat16()
    exact = penalised(lambda q: reference.info_nce(q, key.double()), query.double())[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = penalised(lambda q: HF.info_nce(q, key), query)[0]
    assert got.dtype == torch.bfloat16
    assert float((got.double() - exact).norm() / exact.norm()) < 2e-2


def test_inputs_changed_in_place() -> None:
    """The first derivative doesn't look at the inputs again; the second does, and says so."""
    query, key, bank = rows(4, 3).requires_grad_(), rows(4, 3, seed=1), rows(6, 3, seed=2)
    expected = torch.autograd.grad(HF.info_nce(query, key, bank=bank), query)[0]
    loss = HF.info_nce(query, key, bank=bank)
    bank.zero_()  # MoCo's queue moves on before the backward pass
    torch.testing.assert_close(torch.autograd.grad(loss, query, retain_graph=True)[0], expected)
    with pytest.raises(RuntimeError, match="changed in place"):
        torch.autograd.grad(loss, query, create_graph=True)


def test_memory_of_a_graph_that_was_kept_is_the_callers() -> None:
    query, key = rows(4, 3).requires_grad_(), rows(4, 3, seed=1)  # one use of query: nothing is added to its gradient
    for loss in (HF.info_nce(query, key), HF.paradigm(query, key, "mhe")):
        (first,) = torch.autograd.grad(loss, query, retain_graph=True)
        expected = first.clone()
        first.zero_()
        (second,) = torch.autograd.grad(loss, query)
        torch.testing.assert_close(second, expected)


def test_inputs_are_let_go_of_with_the_graph() -> None:
    query = rows(4, 3).requires_grad_()
    loss = HF.info_nce(query, rows(4, 3, seed=1))
    loss.backward()
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss, query, create_graph=True)
    assert loss.grad_fn.again._call is None


# --- forward mode and torch.func -------------------------------------------------------------------------------------

Q, K, Q2 = rows(4, 3), rows(4, 3, seed=1), rows(2, 4, 3, seed=2)
TAU = torch.tensor(0.3, dtype=torch.float64)
TARGETS = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])
TRANSFORMS: dict[str, Callable[[Any], Tensor]] = {
    "jvp": lambda F: jvp(lambda q: F.info_nce(q, K), (Q,), (K,))[1],
    "jvp of temperature": lambda F: jvp(lambda t: F.info_nce(Q, K, temperature=t), (TAU,), (torch.ones_like(TAU),))[1],
    "jvp of rows": lambda F: jvp(lambda q: F.info_nce(q, K, reduction="none"), (Q,), (K,))[1],
    "jacfwd of paradigm": lambda F: jacfwd(lambda q: F.paradigm(q, K, "arccon"))(Q),
    "jacfwd of mhe": lambda F: jacfwd(lambda q: F.paradigm(q, K, "mhe"))(Q),
    "jacfwd of pool": lambda F: jacfwd(lambda q: F.segment_pool(q, OFFSETS))(Q),
    "jvp of mixtures": lambda F: jvp(lambda b: F.mixed_negative_logits(Q, b, INDEX.clamp(max=3), PAIRS), (K,), (Q,))[1],
    "grad": lambda F: grad(lambda q: F.info_nce(q, K, negatives=q + 1))(Q),
    "grad of paradigm": lambda F: grad(lambda q: F.paradigm(q, K, "vicreg"))(Q),
    "jacrev": lambda F: jacrev(lambda q: F.info_nce(q, K, reduction="none"))(Q),
    "hessian": lambda F: hessian(lambda q: F.info_nce(q, K, symmetric=True))(Q),
    "vmap": lambda F: vmap(lambda q: F.info_nce(q, K))(Q2),
    "vmap of targets": lambda F: vmap(lambda t: F.info_nce(Q, K, target=t))(TARGETS),
    "vmap of pool": lambda F: vmap(lambda q: F.segment_pool(q, OFFSETS))(Q2),
    "vmap of paradigm": lambda F: vmap(lambda q: F.paradigm(q, K, "mhe"))(Q2),
    "vmap of hard negatives": lambda F: vmap(lambda q: F.hard_negatives(q, K, 2)[0])(Q2),
    "gradients of samples": lambda F: vmap(grad(lambda q: F.info_nce(q, K)))(Q2),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str) -> None:
    torch.testing.assert_close(TRANSFORMS[name](HF), TRANSFORMS[name](reference))


def test_vmap_of_positive_mixing() -> None:
    """Whose reference goes row by row, which vmap can't."""
    for weights in ((0.9, 0.2), "search"):
        mix = lambda q: HF.positive_mixing(q, K, Q, threshold=0.9, weights=weights)  # noqa: E731,B023
        torch.testing.assert_close(vmap(mix)(Q2), torch.stack([mix(q) for q in Q2]))


@pytest.mark.parametrize("name", ["jvp", "grad", "vmap"])
def test_transforms_of_compiled_code_and_in_it(name: str) -> None:
    loss, plain = lambda q: HF.info_nce(q, K), lambda q: reference.info_nce(q, K)  # noqa: E731
    transform = {
        "jvp": lambda f: lambda q: jvp(f, (q,), (K,))[1],
        "grad": grad,
        "vmap": lambda f: lambda q: vmap(f)(q[None]),
    }[name]
    expected = transform(plain)(Q)
    torch.testing.assert_close(torch.compile(transform(loss), backend="aot_eager")(Q), expected)
    torch.testing.assert_close(transform(torch.compile(loss, backend="aot_eager"))(Q), expected)


def test_dual_numbers() -> None:
    (_, tangent), compiled = (
        jvp(lambda q: reference.info_nce(q, K), (Q,), (K,)),
        torch.compile(HF.info_nce, backend="eager"),
    )
    for loss in (HF.info_nce, compiled):
        with forward_ad.dual_level():
            got = loss(forward_ad.make_dual(Q, K), K)
            torch.testing.assert_close(forward_ad.unpack_dual(got).tangent, tangent)
            assert forward_ad.unpack_dual(HF.info_nce(Q, K)).tangent is None


def test_a_module_under_a_transform() -> None:
    module = hicl_fast.FusedInfoNCELoss(learnable_temperature=True).double()
    parameters = {name: x.detach() for name, x in module.named_parameters()}
    found = grad(lambda p: functional_call(module, p, (Q, K)))(parameters)
    module(Q, K).backward()
    torch.testing.assert_close(found["temperature.log_scale"], module.temperature.log_scale.grad)
    assert all(torch.isfinite(x) for x in module.last.values())


# --- modes that an earlier call was in -------------------------------------------------------------------------------

IN_TURN = """
import os, torch, hicl_fast, hicl_fast.functional as HF
from torch._subclasses import FakeTensorMode

def attempt():
    x = torch.ones(2, 2)
    HF.info_nce(x, x), HF.paradigm(x, x, "info_nce"), HF.positive_mixing(x, x, x, weights="search")
    torch.func.vmap(lambda x: HF.positive_mixing(x, x, x, weights="search"))(x[None])

def step():
    q = torch.randn(6, 8, requires_grad=True)
    k = q.detach().flip(0)
    loss = HF.info_nce(q, k, reduction="none").sum() + HF.info_nce(q, k) + HF.paradigm(q, k, "info_nce")
    (loss + HF.positive_mixing(q, q, k, weights="search").sum()).backward()
    assert torch.isfinite(q.grad).all()

for mode in (torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta")):
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, mode
        continue
    with mode:
        try:
            attempt()
        except Exception:  # whether a mode can do it is another question
            pass
    step()
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork: every mode must be a process's first")
def test_no_call_leaves_its_mode_to_the_next() -> None:
    """What is kept between calls must not be of the first caller's mode."""
    subprocess.run([sys.executable, "-c", IN_TURN], check=True, timeout=300)


EXPORTED = """
import io, sys, torch, hicl_fast
from hicl_fast import functional as HF

class Loss(torch.nn.Module):
    def forward(self, q, k):
        return HF.info_nce(q, k) + HF.segment_pool(q, torch.tensor([0, 2, 4])).sum() + HF.paradigm(q, k, "mhe")

generator = torch.Generator().manual_seed(0)
inputs = tuple(torch.randn(4, 3, generator=generator) for _ in range(2))
if sys.argv[1] == "save":
    torch.export.save(torch.export.export(Loss(), inputs, strict=sys.argv[3] == "strict"), sys.argv[2])
else:
    program = torch.export.load(sys.argv[2])
    assert "hicl_fast_cpp" not in program.graph_module.code, "a question about the processor is in the graph"
    torch.testing.assert_close(program.module()(*inputs), Loss()(*inputs))
"""


@pytest.mark.slow
@pytest.mark.parametrize("strict", ["strict", "not strict"])
def test_an_exported_program_runs_in_a_fresh_process(strict: str, tmp_path: Path) -> None:
    """Export is the first process's first use of a backend, the loaded program's call the second's."""
    for what in ("save", "load"):
        subprocess.run(
            [sys.executable, "-c", EXPORTED, what, str(tmp_path / "loss.pt2"), strict], check=True, timeout=300
        )


def test_what_is_compiled_refuses_to_be_differentiated_twice() -> None:
    query = rows(4, 3).requires_grad_()
    loss = torch.compile(lambda q: HF.info_nce(q, K), backend="aot_eager")(query)
    with pytest.raises(RuntimeError, match="double backward"):
        (gradient,) = torch.autograd.grad(loss, query, create_graph=True)
        gradient.sum().backward()


def test_compiling_warns_of_no_cache() -> None:
    """Dynamo warns of "silent incorrectness", in every graph, where it traces through a function that keeps results."""
    torch._dynamo.reset()
    losses = [
        hicl_fast.FusedInfoNCELoss(hard_negative_mixing=hicl_fast.HardNegativeMixing(2, 3), queue_size=4),
        hicl_fast.FusedInfoNCELoss(
            learnable_temperature=True, positive_mixing=hicl_fast.PositiveMixing(weights="search")
        ),
        hicl_fast.FusedHiCLLoss(),
        hicl_fast.GradientParadigmLoss("custom"),
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache.*")
        for loss in losses:
            torch.compile(loss, backend="aot_eager")(rows(4, 3).requires_grad_(), K).backward()
