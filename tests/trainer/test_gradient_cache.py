"""Batches that the encoder takes chunk by chunk: the same gradients, and runs that lose nothing by it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hicl_fast.functional as HF
from hicl_fast.trainer import scratch
from hicl_fast.trainer.cli import main, train
from hicl_fast.trainer.gradient_cache import RandomState, embed_in_chunks, random_devices
from hicl_fast.trainer.text import read_training_text

CPU = torch.device("cpu")
Command = Callable[..., list[str]]


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 8)).double()


@pytest.mark.parametrize("chunk_size", [1, 3, 10, 100])
def test_gradients_and_random_states(chunk_size: int) -> None:
    rows = torch.randn(10, 6, dtype=torch.float64)
    results = []
    for caches in (False, True):
        model = encoder()
        if caches:
            embeddings = embed_in_chunks(model, lambda chunk: model(rows[chunk]), 10, chunk_size, CPU)  # noqa: B023
        else:  # the same chunks, all graphs kept
            embeddings = torch.cat([model(part) for part in rows.split(chunk_size)])
        state = torch.get_rng_state()
        HF.info_nce(embeddings, embeddings.roll(1, 0), temperature=0.5).backward()
        assert torch.equal(torch.get_rng_state(), state)
        results.append((embeddings.detach(), state, *(p.grad for p in model.parameters())))
    for plain, cached in zip(*results, strict=True):
        if chunk_size >= 10:
            assert torch.equal(cached, plain)
        torch.testing.assert_close(cached, plain, rtol=1e-12, atol=1e-14)


class Generators:
    """What PyTorch has of a kind of device that isn't here: a state for each device, which a draw moves on."""

    def __init__(self) -> None:
        self.states: dict[torch.device, int] = {}

    def get_rng_state(self, device: torch.device) -> Tensor:
        return torch.tensor(self.states.get(device, 0))

    def set_rng_state(self, state: Tensor, device: torch.device) -> None:
        self.states[device] = int(state)

    def draw(self, device: torch.device) -> int:
        self.states[device] = self.states.get(device, 0) + 1
        return self.states[device]


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_random_states_of_any_kind_of_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the batch's device and of those that parameters are on or are copied to."""
    devices = {torch.device(kind), torch.device(kind, 0), torch.device(kind, 1)}
    parallel = nn.DataParallel(encoder())  # on no device, here
    assert random_devices(parallel, CPU) == set()
    parallel.device_ids = [0, 1]
    generators = Generators()
    monkeypatch.setattr(torch, kind, generators)
    assert random_devices(parallel, torch.device(kind)) == devices
    state = RandomState.now(devices)
    first = [generators.draw(device) for device in devices for _ in range(2)]
    between = dict(generators.states)
    with state.replayed():
        assert [generators.draw(device) for device in devices for _ in range(2)] == first
    assert generators.states == between


def test_a_device_without_a_random_state_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "xpu")
    with pytest.raises(ValueError, match=r"device: expected one whose random state .* got xpu:0"):
        RandomState.now([torch.device("xpu", 0)])


def test_what_is_kept_is_a_chunk() -> None:
    """Activations that are alive at once."""
    alive, most = 0, 0

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            nonlocal alive, most
            if ctx.needs_input_grad[0]:
                ctx.counts = len(x)
                alive += len(x)
                most = max(most, alive)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            nonlocal alive
            alive -= ctx.counts
            return gradient

    weight = torch.ones(6, requires_grad=True)
    rows = torch.randn(12, 6)

    def encode(chunk: slice) -> Tensor:
        scaled = rows[chunk] * weight
        return Counted.apply(scaled) if torch.is_grad_enabled() else scaled

    embed_in_chunks(nn.Identity(), encode, 12, 4, CPU).square().sum().backward()
    assert (most, alive) == (4, 0)
    torch.testing.assert_close(weight.grad, 2 * rows.square().sum(dim=0))


def test_gradients_are_exchanged_with_the_last_chunk() -> None:
    """Earlier ones are taken under ``no_sync``, as DDP has it: ranks may have different numbers of chunks."""
    exchanged: list[tuple[int, bool]] = []  # rows of a backward pass, and whether their gradients would be exchanged

    class Parallel(nn.Linear):
        exchanges = True

        @contextlib.contextmanager
        def no_sync(self) -> Iterator[None]:
            self.exchanges = False
            yield
            self.exchanges = True

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if y.requires_grad:
                y.register_hook(lambda gradient: exchanged.append((len(gradient), self.exchanges)))
            return y

    model, rows = Parallel(6, 4), torch.randn(7, 6)
    embed_in_chunks(model, lambda chunk: model(rows[chunk]), 7, 3, CPU).square().sum().backward()
    assert exchanged == [(3, False), (3, False), (1, True)]


