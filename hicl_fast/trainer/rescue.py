"""What a run has trained is saved when it fails or is stopped: a checkpoint of its last complete step."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from transformers import Trainer, TrainerCallback

from hicl_fast.trainer.checkpoints import UNFINISHED, missing_from
from hicl_fast.trainer.checks import Diverged
from hicl_fast.trainer.gradient_cache import RandomState, random_devices

STATE_FILE = "trainer_state.json"  # comes last: it vouches for the others

logger = logging.getLogger("hicl_fast.trainer")


class Stopped(BaseException):
    """A signal asked the run to stop, and a step has been completed since."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignals:
    """Ctrl-C and SIGTERM ask for a stop after the step; the second of them stops at once, as the first one used to."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.asked: int | None = None
        self._process = os.getpid()

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """For the time of the context, in the main thread; in others Python hears no signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._hear) for number in self.SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker that was forked off
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.asked is None:
            self.asked = number
            name = signal.Signals(number).name
            os.write(2, f"{name}: stopping after this step; a second one stops at once\n".encode())
        else:
            raise KeyboardInterrupt


class LastStep(TrainerCallback):
    """Keeps what a checkpoint of the last complete step needs beyond the model and its optimizer.

    A step that fails has drawn random numbers, and perhaps moved the loss's own state, which its repetition will again.
    """

    def __init__(self, trainer: Trainer) -> None:  # a ContrastiveTrainer
        self.trainer = trainer
        self.stop = StopSignals()
        self._is_updating = False
        self._kept: tuple[Any, ...] | None = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self.stop.asked is not None:
            raise Stopped(self.stop.asked)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._is_updating = True

    def on_step_end(self, *_: Any, **__: Any) -> None:
        trainer = self.trainer
        devices = random_devices(trainer.model, trainer.args.device)
        states = (random.getstate(), np.random.get_state(), RandomState.now(devices))
        self._kept = (*states, trainer.method.fused.state_dict())
        self._is_updating = False

    def save(self, why: BaseException) -> None:
        """Write the checkpoint if there is one to write, and say in the log what became of what was trained."""
        trainer = self.trainer
        step, output_dir = trainer.state.global_step, Path(trainer.args.output_dir)
        folder = output_dir / f"checkpoint-{step}"
        what = f"stopped by {why}" if isinstance(why, Stopped) else f"step {step + 1}, {type(why).__name__}"
        if self._kept is None:
            logger.warning("%s: no step has been completed since the start, and nothing is saved", what)
        elif self._is_updating:
            logger.warning(
                "%s: in the middle of an update, where the model is between two steps; it is not saved", what
            )
        elif isinstance(why, Diverged):
            logger.warning("%s: nothing is saved, since its steps led here; checkpoints from before them stay", what)
        elif trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            logger.warning("%s: nothing is saved, since all processes together have to save a sharded model", what)
        else:
            try:
                if missing_from(folder, trainer.args.world_size) is not None:
                    self._write(output_dir, folder)
            except Exception as failure:  # what stopped the run is what has to be heard of
                logger.warning("%s: and saving what was trained failed: %s", what, failure)
                return
            logger.warning(
                "%s: %d steps of training are saved in %s; --resume_from_checkpoint last goes on from there",
                what,
                step,
                folder,
            )

    def _write(self, output_dir: Path, folder: Path) -> None:
        """Each process writes its own files beside the place and then moves them there, whole."""
        self._restore()
        trainer = self.trainer
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=output_dir) as unfinished:
            if trainer.args.should_save:
                trainer.save_model(unfinished, _internal_call=True)
            trainer._save_optimizer_and_scheduler(unfinished)
            trainer._save_scaler(unfinished)
            trainer._save_rng_state(unfinished)
            if trainer.args.should_save:
                trainer.state.save_to_json(os.path.join(unfinished, STATE_FILE))
            folder.mkdir(exist_ok=True)
            for name in sorted(os.listdir(unfinished), key=lambda name: name == STATE_FILE):
                if (folder / name).is_dir():  # of an attempt that came to nothing
                    shutil.rmtree(folder / name)
                os.replace(os.path.join(unfinished, name), folder / name)

    def _restore(self) -> None:
        assert self._kept is not None
        of_python, of_numpy, of_torch, of_loss = self._kept
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        of_torch.restore()
        self.trainer.method.fused.load_state_dict(of_loss)
