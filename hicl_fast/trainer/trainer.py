"""``transformers.Trainer`` with a contrastive loss, STS evaluation and folders that sentence-transformers opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer

from hicl_fast.evaluation import Task, score_task
from hicl_fast.trainer.checks import check_finite, check_loss
from hicl_fast.trainer.encoder import SentenceEncoder
from hicl_fast.trainer.gradient_cache import embed_in_chunks
from hicl_fast.trainer.method import Method, Views
from hicl_fast.trainer.model import POOLING_KEY, write_sentence_transformers_files
from hicl_fast.trainer.rescue import LastStep
from hicl_fast.trainer.token_pooling import embed


class ContrastiveTrainer(Trainer):
    """Trains an encoder with one of the methods.

    When a step fails, or the run is stopped, the last complete step is saved as a checkpoint to go on from.

    Args:
        method: computes the loss.
        num_views: V, how many embeddings the batch holds of a segment.
        pooler_type: how tokens are pooled in training.
        saved_pooler_type: how they are pooled from then on; recorded in the saved model.
        check_every: steps between two comparisons with the reference; 0: never.
        gradient_cache_chunk_size: texts that the encoder takes at a time, while the loss is the whole batch's; 0: all.
        kwargs: for ``transformers.Trainer``; ``eval_dataset`` is an STS task.
    """

    def __init__(
        self,
        *,
        method: Method,
        num_views: int,
        pooler_type: str,
        saved_pooler_type: str,
        check_every: int = 0,
        gradient_cache_chunk_size: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.method, self.num_views, self.check_every = method, num_views, check_every
        self.gradient_cache_chunk_size = gradient_cache_chunk_size
        self.pooler_type, self.saved_pooler_type = pooler_type, saved_pooler_type
        setattr(self.model.config, POOLING_KEY, saved_pooler_type)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch: accumulation has to average it
        self._last_checked = -1
        self._embeddings: Tensor  # (V·S, D) of the last batch
        self.last_step = LastStep(self)
        self.add_callback(self.last_step)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        except BaseException as failure:
            self._end_progress_bar()
            self.last_step.save(failure)
            raise

    def _end_progress_bar(self) -> None:
        """So that what is said next begins a line of its own."""
        for callback in self.callback_handler.callbacks:
            bar = getattr(callback, "training_bar", None)
            if bar is not None:
                bar.close()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        embeddings = self._embed(model, inputs["input_ids"], inputs["attention_mask"])  # (V·S, D)
        lengths = inputs["attention_mask"].chunk(self.num_views)[0].sum(dim=1)

        def views(rows: Tensor) -> Views:
            size = len(lengths)
            negative = rows[2 * size :] if self.num_views > 2 else None
            return Views(rows[:size], rows[size : 2 * size], negative, inputs["offsets"], lengths, inputs.get("groups"))

        loss = self.method.loss(views(embeddings))
        self._embeddings = embeddings.detach()
        if self._check_is_due():
            if not bool(embeddings.isfinite().all()):
                self._check_finite(loss)  # there is nothing to compare
            check_loss(loss, embeddings, lambda rows: self.method.reference(views(rows)), self.state.global_step)
        return (loss, {"embeddings": embeddings}) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Ends the run where the loss isn't finite: after the backward pass, which on a GPU then isn't waited for twice."""
        loss = super().training_step(*args, **kwargs)
        self._check_finite(loss)
        return loss

    def _check_finite(self, loss: Tensor) -> None:
        parameters = self.model.named_parameters()
        check_finite(loss, self._embeddings, parameters, self.state.global_step, self.args.learning_rate)

    def _embed(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        def encode(rows: slice) -> Tensor:
            return embed(model, input_ids[rows], attention_mask[rows], self.pooler_type)

        if not self.gradient_cache_chunk_size:
            return encode(slice(None))
        return embed_in_chunks(model, encode, len(input_ids), self.gradient_cache_chunk_size, self.args.device)

    def _check_is_due(self) -> bool:
        """Once in each step that is due, however many batches are accumulated in it."""
        step = self.state.global_step
        if not self.check_every or step % self.check_every or step == self._last_checked:
            return False
        self._last_checked = step
        return True

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # a training step, not an evaluation
            parts = self.method.fused.last.items()  # type: ignore[union-attr]
            logs |= {name: float(value) for name, value in parts if name != "loss"}
        super().log(logs, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Scores the STS task given as ``eval_dataset``: Spearman × 100."""
        task: Task = self.eval_dataset if eval_dataset is None else eval_dataset
        encoder = SentenceEncoder(
            self.model, self.processing_class, self.saved_pooler_type, batch_size=self.args.eval_batch_size
        )
        metrics = {f"{metric_key_prefix}_stsb_spearman": score_task(encoder.encode, task)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_rng_state(self, output_dir: str) -> None:
        """The loss's own state (its queue, how often it drew) goes where each process's random state goes."""
        super()._save_rng_state(output_dir)
        state = self.method.fused.state_dict()
        if state:
            save_file(state, self._loss_state(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and self.method.fused.state_dict():
            path = self._loss_state(checkpoint)
            if not path.is_file():
                raise ValueError(
                    f"resume_from_checkpoint: expected the loss's state in {checkpoint}, but {path.name} is missing"
                )
            self.method.fused.to(self.args.device).load_state_dict(load_file(path))

    def _loss_state(self, folder: str) -> Path:
        rank = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        return Path(folder) / f"loss_state{rank}.safetensors"

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            write_sentence_transformers_files(self.model, self.processing_class, self.saved_pooler_type, folder)
