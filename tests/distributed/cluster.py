"""Processes that stay for all tests, forked from one that has imported PyTorch: importing it takes seconds."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=60)  # a hang becomes a failure


class RankError(RuntimeError):
    """A rank's function raised something."""


class Cluster:
    """``size`` processes with gloo between them."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size = size
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch.nn.parallel", "torch.distributed", "hicl_fast"])
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            arguments = (rank, size, f"file://{folder}/rendezvous-{size}", there)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(rank, size, *arguments)`` returns on each rank."""
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        answers = [pickle.loads(pipe.recv_bytes()) for pipe in self.pipes]
        failed = [f"rank {rank}:\n{answer}" for rank, (worked, answer) in enumerate(answers) if not worked]
        if failed:
            raise RankError("\n".join(failed))
        return [answer for _, answer in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send_bytes(b"")
        for process in self.processes:
            process.join(timeout=10)


def _serve(rank: int, size: int, rendezvous: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size, timeout=TIMEOUT)
    while message := pipe.recv_bytes():
        try:
            function, arguments = pickle.loads(message)
            answer = True, function(rank, size, *arguments)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()
    os._exit(0)  # an orderly end of the interpreter takes longer than the tests
