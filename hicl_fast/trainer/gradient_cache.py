"""Gradient caching: the loss of a whole batch with the encoder's memory of a chunk (GradCache, arXiv 2101.06983)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
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
        device: where the batch is. Random numbers may be drawn there, wherever the model has parameters, and on the CPU.

    Returns:
        (R, D); its backward pass adds to the gradients of the model's parameters.

    Raises:
        ValueError: a device is of a kind whose random state PyTorch can't keep.
    """
    chunks = [slice(begin, min(begin + chunk_size, num_rows)) for begin in range(0, num_rows, chunk_size)]
    trigger = torch.empty(0, requires_grad=True)  # a backward pass begins only where something requires a gradient
    return _Chunked.apply(trigger, model, encode, chunks, device)


class RandomState(NamedTuple):
    """Of the CPU's generator and those of other devices, whatever their kind."""

    cpu: Tensor
    others: dict[torch.device, Tensor]

    @classmethod
    def now(cls, devices: Iterable[torch.device]) -> RandomState:
        return cls(torch.get_rng_state(), {device: _generators(device).get_rng_state(device) for device in devices})

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.others.items():
            _generators(device).set_rng_state(state, device)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """As it was, for the time of the context."""
        outside = RandomState.now(self.others)
        try:
            self.restore()
            yield
        finally:
            outside.restore()


def random_devices(model: nn.Module, device: torch.device) -> set[torch.device]:
    """Where, beside the CPU, a model that is fed on a device may draw random numbers."""
    devices = {device, *(parameter.device for parameter in model.parameters())}
    if isinstance(model, nn.DataParallel):  # its replicas draw on devices of their own
        devices |= {torch.device(device.type, index) for index in model.device_ids}
    return {device for device in devices if device.type not in ("cpu", "meta")}


def _generators(device: torch.device) -> Any:
    """PyTorch's module for a kind of device, with the state of its generators."""
    module = getattr(torch, device.type, None)
    if not (hasattr(module, "get_rng_state") and hasattr(module, "set_rng_state")):
        raise ValueError(
            f"device: expected one whose random state torch.{device.type} can keep, so that a chunk's second pass drops "
            f"what its first did, got {device}; gradient caching can't be had there"
        )
    return module


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, trigger: Tensor, model: nn.Module, encode: Encode, chunks: list[slice], device: torch.device
    ) -> Tensor:
        kind = device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.model, ctx.encode, ctx.chunks, ctx.states = model, encode, chunks, []
        embeddings, devices = [], random_devices(model, device)
        for rows in chunks:
            ctx.states.append(RandomState.now(devices))
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
