"""Calls of InfoNCE and of its row statistics with any of the rules, for tests of every backend.

A case is a call of the reference: its tensors and numbers by the reference's names. ``fused`` makes the library's call of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import hicl_fast.functional as HF
from hicl_fast import reference

Case = dict[str, Any]
N, M, D, P, B, E, H = 13, 17, 11, 13, 7, 3, 29
DIFFERENTIABLE = ("query", "key", "negatives", "own_negatives", "extra_logits", "temperature")
NEAR = 1e-4  # cosines that are nearer to a limit may fall either way


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _ids(generator: torch.Generator, case: Case, relations: int) -> None:
    """Groups of queries and of every kind of column that is there."""
    names = {"query_group": "query", "key_group": "key", "negatives_group": "negatives", "bank_group": "bank"}
    names["own_group"] = "own_negatives"
    for name, of in names.items():
        if of in case:
            shape = (len(case[of]), relations) if relations > 1 else (len(case[of]),)
            case[name] = torch.randint(0, 5 * relations, shape, generator=generator)


def _own(case: Case, g: torch.Generator) -> None:
    """Some queries have none, one has many."""
    offsets = torch.cat(
        [torch.tensor([0, 0]), torch.randint(0, H, (N - 2,), generator=g).sort().values, torch.tensor([H])]
    )
    case |= {"own_negatives": _randn(g, H, D), "own_offsets": offsets}


def _several_targets(case: Case, g: torch.Generator) -> None:
    """One or more each, one row has many, and a key may be named twice."""
    counts = torch.randint(1, 4, (N,), generator=g)
    counts[N // 2] = M
    target = torch.randint(0, M, (int(counts.sum()),), generator=g)
    offsets = torch.cat([torch.tensor([0]), counts.cumsum(0)])
    target[offsets[:-1]] = torch.arange(N)  # its own among them
    case |= {"target": target, "target_offsets": offsets}


# Each changes a case that has keys, explicit negatives, a bank and extra logits.
RULES: dict[str, Callable[[Case, torch.Generator], Any]] = {
    "limit": lambda case, g: case.update(limit=_randn(g, N) * 0.3 + 0.2),
    "margin of false negatives": lambda case, g: case.update(false_negative_margin=-0.1),
    "ratio of false negatives": lambda case, g: case.update(false_negative_ratio=0.8),
    "groups": lambda case, g: _ids(g, case, 1),
    "relations": lambda case, g: _ids(g, case, 3),
    "hard keys": lambda case, g: case.update(key_hardness=4.0),
    "hard negatives": lambda case, g: case.update(negatives_hardness=5.0),
    "hard bank": lambda case, g: case.update(bank_hardness=3.0),
    "own negatives": _own,
    "hard own negatives": lambda case, g: (_own(case, g), case.update(own_hardness=5.0)),
    "no batch": lambda case, g: case.update(in_batch=False),
    "own negatives' weight": lambda case, g: case.update(hard_negative_weight=0.7),
    "target": lambda case, g: case.update(target=torch.randint(0, M, (N,), generator=g)),
    "several targets": _several_targets,
    "angular margin": lambda case, g: case.update(margin=0.1),
    "symmetric": lambda case, g: case.update(symmetric=True, key=case["key"][:N]),
    "rows": lambda case, g: case.update(reduction="none"),
    "positives": lambda case, g: case.update(same_group="positive"),
}

# What can't be asked for together.
TOGETHER = (
    {"symmetric", "target"},
    {"several targets", "target"},
    {"several targets", "symmetric"},
    {"several targets", "margin of false negatives"},
    {"several targets", "ratio of false negatives"},
    {"several targets", "positives", "groups"},
    {"positives", "relations"},
    {"positives", "hard keys", "groups"},
    {"positives", "hard negatives", "groups"},
    {"positives", "hard bank", "groups"},
    {"positives", "own negatives' weight", "groups"},
    {"positives", "no batch", "groups"},
    {"positives", "own negatives", "groups"},
    {"positives", "hard own negatives", "groups"},
    {"own negatives", "hard own negatives"},
    {"groups", "relations"},
)
PAIRS = [pair for pair in itertools.combinations(RULES, 2) if not any(refused <= set(pair) for refused in TOGETHER)]


def draw(rules: Iterable[str], seed: int = 0, *, spread: float = 1.0) -> Case:
    """A case with these rules, no cosine of which is near a limit."""
    wanted = set(rules)
    assert not any(refused <= wanted for refused in TOGETHER)
    for attempt in itertools.count():
        generator = torch.Generator().manual_seed(1000 * seed + attempt)
        case: Case = {"query": _randn(generator, N, D), "key": _randn(generator, M, D) * spread}
        case["key"][:N] += case["query"]
        case |= {"negatives": _randn(generator, P, D), "bank": _randn(generator, B, D)}
        case |= {"extra_logits": 3 * _randn(generator, N, E), "temperature": torch.tensor(0.07, dtype=torch.float64)}
        for name in sorted(
            wanted, key=lambda name: (name in ("groups", "relations"), name)
        ):  # groups of all that is there
            RULES[name](case, generator)
        if _keeps_off_limits(case):
            return case
    raise AssertionError


def _keeps_off_limits(case: Case) -> bool:
    if case.get("symmetric") and not _keeps_off_limits(
        case | {"symmetric": False, "query": case["key"], "key": case["query"]}
    ):
        return False
    query = reference.normalise(case["query"])
    columns = [case[name] for name in ("key", "negatives", "bank", "own_negatives") if name in case]
    cosines = query @ reference.normalise(torch.cat(columns)).T
    limits = []
    if "target_offsets" not in case:
        positive = cosines.gather(1, case.get("target", torch.arange(N))[:, None])
        limits = [positive + case.get("false_negative_margin", 9), positive * case.get("false_negative_ratio", 9)]
    if "limit" in case:
        limits.append(case["limit"][:, None])
    return all(bool(((cosines - limit).abs() > NEAR).all()) for limit in limits)


def fused(operator: Callable[..., Any], case: Case, **options: Any) -> Any:
    """The library's call: groups and hardness stand with the columns."""
    arguments = dict(case)
    for name in ("key", "negatives", "bank"):
        rules = {"group": arguments.pop(f"{name}_group", None), "hardness": arguments.pop(f"{name}_hardness", 0.0)}
        if name in arguments:
            arguments[name] = HF.Columns(arguments[name], **rules)
    if "own_negatives" in arguments:
        names = {"own_offsets": "offsets", "own_group": "group", "own_hardness": "hardness"}
        rules = {new: arguments.pop(name) for name, new in names.items() if name in arguments}
        arguments["own_negatives"] = HF.OwnNegatives(arguments["own_negatives"], **rules)
    return operator(**arguments, **options)


