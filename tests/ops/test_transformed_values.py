"""Values of arguments are checked under torch.func as they are in an ordinary call."""

from __future__ import annotations

import pytest
import torch

from hicl_fast import functional as HF
from hicl_fast.losses import FusedHiCLLoss
from hicl_fast.ops.segment_pool import torch as chunked_segment_pool

Q, K = (torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
CROWDED = torch.tensor([0, 0, 0, 1])  # the first rows have one key outside their group
BEHIND = torch.full((4, 2, 2), -1)
FALLING = torch.tensor([0, 1000, 4])
GROUPS = {"query_group": CROWDED, "key_group": CROWDED}

CALLS = {
    "temperature": lambda q: HF.info_nce(q, K, temperature=torch.tensor(-1.0)),
    "temperature of mixtures": lambda q: HF.mixed_negative_logits(
        q, K, torch.ones(4, 2, dtype=torch.int64), torch.zeros_like(BEHIND), temperature=torch.tensor(-1.0)
    ),
    "target": lambda q: HF.info_nce(q, K, target=torch.tensor([0, 1, 2, -1])),
    "target of hard negatives": lambda q: HF.hard_negatives(q, K, 1, target=torch.tensor([0, 1, 2, 9]))[0],
    "pairs": lambda q: HF.info_nce(q, K, mixing=HF.Mixing(3, BEHIND)),
    "k": lambda q: HF.info_nce(q, K, mixing=HF.Mixing(3, torch.zeros_like(BEHIND)), **GROUPS),
    "k of hard negatives": lambda q: HF.hard_negatives(q, K, 3, **GROUPS)[0],
    "index": lambda q: HF.mixed_negative_logits(q, K, BEHIND[:, 0], torch.zeros_like(BEHIND)),
    "offsets": lambda q: HF.segment_pool(q, FALLING),
    "offsets of a loss": lambda q: FusedHiCLLoss(pooling="mean")(q, K, FALLING),
    "weights": lambda q: HF.segment_pool(q, torch.tensor([0, 2, 4]), torch.tensor([1.0, -1.0, 1.0, 1.0])),
}


@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("transform", ["none", "grad", "vmap", "vmap of grad"])
def test_values_are_refused(what, transform):
    call = CALLS[what]
    gradient = torch.func.grad(lambda q: call(q).sum())
    run = {"none": call, "grad": gradient, "vmap": torch.func.vmap(call), "vmap of grad": torch.func.vmap(gradient)}
    argument = what.split()[0]
    with pytest.raises(ValueError, match=f"^{argument}: "):
        run[transform](torch.stack([Q, Q + 1]) if "vmap" in transform else Q)


def test_one_bad_temperature_of_a_batch_is_refused():
    with pytest.raises(ValueError, match="temperature: expected a number above 0"):
        torch.func.vmap(lambda tau: HF.info_nce(Q, K, temperature=tau))(torch.tensor([0.1, -0.1]))


@pytest.mark.parametrize("offsets", [[0, 100_000, 4], [4, 2, 0], [0, 0, 0]])
def test_unchecked_offsets_write_nowhere(offsets):
    """As those of a device are."""
    try:
        pooled_grad = chunked_segment_pool.backward(Q, torch.tensor(offsets), None, torch.ones(2, 5), [True, False])[0]
    except (IndexError, RuntimeError):
        return
    assert pooled_grad.shape == Q.shape
