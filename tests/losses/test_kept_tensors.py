"""What a loss keeps from a call is of use afterwards, whatever mode the call was in."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from hicl_fast import FusedHiCLLoss, FusedInfoNCELoss, GradientParadigmLoss, HardNegativeMixing, PositiveMixing

Q, K = (torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
OFFSETS, LENGTHS = torch.tensor([0, 1, 2, 4]), torch.ones(4)


def previous(**options):
    mixing = HardNegativeMixing(2, 3, bank="previous", queue_size=8, seed=0)
    return FusedInfoNCELoss(0.5, hard_negative_mixing=mixing, **options)


LOSSES = {
    "queue": lambda: FusedInfoNCELoss(0.5, queue_size=6),
    "rows": lambda: FusedInfoNCELoss(0.5, queue_size=6, reduction="none"),
    "temperature": lambda: FusedInfoNCELoss(0.5, learnable_temperature=True),
    "mixing": lambda: FusedInfoNCELoss(
        0.5, hard_negative_mixing=HardNegativeMixing(2, 3, seed=0), positive_mixing=PositiveMixing()
    ),
    "previous": previous,
    "rows of previous": lambda: previous(reduction="none"),
    "hicl": lambda: FusedHiCLLoss(0.5, queue_size=3),
    "paradigm": lambda: GradientParadigmLoss("mhe", log_gradient_terms=True),
}


def scored(loss_fn, q, k):
    sequences = (OFFSETS, LENGTHS) if isinstance(loss_fn, FusedHiCLLoss) else ()
    return loss_fn(q, k, *sequences).sum()


def train(loss_fn):
    query = Q.clone().requires_grad_()
    scored(loss_fn, query, K).backward()
    return query.grad


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("mode", ["grad", "hessian", "inference"])
def test_training_goes_on(name, mode):
    loss_fn, plain = LOSSES[name](), LOSSES[name]()
    for _ in range(2):
        scored(plain, Q, Q + 1)
        if mode == "inference":
            with torch.inference_mode():
                scored(loss_fn, Q, Q + 1)
        else:
            transform = torch.func.grad if mode == "grad" else torch.func.hessian
            transform(lambda q: scored(loss_fn, q, q + 1))(Q)

    logged, expected = copy.deepcopy(loss_fn).last, plain.last
    assert logged.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(logged[name], expected[name])
    torch.save(loss_fn.state_dict(), io.BytesIO())
    torch.testing.assert_close(train(loss_fn), train(plain))


def test_a_queue_refuses_a_batch_of_batches():
    loss_fn = FusedInfoNCELoss(queue_size=6)
    with pytest.raises(ValueError, match="rows: expected a tensor of shape"):
        torch.func.vmap(lambda q: loss_fn(q, q + 1))(torch.stack([Q, K]))
    assert len(loss_fn.queue) == 0
    train(loss_fn)