def typed(case: Case, dtype: torch.dtype) -> Case:
    return {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and name != "temperature" else x
        for name, x in case.items()
    }


def evaluate(operator: Callable[[Case], Any], case: Case, upstream: float = 1.0) -> dict[str, Tensor]:
    """What it gives, and the gradient of every input, with upstream gradients that differ from number to number."""
    leaves = {name: case[name].detach().clone().requires_grad_() for name in DIFFERENTIABLE if name in case}
    outputs = operator(case | leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs[:2]
    total = sum(
        (x.masked_fill(x == -torch.inf, 0.0) * torch.linspace(0.5, 1.5 + i, x.numel()).double().reshape(x.shape)).sum()
        for i, x in enumerate(outputs)
    )
    gradients = torch.autograd.grad(total * upstream, list(leaves.values()))
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    return found | {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}


def _one_rounding_off(case: Case, eps: float) -> Case:
    def nudged(x: Tensor) -> Tensor:
        return x * (1 + (torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(3)) * 2 - 1) * eps)

    return case | {name: nudged(case[name]) for name in DIFFERENTIABLE if name in case}


def relative_error(got: Tensor, expected: Tensor) -> float:
    finite = expected != -torch.inf
    if not torch.equal(finite, got != -torch.inf):
        return torch.inf
    got, expected = got[finite].double(), expected[finite].double()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-9))


def assert_exact(name: str, case: Case, backend: str, dtype: torch.dtype) -> None:
    """Its errors against float64 are a few times those of the reference in the same type, or a few roundings.

    Of the result, or of the inputs where these matter more: a gradient whose terms cancel has as few digits as they leave.
    """
    plain, library = getattr(reference, name), getattr(HF, name)
    case = typed(case, dtype)
    upstream = 64.0 if dtype == torch.float16 else 1.0
    exact = evaluate(lambda c: plain(**c), typed(case, torch.float64), upstream)
    eager = evaluate(lambda c: plain(**c), case, upstream)
    got = evaluate(lambda c: fused(library, c, backend=backend), case, upstream)
    sum_eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    near = evaluate(lambda c: plain(**c), _one_rounding_off(typed(case, torch.float64), sum_eps), upstream)
    roundings = 8 * torch.finfo(dtype).eps + (32 + 8 / float(case["temperature"])) * sum_eps
    for what, expected in exact.items():
        allowed = 4 * (relative_error(eager[what], expected) + relative_error(near[what], expected)) + roundings
        if (
            what == "gradient of temperature"
        ):  # one number, a sum over rows of probability · similarity / τ² of both signs
            terms = exact["output 0"].numel() * upstream / float(case["temperature"]) ** 2
            allowed += 2 * sum_eps * terms / float(expected.abs())
        assert relative_error(got[what], expected) <= allowed, what
