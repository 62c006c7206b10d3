"""The drop-in against the installed open_clip, on one process and between real ones."""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel

import hicl_fast
from tests.distributed.cluster import Cluster, RankError

spec = importlib.util.find_spec("open_clip")
if spec is None:
    pytest.skip("needs open_clip", allow_module_level=True)
if importlib.util.find_spec("torchvision") is None:
    # The package's models need torchvision, its losses don't.
    sys.modules["open_clip"] = types.ModuleType("open_clip")
    sys.modules["open_clip"].__path__ = list(spec.submodule_search_locations or [])
    from hicl_fast.integrations import open_clip as fused

    del sys.modules["open_clip"]
else:
    from hicl_fast.integrations import open_clip as fused

original = fused.original


def features(n: int = 6, d: int = 10, dtype: torch.dtype = torch.float64, norm: float | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    base = torch.randn(n, d, generator=generator, dtype=torch.float64)
    both = [base + torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2)]
    if norm is not None:
        both = [norm * x / x.norm(dim=1, keepdim=True) for x in both]
    return [x.to(dtype) for x in both]


def evaluate(loss: Any, inputs: list[Tensor], *, bias: bool = False, **kw: Any) -> list[Tensor]:
    """The loss, and the gradients of both features, of CLIP's learned scale and of the bias."""
    image, text = (x.clone().requires_grad_() for x in inputs)
    dtype = torch.promote_types(image.dtype, torch.float32)
    log_scale = torch.tensor(math.log(8.0), dtype=dtype, requires_grad=True)
    logit_bias = torch.tensor(-2.0, dtype=dtype, requires_grad=True) if bias else None
    value = loss(image, text, log_scale.exp(), *([logit_bias] if bias else []), **kw)
    value = value["contrastive_loss"] if isinstance(value, dict) else value
    (value * 1.3).backward()
    found = [value.detach(), image.grad, text.grad, log_scale.grad, *([logit_bias.grad] if bias else [])]
    assert all(x is not None for x in found)
    return found


def assert_no_worse(mine: list[Tensor], theirs: list[Tensor], exact: list[Tensor]) -> None:
    """At most twice the error of the original in the same type."""
    for got, plain, expected in zip(mine, theirs, exact, strict=True):
        assert got.dtype == plain.dtype
        error, allowed = ((x.double() - expected).norm() for x in (got, plain))
        # A similarity's rounding is a logit's times the scale of 8, on both sides of every sum.
        roundings = 4 * torch.finfo(got.dtype).eps + 32 * torch.finfo(torch.float32).eps
        assert error <= 2 * allowed + roundings * expected.norm()


def assert_same(mine: list[Tensor], theirs: list[Tensor], **tolerance: float) -> None:
    for got, expected in zip(mine, theirs, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [1.0, None, 1e-3], ids=["normalised", "any length", "short"])
def test_one_process(norm: float | None, bias: bool) -> None:
    inputs = features(norm=norm)
    expected = evaluate(original.ClipLoss(), inputs, bias=bias)
    assert_same(evaluate(fused.ClipLoss(), inputs, bias=bias), expected, rtol=1e-5, atol=1e-7)
    assert_same(evaluate(fused.ClipLoss(), inputs, bias=bias, output_dict=True), expected, rtol=1e-5, atol=1e-7)
    assert set(fused.ClipLoss()(*inputs, 8.0, output_dict=True)) == {"contrastive_loss"}
    torch.testing.assert_close(fused.ClipLoss()(*inputs, 8.0), original.ClipLoss()(*inputs, 8.0))


