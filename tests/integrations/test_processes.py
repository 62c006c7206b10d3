"""sentence-transformers' gather between two real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

WORKER = """
import sys
import torch
import torch.distributed as dist

from hicl_fast.integrations import sentence_transformers as fused
from hicl_fast.integrations.sentence_transformers import drop_ins

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
generator = torch.Generator().manual_seed(0)
everything = torch.randn(3, 2, 4, 8, generator=generator, dtype=torch.float64)  # columns, processes, rows, dimensions


def gradients(loss_of):
    leaves = [x.clone().requires_grad_() for x in everything[:, rank]]
    loss = loss_of(leaves)
    loss.backward()
    return [loss.detach(), *(x.grad for x in leaves)]


options = dict(directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"), gather_across_devices=True)
for options in (dict(gather_across_devices=True), options):
    mine, theirs = (
        gradients(lambda e: cls(None, **options).compute_loss_from_embeddings(e, None))
        for cls in (fused.FusedMultipleNegativesRankingLoss, drop_ins.original.MultipleNegativesRankingLoss)
    )
    for got, expected in zip(mine, theirs):
        torch.testing.assert_close(got, expected)
print("same")
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), address],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        results = [process.communicate(timeout=120) for process in workers]
    finally:
        for process in workers:
            process.kill()
    for process, (said, complained) in zip(workers, results, strict=True):
        assert process.returncode == 0 and said.strip() == "same", complained
