"""What goes over the wire, against the formulas of docs/distributed.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hicl_fast import FusedInfoNCELoss
from hicl_fast.distributed import gathering
from tests.distributed.cluster import Cluster

ROWS, WIDTH = 64, 32


def sent_on_rank(rank: int, size: int, gather: Any, dtype: torch.dtype) -> dict[str, int]:
    """Payload bytes that this rank sends forward and backward."""
    sent = 0
    patch = pytest.MonkeyPatch()

    def count(tensor: Tensor, times: int) -> None:
        nonlocal sent
        if tensor.dim() == 2:  # neither the header nor the log
            sent += tensor.numel() * tensor.element_size() * times

    all_gather, reduce_scatter = gathering.all_gather_single, gathering.reduce_scatter_single
    batch, send = dist.batch_isend_irecv, dist.isend

    def counted_all_gather(output: Tensor, own: Tensor, group: Any = None) -> Any:
        count(own, size - 1)
        return all_gather(output, own, group=group)

    def counted_reduce_scatter(own: Tensor, parts: Tensor, group: Any = None) -> Any:
        count(own, size - 1)
        return reduce_scatter(own, parts, group=group)

    def counted_batch(operations: list[dist.P2POp]) -> Any:
        for operation in operations:
            if operation.op is send:
                count(operation.tensor, 1)
        return batch(operations)

    patch.setattr(gathering, "all_gather_single", counted_all_gather)
    patch.setattr(gathering, "reduce_scatter_single", counted_reduce_scatter)
    patch.setattr(dist, "batch_isend_irecv", counted_batch)
    try:
        query, key = (torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True) for _ in range(2))
        loss = FusedInfoNCELoss(gather=gather)(query, key)
        forward, sent = sent, 0
        loss.backward()
    finally:
        patch.undo()
    return {"forward": forward, "backward": sent}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gather", [True, "ring"])
def test_bytes_sent(cluster: Cluster, gather: Any, dtype: torch.dtype) -> None:
    others = (cluster.size - 1) * ROWS * WIDTH
    keys, gradients = others * dtype.itemsize, others * 4
    backward = gradients if gather is True else keys + gradients
    assert cluster.run(sent_on_rank, gather, dtype) == [{"forward": keys, "backward": backward}] * cluster.size
