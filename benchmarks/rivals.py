"""Everything that computes the same loss, or in the same way another one, one small function each.

A rival is made for one batch and gives back ``loss(query, key) -> Tensor``. Making it raises :class:`Missing` with the
reason where it can't run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from report import Missing
from torch import Tensor

import hicl_fast
import hicl_fast.functional as HF

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    query: Tensor  # (N, D)
    key: Tensor  # (N, D)
    temperature: float

    @property
    def labels(self) -> Tensor:
        return torch.arange(self.query.shape[0], device=self.query.device)


@dataclass(frozen=True)
class Rival:
    name: str
    make: Callable[[Batch], Loss]
    bytes_per_pair: float = 0.0  # of N² pairs, forward and backward: the estimate by which it is left out
    bytes_per_pair_and_dim: float = 0.0  # of N² D
    bytes_per_triple: float = 0.0  # of N³
    gpu_only: bool = False
    symmetric: bool = False
    ours: bool = False  # this library's: where it fails, the benchmark does
    other_loss: str = (
        ""  # what it computes where that isn't InfoNCE: said beside its name, and not set against the limit
    )
    exact: Callable[[Batch], Loss] | None = None  # that loss in plain PyTorch, which it is checked against

    @property
    def title(self) -> str:
        return f"{self.name}: {self.other_loss}" if self.other_loss else self.name

    def estimated_bytes(self, n: int, d: int) -> float:
        return n * n * (self.bytes_per_pair + d * self.bytes_per_pair_and_dim + n * self.bytes_per_triple)


def fused(backend: str, precision: str | None = None, symmetric: bool = False) -> Rival:
    name = f"hicl_fast {backend}" + (f" {precision}" if precision else "") + (" symmetric" if symmetric else "")

    def make(batch: Batch) -> Loss:
        if (
            precision == "bf16"
            and batch.query.device.type == "cpu"
            and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        ):
            raise Missing("this processor has no bfloat16 products")

        def loss(query: Tensor, key: Tensor) -> Tensor:
            options = dict(temperature=batch.temperature, backend=backend, precision=precision, symmetric=symmetric)
            return HF.info_nce(query, key, **options)  # type: ignore[arg-type]

        return loss

    return Rival(name, make, symmetric=symmetric, ours=True)


def fused_rivals(backends: list[str] | None, float32: bool) -> list[Rival]:
    """The fused loss on each backend that is there, or on those asked for."""
    names = [status.name for status in hicl_fast.backends() if status.available]
    chosen = names if backends is None else backends
    rivals = [fused(name) for name in chosen]
    if float32 and "cpp" in chosen:
        rivals.append(fused("cpp", precision="bf16"))
    return rivals + [fused(name, symmetric=True) for name in chosen[-1:]]


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"{name} can't be imported: {error}") from error


def _cross_entropy(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.arange(logits.shape[0], device=logits.device))


def _eager(batch: Batch) -> Loss:
    return lambda q, k: _cross_entropy(F.normalize(q) @ F.normalize(k).T / batch.temperature)


def _simcse(batch: Batch) -> Loss:
    """SimCSE's similarity module: cosine similarity broadcast over N × N × D."""
    similarity = torch.nn.CosineSimilarity(dim=-1)
    return lambda q, k: _cross_entropy(similarity(q.unsqueeze(1), k.unsqueeze(0)) / batch.temperature)


def _compiled(batch: Batch) -> Loss:
    return torch.compile(_eager(batch))


