"""Whether two versions of the code give the same bits: one records the outputs of a fixed set of calls, the other repeats them.

    python -m tools.same_bits record before.safetensors               with the code as it was
    python -m tools.same_bits compare before.safetensors              with the code as it is

The calls go through public functions and modules alone, so that this file, copied into its tools/, runs on an older checkout.
Inputs are stored with the outputs: values and every gradient, of each operator, type and size. ``--backend`` names whose bits
they are (``torch``, ``cpp``; ``triton`` under TRITON_INTERPRET=1); compare takes the recorded one. Two threads, since the
order of a sum may depend on their number. Exit status 1: something differs, and it is named.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import hicl_fast.functional as HF
from hicl_fast import FusedHiCLLoss, HardNegativeMixing

Inputs = dict[str, Tensor]
Draw = Callable[[int, int, int], Inputs]  # of N, M, D

THREADS = 2
SIZES = (
    (5, 7, 3),
    (130, 200, 33),
    (1100, 1300, 64),
)  # N, M, D: one tile, several, and more rows than a block of csrc/cpu
TYPES = {
    "torch": ("float32", "float64", "bfloat16"),
    "cpp": ("float32", "float64", "bfloat16"),
    "triton": ("float32", "float16"),
}
LARGEST = {"triton": 200}  # columns, in the interpreter


@dataclass(frozen=True)
class Case:
    """A call: its inputs for a size, and the function of them whose result and gradients are compared."""

    inputs: Draw
    call: Callable[..., Tensor]


def _rows(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _indices(count: int, below: int, seed: int) -> Tensor:
    return torch.randint(0, below, (count,), generator=torch.Generator().manual_seed(seed))


def _pair(n: int, m: int, d: int) -> Inputs:
    query, key = _rows(n, d, seed=0), _rows(m, d, seed=1)
    key[:n] += query
    return {"query": query, "key": key}


def _square(n: int, m: int, d: int) -> Inputs:
    return _pair(n, n, d)


def _with(base: Draw, **more: Callable[[int, int, int], Tensor]) -> Draw:
    return lambda n, m, d: base(n, m, d) | {name: draw(n, m, d) for name, draw in more.items()}


def _info_nce(base: Draw = _pair, /, **options: Any) -> Case:
    """Options that are functions draw inputs; the others are handed on as they are."""
    drawn = {name: x for name, x in options.items() if callable(x)}
    fixed = {name: x for name, x in options.items() if not callable(x)}
    return Case(_with(base, **drawn), lambda backend, **inputs: HF.info_nce(**inputs, **fixed, backend=backend))


_GROUPS = {
    "query_group": lambda n, m, d: _indices(n, n // 2 + 1, 3),
    "key_group": lambda n, m, d: _indices(m, n // 2 + 1, 4),
}
_SAME_GROUPS = {name: (lambda n, m, d: _indices(n, n // 2 + 1, 3)) for name in _GROUPS}


def _negatives(n: int, m: int, d: int) -> Tensor:
    return _rows(n, d, seed=5)


def _odd(n: int, m: int, d: int) -> Inputs:
    """A row of zeros, one below the norm's floor, equal rows."""
    inputs = _pair(n, m, d)
    inputs["query"][0], inputs["key"][1] = 0, 0
    inputs["query"][2] *= 1e-20
    inputs["key"][3] = inputs["key"][4]
    return inputs


def _in_one_pass(backend: str, query: Tensor, key: Tensor, pairs: Tensor) -> Tensor:
    return HF.info_nce(query, key, mixing=HF.Mixing(3, pairs, 0.3), backend=backend)


def _of_two_types(backend: str, query: Tensor, key: Tensor) -> Tensor:
    return HF.info_nce(query, key.to(torch.bfloat16), backend=backend)


def _mixed(backend: str, query: Tensor, bank: Tensor, index: Tensor, pairs: Tensor) -> Tensor:
    return HF.mixed_negative_logits(query, bank, index, pairs, alpha=0.3, backend=backend)


def _mixtures(n: int, m: int, d: int) -> Inputs:
    index = torch.stack([_indices(n, m, 10 + j) for j in range(4)], dim=1)
    pairs = torch.stack([_indices(n * 6, 4, 20), _indices(n * 6, 4, 21)], dim=1).reshape(n, 6, 2)
    return {"query": _rows(n, d, seed=0), "bank": _rows(m, d, seed=1), "index": index, "pairs": pairs}


def _hicl(backend: str, query: Tensor, key: Tensor) -> Tensor:
    mixing = HardNegativeMixing(k=3, num_mixed=5, seed=0)
    lengths = torch.tensor([2, len(query) - 2])
    return FusedHiCLLoss(hard_negative_mixing=mixing, backend=backend)(query, key, lengths=lengths)


