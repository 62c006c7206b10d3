"""Gradient caching: the loss of a whole batch with the encoder's memory of a chunk (GradCache, arXiv 2101.06983)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Encode = Callable[[slice], Tensor]  # rows of the batch -> (r, D)


def embed_in_chunks(model: nn.Module, encode: Encode, num_rows: int, chunk_size: int, device: torch.device) -> Tensor:
    """The embeddings of a batch, chunk by chunk and without a graph; the backward pass makes each chunk's anew.

    Random states are kept and replayed: a chunk's second pass drops what its first did. With DDP gradients are
    exchanged once, with the last chunk. Everything else of a step (loss, gradient scaler, accumulation) is as without
    chunks, and so are the gradients: bit for bit with one chunk, else but for the order of sums and for the shapes that
    dropout draws its masks in.

    Args:
        model: the encoder, perhaps wrapped in ``DistributedDataParallel``.
        encode: embeds some rows of the batch with the model.
        num_rows: R, of the batch.
        chunk_size: rows at a time.
        device: where the model draws random numbers beside the CPU.

    Returns:
        (R, D); its backward pass adds to the gradients of the model's parameters.
    """
    chunks = [slice(begin, min(begin + chunk_size, num_rows)) for begin in range(0, num_rows, chunk_size)]
    trigger = torch.empty(0, requires_grad=True)  # a backward pass begins only where something requires a gradient
    return _Chunked.apply(trigger, model, encode, chunks, device)


class RandomState(NamedTuple):
    """Of the CPU's generator and a GPU's."""

    cpu: Tensor
    cuda: Tensor | None
    device: torch.device

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda, device)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """As it was, for the time of the context."""
        with torch.random.fork_rng([] if self.cuda is None else [self.device]):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, trigger: Tensor, model: nn.Module, encode: Encode, chunks: list[slice], device: torch.device
    ) -> Tensor:
        kind = device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.model, ctx.encode, ctx.chunks, ctx.states = model, encode, chunks, []
        embeddings = []
        for rows in chunks:
            ctx.states.append(RandomState.now(device))
            embeddings.append(encode(rows))
        return torch.cat(embeddings)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        for rows, state in zip(ctx.chunks, ctx.states, strict=True):
            waits = rows is not ctx.chunks[-1]
            with _without_exchange(ctx.model, waits), state.replayed(), torch.autocast(*ctx.autocast):
                with torch.enable_grad():
                    embeddings = ctx.encode(rows)
                torch.autograd.backward(embeddings, gradient[rows])
        return (None,) * 5


def _without_exchange(model: nn.Module, waits: bool) -> contextlib.AbstractContextManager[None]:
    """DDP's gradients stay on their rank while there are further chunks to come."""
    no_sync = getattr(model, "no_sync", None)
    return no_sync() if waits and no_sync is not None else contextlib.nullcontext()