def _linear_cross_entropy(batch: Batch) -> Loss:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Missing(f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy")
    return lambda q, k: function(F.normalize(q) / batch.temperature, F.normalize(k), batch.labels)


def _sentence_transformers(batch: Batch) -> Loss:
    losses = _module("sentence_transformers.losses")
    loss = losses.MultipleNegativesRankingLoss(model=None, scale=1 / batch.temperature)
    if not hasattr(loss, "compute_loss_from_embeddings"):
        raise Missing("this sentence-transformers has no MultipleNegativesRankingLoss.compute_loss_from_embeddings")
    return lambda q, k: loss.compute_loss_from_embeddings([q, k], labels=None)


def _metric_learning(batch: Batch) -> Loss:
    """NTXentLoss with the keys as reference embeddings and every row a class of its own."""
    losses = _module("pytorch_metric_learning.losses")
    loss = losses.NTXentLoss(temperature=batch.temperature)
    return lambda q, k: loss(q, batch.labels, ref_emb=k, ref_labels=batch.labels)


def _open_clip(batch: Batch) -> Loss:
    """Symmetric. Its file of losses is opened by itself: the package needs torchvision, the losses don't."""
    package = importlib.util.find_spec("open_clip")
    folder = Path(package.origin).parent if package is not None and package.origin else None
    if folder is None or not (folder / "loss.py").is_file():
        raise Missing("open_clip is not installed")
    spec = importlib.util.spec_from_file_location("open_clip_loss", folder / "loss.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss = module.ClipLoss()
    return lambda q, k: loss(F.normalize(q), F.normalize(k), 1 / batch.temperature)


def _inf_cl(batch: Batch) -> Loss:
    """The loss of one process; its other one needs a process group. It takes the dimensions by heads of a power of two."""
    function = _module("inf_cl").cal_flash_loss
    dim = batch.query.shape[1]
    head_dim = next((size for size in (256, 128, 64) if dim % size == 0), None)
    if head_dim is None:
        raise Missing(f"takes multiples of 64 dimensions, not {dim}")
    scale = torch.tensor(1 / batch.temperature, device=batch.query.device)
    return lambda q, k: function(F.normalize(q), F.normalize(k), scale=scale, head_dim=head_dim).mean()


def _cut_cross_entropy(batch: Batch) -> Loss:
    function = _module("cut_cross_entropy").linear_cross_entropy
    options = {"impl": "cce", "filter_eps": None}  # exact: no gradient is left out for being small
    return lambda q, k: function(F.normalize(q) / batch.temperature, F.normalize(k), batch.labels, **options)


def _liger(batch: Batch) -> Loss:
    loss = _module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return lambda q, k: loss(F.normalize(k), F.normalize(q) / batch.temperature, batch.labels)


def _quack(batch: Batch) -> Loss:
    function = _module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda q, k: function(F.normalize(q) / batch.temperature, F.normalize(k), batch.labels)


def _memeff(batch: Batch) -> Loss:
    """Its one-directional loss, with no limit to negatives' similarities and gradients of their true length."""
    return _module("memeff").MemoryEfficientQwen3Loss(temperature=batch.temperature, margin=2.0, stable=False)


def _memeff_clip(batch: Batch) -> Loss:
    """Symmetric."""
    return _module("memeff").MemoryEfficientCLIPLoss(temperature=batch.temperature, stable=False)


SIGMOID_BIAS = -10.0  # as training starts with


def _siglip(batch: Batch) -> Loss:
    function = _module("siglip_kernel").fused_siglip_loss
    scale = torch.tensor(1 / batch.temperature, device=batch.query.device)
    bias = torch.tensor(SIGMOID_BIAS, device=batch.query.device)
    return lambda q, k: function(F.normalize(q), F.normalize(k), scale.log(), bias)


def _sigmoid_loss(batch: Batch) -> Loss:
    """Every pair decided by itself: Σ −log σ(±logit) / N, + where query and key belong together."""

    def loss(query: Tensor, key: Tensor) -> Tensor:
        logits = F.normalize(query) @ F.normalize(key).T / batch.temperature + SIGMOID_BIAS
        sign = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
        return -F.logsigmoid(sign * logits).sum() / len(logits)

    return loss


RIVALS = (
    Rival("eager", _eager, bytes_per_pair=16),
    Rival("torch.compile", _compiled, bytes_per_pair=16),
    Rival("simcse broadcast", _simcse, bytes_per_pair_and_dim=16),
    Rival("linear_cross_entropy", _linear_cross_entropy, bytes_per_pair=16),
    Rival("sentence-transformers", _sentence_transformers, bytes_per_pair=16),
    Rival("pytorch-metric-learning", _metric_learning, bytes_per_triple=17),
    Rival("open_clip", _open_clip, bytes_per_pair=32, symmetric=True),
    Rival("inf-cl", _inf_cl, gpu_only=True),
    Rival("cut-cross-entropy", _cut_cross_entropy, gpu_only=True),
    Rival("liger-kernel", _liger, gpu_only=True),
    Rival("quack", _quack, gpu_only=True),
    Rival("memeff", _memeff, gpu_only=True),
    Rival("memeff-clip", _memeff_clip, gpu_only=True, symmetric=True),
    Rival("siglip-kernel", _siglip, gpu_only=True, other_loss="sigmoid loss", exact=_sigmoid_loss),
)