def _segments(n: int, m: int, d: int) -> Inputs:
    return {
        "segments": _rows(m, d, seed=0),
        "offsets": torch.tensor([0, 1, m // 3, m // 2, m]),
        "weights": _rows(m, seed=2).abs(),
    }


def _objective(name: Any) -> Case:
    def call(backend: str, query: Tensor, key: Tensor) -> Tensor:
        return HF.paradigm(query, key, name, backend=backend)

    return Case(_square, call)


CASES: dict[str, Case] = {
    "info_nce": _info_nce(),
    "info_nce, sum": _info_nce(reduction="sum", temperature=0.02),
    "info_nce, by row": _info_nce(reduction="none"),
    "info_nce, flat": _info_nce(temperature=2.0),
    "info_nce, learned temperature": _info_nce(temperature=lambda n, m, d: torch.tensor(0.07, dtype=torch.float64)),
    "info_nce, target": _info_nce(target=lambda n, m, d: _indices(n, m, 6)),
    "info_nce, margin": _info_nce(margin=0.2),
    "info_nce, own negatives": _info_nce(negatives=_negatives, hard_negative_weight=0.7),
    "info_nce, own negatives by row": _info_nce(negatives=_negatives, hard_negative_weight=-0.4, reduction="none"),
    "info_nce, bank": _info_nce(bank=lambda n, m, d: _rows(37, d, seed=7), negatives=_negatives),
    "info_nce, extra logits": _info_nce(extra_logits=lambda n, m, d: _rows(n, 3, seed=8)),
    "info_nce, symmetric": _info_nce(_square, symmetric=True),
    "info_nce, symmetric by row": _info_nce(_square, symmetric=True, reduction="none", margin=0.1),
    "info_nce, symmetric groups": _info_nce(_square, symmetric=True, **_SAME_GROUPS),
    **{
        f"info_nce, groups {mode}": _info_nce(same_group=mode, **_GROUPS)
        for mode in ("exclude", "negative", "positive")
    },
    "info_nce, positives by row": _info_nce(same_group="positive", reduction="none", **_GROUPS),
    "info_nce, learned temperature by row": _info_nce(
        temperature=lambda n, m, d: torch.tensor(0.3, dtype=torch.float64), reduction="none"
    ),
    "info_nce, groups of a bank": _info_nce(
        bank=lambda n, m, d: _rows(37, d, seed=7), bank_group=lambda n, m, d: _indices(37, n, 9), **_GROUPS
    ),
    "info_nce, symmetric with negatives": _info_nce(_square, symmetric=True, negatives=_negatives),
    "info_nce, mixing": Case(
        _with(_pair, pairs=lambda n, m, d: _indices(n * 10, 3, 11).reshape(n, 5, 2)), _in_one_pass
    ),
    "info_nce, odd rows": _info_nce(_odd),
    "info_nce, two types": Case(_pair, _of_two_types),
    "hard negatives": Case(
        _pair, lambda backend, query, key: HF.hard_negatives(query.detach(), key.detach(), 3, backend=backend)[0]
    ),
    "mixed negatives": Case(_mixtures, _mixed),
    "hicl with mixing": Case(_square, _hicl),
    "segment pool": Case(_segments, lambda backend, **inputs: HF.segment_pool(**inputs, backend=backend)),
    "paradigm, mhe": _objective("mhe"),
    "paradigm, met": _objective("met"),
    "paradigm, barlow_twins": _objective("barlow_twins"),
}


def inputs_of(case: Case, size: tuple[int, int, int], dtype: torch.dtype) -> Inputs:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in case.inputs(*size).items()}


def outputs_of(case: Case, inputs: Inputs, backend: str) -> Inputs:
    """The result and, where there are any, the gradients by every input that floats."""
    leaves = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    value = case.call(backend, **leaves)
    found = {"value": value.detach()}
    if value.requires_grad:
        upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
        value.backward(upstream)
        found |= {f"{name}_grad": x.grad for name, x in leaves.items() if x.grad is not None}
    return found


def cases(backend: str) -> Iterator[tuple[str, Case, tuple[int, int, int], torch.dtype]]:
    for name, case in CASES.items():
        for size in SIZES:
            if size[1] > LARGEST.get(backend, size[1]):
                continue
            for dtype in TYPES[backend]:
                yield f"{name}, {'×'.join(map(str, size))}, {dtype}", case, size, getattr(torch, dtype)


def record(path: Path, backend: str) -> None:
    stored: Inputs = {}
    for name, case, size, dtype in cases(backend):
        inputs = inputs_of(case, size, dtype)
        stored |= {f"{name}/in/{key}": x for key, x in inputs.items()}
        stored |= {f"{name}/out/{key}": x.contiguous() for key, x in outputs_of(case, inputs, backend).items()}
    save_file(stored, str(path), {"backend": backend})


def compare(path: Path) -> list[str]:
    """The names of the outputs that differ, or that only one of the two has."""
    different: list[str] = []
    with safe_open(str(path), "pt") as file:
        backend, names = file.metadata()["backend"], set(file.keys())
        recorded, known = (
            {name.split("/in/")[0].split("/out/")[0] for name in names},
            {one[0] for one in cases(backend)},
        )
        different += [f"{name}: only recorded" for name in sorted(recorded - known)]
        different += [f"{name}: not recorded" for name in sorted(known - recorded)]
        for name, case, _, _ in cases(backend):
            if name not in recorded:
                continue
            inputs = {key: file.get_tensor(f"{name}/in/{key}") for key in _below(f"{name}/in/", names)}
            expected = {key: file.get_tensor(f"{name}/out/{key}") for key in _below(f"{name}/out/", names)}
            got = outputs_of(case, inputs, backend)
            different += [
                f"{name}: {key}"
                for key in sorted(got.keys() | expected.keys())
                if not _same(got.get(key), expected.get(key))
            ]
    return different


def _below(prefix: str, names: set[str]) -> list[str]:
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """PyTorch's for the time of it: whoever calls ``main`` keeps their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--backend", choices=list(TYPES), default="cpp", help="of record")
    args = parser.parse_args(argv)
    with _threads(THREADS):
        if args.action == "record":
            record(args.file, args.backend)
            return 0
        different = compare(args.file)
    print("\n".join([*different, f"{len(different)} outputs differ"]))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
