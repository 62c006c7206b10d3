"""The drop-in against the installed open_clip."""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

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
    log_scale = torch.tensor(math.log(8.0), requires_grad=True)
    logit_bias = torch.tensor(-2.0, requires_grad=True) if bias else None
    value = loss(image, text, log_scale.exp(), *([logit_bias] if bias else []), **kw)
    value = value["contrastive_loss"] if isinstance(value, dict) else value
    (value * 1.3).backward()
    found = [value.detach(), image.grad, text.grad, log_scale.grad, *([logit_bias.grad] if bias else [])]
    assert all(x is not None for x in found)
    return found


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


@pytest.mark.parametrize("cache_labels", [False, True])
@pytest.mark.parametrize("gather_with_grad", [False, True])
@pytest.mark.parametrize("local_loss", [False, True])
def test_many_processes(
    local_loss: bool, gather_with_grad: bool, cache_labels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process 1 of 3 in one: the others' features are constants around its own."""
    before, own, after = features(n=4), features(n=5), features(n=6)
    before, own, after = ([x[:4] for x in part] for part in (before, own, after))

    def gather(
        image: Tensor, text: Tensor, local_loss: bool, gather_with_grad: bool, **_: Any
    ) -> tuple[Tensor, Tensor]:
        keeps = gather_with_grad or not local_loss
        mine = [x if keeps else x.detach() for x in (image, text)]
        both = [torch.cat(parts) for parts in zip(before, mine, after, strict=True)]
        return both[0], both[1]

    monkeypatch.setattr(original, "gather_features", gather)
    options = {"local_loss": local_loss, "gather_with_grad": gather_with_grad, "cache_labels": cache_labels}
    losses = [cls(**options, rank=1, world_size=3) for cls in (fused.ClipLoss, original.ClipLoss)]
    for _ in range(2):  # the second time with cached labels
        mine, theirs = (evaluate(loss, own) for loss in losses)
        assert_same(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_types(dtype: torch.dtype, autocast: bool) -> None:
    inputs = features(dtype=dtype, norm=1.0)
    exact = evaluate(original.ClipLoss(), [x.double() for x in inputs])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mine, theirs = evaluate(fused.ClipLoss(), inputs), evaluate(original.ClipLoss(), inputs)
    for got, plain, expected in zip(mine, theirs, exact, strict=True):
        assert got.dtype == plain.dtype
        error, allowed = ((x.double() - expected).norm() for x in (got, plain))
        # A similarity's rounding is a logit's times the scale of 8, on both sides of every sum.
        roundings = 4 * torch.finfo(got.dtype).eps + 32 * torch.finfo(torch.float32).eps
        assert error <= 2 * allowed + roundings * expected.norm()


def test_coca() -> None:
    logits, labels = (
        torch.randn(6, 4, 11, generator=torch.Generator().manual_seed(0)),
        torch.arange(24).reshape(6, 4) % 11,
    )
    losses = [cls(2.0, 1.5)(*features(), logits, labels, 8.0) for cls in (fused.CoCaLoss, original.CoCaLoss)]
    for mine, theirs in zip(*losses, strict=True):
        torch.testing.assert_close(mine, theirs)