def test_zero_features() -> None:
    image, text = features()
    image[2] = 0.0
    for inputs in ([image, text], [image * 0, text], [image * 0, text * 0]):
        mine, theirs = evaluate(fused.ClipLoss(), inputs), evaluate(original.ClipLoss(), inputs)
        assert_same(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_types(dtype: torch.dtype, autocast: bool) -> None:
    inputs = features(dtype=dtype, norm=1.0)
    exact = evaluate(original.ClipLoss(), [x.double() for x in inputs])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mine, theirs = evaluate(fused.ClipLoss(), inputs), evaluate(original.ClipLoss(), inputs)
    assert_no_worse(mine, theirs, exact)


def test_coca() -> None:
    logits, labels = (
        torch.randn(6, 4, 11, generator=torch.Generator().manual_seed(0)),
        torch.arange(24).reshape(6, 4) % 11,
    )
    losses = [cls(2.0, 1.5)(*features(), logits, labels, 8.0) for cls in (fused.CoCaLoss, original.CoCaLoss)]
    for mine, theirs in zip(*losses, strict=True):
        torch.testing.assert_close(mine, theirs)


COUNTS = (4, 4, 6, 1)  # rows of each process, step by step: cached labels are used again, and replaced

SIZES = pytest.mark.parametrize("size", [2, 3], ids=lambda size: f"{size} processes")
GATHERING = pytest.mark.parametrize(
    "options",
    [{"local_loss": local, "gather_with_grad": grad} for local in (False, True) for grad in (False, True)],
    ids=lambda options: ", ".join(name for name, on in options.items() if on) or "plain",
)


def own_rows(rank: int, size: int, count: int, dtype: torch.dtype) -> list[Tensor]:
    """The same numbers in every type."""
    return [x[rank * count :][:count].to(dtype) for x in joined_rows(size, count)]


def joined_rows(size: int, count: int) -> list[Tensor]:
    return features(n=size * count, dtype=torch.float32, norm=1.0)


def steps_on_rank(
    rank: int, size: int, fuse: bool, dtype: torch.dtype, cache_labels: bool, bias: bool, options: dict[str, bool]
) -> list[list[Tensor]]:
    cls = (fused if fuse else original).ClipLoss
    loss = cls(**options, cache_labels=cache_labels, rank=rank, world_size=size)
    return [
        evaluate(loss, own_rows(rank, size, count, dtype), bias=bias, output_dict=step % 2 == 1)
        for step, count in enumerate(COUNTS)
    ]


@SIZES
@GATHERING
@pytest.mark.parametrize(
    ("bias", "cache_labels"), [(False, False), (True, True)], ids=["scale alone", "bias, cache_labels"]
)
def test_processes(
    clusters: Callable[[int], Cluster], size: int, options: dict[str, bool], bias: bool, cache_labels: bool
) -> None:
    def run(fuse: bool, dtype: torch.dtype) -> list[list[Tensor]]:
        ranks = clusters(size).run(steps_on_rank, fuse, dtype, cache_labels, bias, options)
        return [step for steps in ranks for step in steps]

    exact = run(False, torch.float64)
    for got, expected in zip(run(True, torch.float64), exact, strict=True):
        assert_same(got, expected, rtol=1e-10, atol=1e-12)
    for results in zip(run(True, torch.float32), run(False, torch.float32), exact, strict=True):
        assert_no_worse(*results)


class TwoTowers(nn.Module):
    """What open_clip's models give their loss: normalised features, the scale and the bias."""

    def __init__(self, lock_image: bool, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = (nn.Sequential(nn.Linear(10, 7), nn.Tanh(), nn.Linear(7, 5)) for _ in range(2))
        self.logit_scale = nn.Parameter(torch.tensor([math.log(8.0)]))  # one row: nonscalar_logit_scale
        self.logit_bias = nn.Parameter(torch.tensor([-2.0]))
        self.to(dtype)
        self.image.requires_grad_(not lock_image)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        towers = F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1)
        return *towers, self.logit_scale.exp(), self.logit_bias


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return found


def trained_on_rank(
    rank: int, size: int, fuse: bool, dtype: torch.dtype, lock_image: bool, options: dict[str, bool]
) -> list[list[Tensor]]:
    """Each step's loss and averaged gradients."""
    model = DistributedDataParallel(TwoTowers(lock_image, dtype))
    loss = (fused if fuse else original).ClipLoss(**options, cache_labels=True, rank=rank, world_size=size)
    steps = []
    for count in COUNTS:
        value = loss(*model(*own_rows(rank, size, count, dtype)))
        value.backward()
        steps.append([value.detach(), *gradients(model)])
    return steps


def trained_on_joined_batches(size: int, lock_image: bool) -> list[list[Tensor]]:
    """Each step's gradients of one process with the joined batch, by the formula, in which the bias cancels."""
    model = TwoTowers(lock_image, torch.float64)
    steps = []
    for count in COUNTS:
        image, text, scale, _ = model(*(x.double() for x in joined_rows(size, count)))
        logits = scale * image @ text.T
        loss = -(logits.log_softmax(dim=0).diag() + logits.log_softmax(dim=1).diag()).mean() / 2
        loss.backward()
        model.logit_bias.grad = torch.zeros_like(model.logit_bias)
        steps.append(gradients(model))
    return steps


@SIZES
@GATHERING
@pytest.mark.parametrize("lock_image", [False, True], ids=["both towers", "locked image tower"])
def test_distributed_data_parallel(
    clusters: Callable[[int], Cluster], size: int, options: dict[str, bool], lock_image: bool
) -> None:
    def run(fuse: bool, dtype: torch.dtype) -> list[list[Tensor]]:
        ranks = clusters(size).run(trained_on_rank, fuse, dtype, lock_image, options)
        return [step for steps in ranks for step in steps]

    mine, exact = run(True, torch.float64), run(False, torch.float64)
    for got, expected in zip(mine, exact, strict=True):
        assert_same(got, expected, rtol=1e-10, atol=1e-12)
    for results in zip(run(True, torch.float32), run(False, torch.float32), exact, strict=True):
        assert_no_worse(*results)
    if options["gather_with_grad"]:
        for got, expected in zip(mine, trained_on_joined_batches(size, lock_image) * size, strict=True):
            assert_same(got[1:], expected, rtol=1e-10, atol=1e-12)


UNEQUAL = (4, 1, 3)


def unequal_rows(rank: int | None = None) -> list[Tensor]:
    both = features(n=sum(UNEQUAL), norm=1.0)
    return both if rank is None else [x.split(UNEQUAL)[rank] for x in both]


def unequal_on_rank(rank: int, size: int, options: dict[str, bool]) -> list[Tensor]:
    """The loss and DDP's averaged gradients, then those of the features themselves."""
    model = DistributedDataParallel(TwoTowers(False, torch.float64))
    loss = fused.ClipLoss(**options, cache_labels=True, rank=rank, world_size=size)
    value = loss(*model(*unequal_rows(rank)))
    value.backward()
    return [value.detach(), *gradients(model), *evaluate(loss, unequal_rows(rank), bias=True)[1:3]]


@GATHERING
def test_unequal_processes(clusters: Callable[[int], Cluster], options: dict[str, bool]) -> None:
    """The mean over the processes is the joined batch's loss; with gather_with_grad its gradients are."""
    ranks = clusters(3).run(unequal_on_rank, options)
    model = TwoTowers(False, torch.float64)
    loss = original.ClipLoss()(*model(*unequal_rows()))
    loss.backward()
    torch.testing.assert_close(torch.stack([found[0] for found in ranks]).mean(), loss.detach())
    if not options["local_loss"]:
        assert all(torch.equal(found[0], ranks[0][0]) for found in ranks)
    if options["gather_with_grad"]:
        for found in ranks:
            assert_same(found[1:-2], gradients(model) if found is ranks[0] else ranks[0][1:-2], rtol=1e-10, atol=1e-12)
    if options["gather_with_grad"] or not options["local_loss"]:
        whole = evaluate(original.ClipLoss(), unequal_rows(), bias=True)[1:3]
        divisor = 3 if options["gather_with_grad"] else 1  # of the sum over the processes; else of the own loss alone
        for place, expected in zip((-2, -1), whole, strict=True):
            assert_same([torch.cat([found[place] for found in ranks]) / divisor], [expected], rtol=1e-10, atol=1e-12)


def bad_on_rank(rank: int, size: int, options: dict[str, Any]) -> list[Tensor]:
    return evaluate(fused.ClipLoss(**{"rank": rank, "world_size": size, **options}), unequal_rows(rank))


def mixed_up_on_rank(rank: int, size: int) -> list[Tensor]:
    return bad_on_rank(rank, size, {"local_loss": rank == 0})


def test_what_processes_are_refused(clusters: Callable[[int], Cluster]) -> None:
    with pytest.raises(RankError, match="world_size: expected 3, as the process group has it, got 4"):
        clusters(3).run(bad_on_rank, {"world_size": 4})
    with pytest.raises(RankError, match="rank 0: local_loss True\n.*rank 1: local_loss False"):
        clusters(3).run(mixed_up_on_rank)
    with pytest.raises(ValueError, match="rank: expected 0 to 1, below world_size, got 2"):
        fused.ClipLoss(rank=2, world_size=2)
    with pytest.raises(TypeError, match="world_size: expected a whole number"):
        fused.CoCaLoss(2.0, 1.0, world_size=1.5)


def kept_on_rank(rank: int, size: int, fuse: bool, count: int, options: dict[str, bool]) -> int:
    """The number of elements of the largest tensor that the graph keeps."""
    kept = [0]

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    loss = (fused if fuse else original).ClipLoss(**options, rank=rank, world_size=size)
    with saved_tensors_hooks(keep, lambda x: x):
        evaluate(loss, own_rows(rank, size, count, torch.float32))
    return max(kept)


@GATHERING
def test_no_matrix_of_logits(clusters: Callable[[int], Cluster], options: dict[str, bool]) -> None:
    if not any(status.name == "cpp" and status.available for status in hicl_fast.backends()):
        pytest.skip("the largest block of the backend torch holds a small batch's whole matrix")
    count = 100
    matrix = count * 2 * count  # local_loss: own rows against all
    for mine, theirs in zip(
        *(clusters(2).run(kept_on_rank, fuse, count, options) for fuse in (True, False)), strict=True
    ):
        assert 0 < mine <= matrix / 5 < matrix <= theirs