@pytest.mark.parametrize("scale", [2.0**8, 2.0**40], ids=["in range", "overflows"])
@pytest.mark.parametrize("chunk_size", [4, 100])
def test_float16_with_a_gradient_scaler(chunk_size: int, scale: float) -> None:
    """The same step as with all graphs kept; one whose gradients overflow is left out and the scale halved."""
    rows = torch.randn(10, 6)
    results = []
    for caches in (False, True):
        model = encoder().float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with torch.autocast("cpu", torch.float16):
            if caches:
                embeddings = embed_in_chunks(model, lambda chunk: model(rows[chunk]), 10, chunk_size, CPU)  # noqa: B023
            else:
                embeddings = torch.cat([model(part) for part in rows.split(chunk_size)])
            loss = HF.info_nce(embeddings, embeddings.roll(1, 0), temperature=0.5)
        assert embeddings.dtype == torch.float16
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        results.append(
            (embeddings.detach(), loss.detach(), scaler.get_scale(), *(p.detach() for p in model.parameters()))
        )
    for plain, cached in zip(*results, strict=True):
        torch.testing.assert_close(cached, plain, rtol=1e-3, atol=1e-4)
    untrained = all(torch.equal(p, q) for p, q in zip(results[1][3:], encoder().float().parameters(), strict=True))
    assert untrained == (scale == 2.0**40) and results[1][2] == (scale / 2 if untrained else scale)


def write_start(paragraphs: Path, folder: Path, dropout: float) -> Path:
    """A start that runs share: vocabularies of two trainings on the same text may differ."""
    torch.manual_seed(0)
    scratch.write_scratch_model((row[0] for row in read_training_text(paragraphs).rows), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"method": "hicl", "segment_length": 16},
        {"method": "hncse", "max_seq_length": 16},
        {"method": "simcse", "bf16": True, "per_device_train_batch_size": 4, "max_seq_length": 8},
        {"method": "simcse", "gradient_accumulation_steps": 2},
    ],
    ids=lambda options: " ".join(f"{key} {value}" for key, value in options.items()),
)
def test_one_chunk_changes_nothing(
    tmp_path: Path, paragraphs: Path, command: Command, options: dict[str, object]
) -> None:
    """Dropout included: the same losses, digit by digit, over several steps."""
    start = write_start(paragraphs, tmp_path / "start", dropout=0.1)
    settings = {**options, "max_steps": 2, "model_name_or_path": start}
    train(command(paragraphs, "plain", **settings))
    train(command(paragraphs, "cached", **settings, gradient_cache_chunk_size=1000))
    assert losses(tmp_path / "cached") == losses(tmp_path / "plain")


@pytest.mark.parametrize("method", ["simcse", "hicl"])
def test_small_chunks_give_the_same_losses(tmp_path: Path, paragraphs: Path, command: Command, method: str) -> None:
    """Without dropout, whose masks depend on the chunks."""
    start = write_start(paragraphs, tmp_path / "start", dropout=0.0)
    settings = {"method": method, "max_steps": 2, "model_name_or_path": start}
    train(command(paragraphs, "plain", **settings))
    train(command(paragraphs, "cached", **settings, gradient_cache_chunk_size=5, check_every=1))
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)


def test_wrong_chunk_size_is_named(sentences: Path, command: Command) -> None:
    with pytest.raises(
        SystemExit, match="^error: gradient_cache_chunk_size: expected a whole number, at least 0, got -1"
    ):
        main(command(sentences, gradient_cache_chunk_size=-1))


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path, paragraphs: Path, command: Command) -> None:
    """Half the documents on each, in chunks, with the loss of all: the losses of one process with all of them."""
    start = write_start(paragraphs, tmp_path / "start", dropout=0.0)
    settings = {"method": "hicl", "max_steps": 3, "model_name_or_path": start}
    train(command(paragraphs, "one", **settings, per_device_train_batch_size=8))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = {**settings, "per_device_train_batch_size": 4, "gather": "all", "gradient_cache_chunk_size": 5}
    done = subprocess.run(
        [*torchrun, "-m", "hicl_fast.trainer", *command(paragraphs, "two", **options)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
