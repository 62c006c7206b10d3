"""SimCSE as a LightningModule: a loss of this library is a module, called in ``training_step``.

Runs offline in seconds on a small random model: pip install lightning; python examples/lightning_simcse.py
With several devices, ``FusedInfoNCELoss(gather=True)`` compares every sentence with those of all of them.
"""

from __future__ import annotations

import logging
import tempfile
import warnings

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

from hicl_fast import FusedInfoNCELoss
from hicl_fast.trainer.scratch import write_scratch_model

SENTENCES = [
    "A man is playing a guitar on the stage.",
    "Two dogs run across the wet field.",
    "The train to the coast leaves at noon.",
    "She reads an old letter by the window.",
    "Snow has covered the road to the village.",
    "The children build a castle out of sand.",
    "He repairs the clock with great care.",
    "A storm is coming in from the sea.",
]


class SimCSE(lightning.LightningModule):
    def __init__(self, model_name: str) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(model_name)
        self.encoder = AutoModel.from_pretrained(model_name)
        self.encoder.train()  # dropout makes the two views
        self.loss_fn = FusedInfoNCELoss(temperature=0.05)
        self.losses: list[float] = []

    def training_step(self, sentences: list[str], batch_index: int) -> Tensor:
        batch = self.tokenizer(sentences, padding=True, return_tensors="pt").to(self.device)
        z1, z2 = (self.encoder(**batch).last_hidden_state[:, 0] for _ in range(2))  # (N, D) each
        loss = self.loss_fn(z1, z2)
        self.log_dict({"loss": loss, "cosine of positives": self.loss_fn.last["positive_similarity"]})
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> list[float]:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_scratch_model(SENTENCES * 2, folder)  # or the name of a model on the hub
        model = SimCSE(folder)
    trainer = lightning.Trainer(
        max_epochs=8,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(SENTENCES * 2, batch_size=8))  # type: ignore[arg-type]
    print(f"loss: {model.losses[0]:.4f} -> {model.losses[-1]:.4f}")
    return model.losses


if __name__ == "__main__":
    main()
