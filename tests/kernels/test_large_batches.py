"""What a step of the large-batch path costs, in bytes and operations: counted on tensors without memory."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hicl_fast.functional as HF

pytest.importorskip("triton")

from hicl_fast.kernels import cosine_tile, info_nce, rows  # noqa: E402

from hicl_fast.ops.backends import registry  # noqa: E402
from hicl_fast.ops.info_nce import triton as triton_info_nce  # noqa: E402

pytestmark = pytest.mark.triton

D = 768
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

# Its shape function takes the type of the result for beta; the CUDA kernel, which a GPU runs, is another one.
needs_meta_addmm = pytest.mark.skipif(
    TORCH < (2, 13), reason="addmm.dtype_out has no working meta kernel in this PyTorch; 2.13 has"
)


# Of PyTorch's operations those that a GPU has nothing to do for.
NO_LAUNCH = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
NO_LAUNCH |= {"view", "slice", "select", "expand", "detach", "alias", "unsqueeze", "as_strided"}
NO_LAUNCH |= {"t", "transpose", "permute", "unbind"}


class Cost(TorchDispatchMode):
    """The most bytes that tensors made under it hold at a time, the operations of all matrix products, and launches."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = self.operations = self.launches = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        on_device = any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves(result))
        self.launches += on_device and function.overloadpacket.__name__ not in NO_LAUNCH
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = [x for x in args if isinstance(x, Tensor)][-2:]
            self.multiply(left.shape[0], right.shape[1], left.shape[1])
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.is_meta:
                self._hold(x.untyped_storage())
        return result

    def run(self, rows: int, columns: int, depth: int) -> None:
        self.launches += 1
        self.multiply(rows, columns, depth)

    def multiply(self, rows: int, columns: int, depth: int) -> None:
        self.operations += 2 * rows * columns * depth

    def _hold(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._let_go, storage._cdata, storage.nbytes())

    def _let_go(self, identity: int, size: int) -> None:
        self._seen.discard(identity)
        self.bytes -= size


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch) -> Cost:
    """A step on the ``triton`` backend as an H200 would take it, but that its kernels are only counted."""
    counted = Cost()

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *_, num_rows=0, num_cols=0, dim=0, **__: counted.run(num_rows, num_cols, dim)

    for module in (rows, info_nce):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Kernel())
    monkeypatch.setattr(cosine_tile, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(registry, "choose", lambda *call: "triton")
    monkeypatch.setattr(
        "hicl_fast.ops.info_nce.operator.without_autocast", lambda device_type: contextlib.nullcontext()
    )
    return counted


def step(cost: Cost, n: int, **options: Any) -> int:
    """Runs a step in bfloat16; the bytes that its forward pass holds at most, with inputs and saved gradients."""
    with cost:
        query, key = (torch.empty(n, D, dtype=torch.bfloat16, device="meta").requires_grad_() for _ in range(2))
        loss = HF.info_nce(query, key, **options)
        forward = cost.peak
        loss.backward()
    assert query.grad is not None and key.grad is not None
    return forward


@needs_meta_addmm
@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_million_rows(symmetric: bool, cost: Cost) -> None:
    n = 1 << 20
    step(cost, n, symmetric=symmetric)
    assert cost.peak < 20e9
    assert cost.operations == (4 if symmetric else 3) * 2 * n * n * D


def learned() -> Tensor:
    """A temperature that only the device knows."""
    return torch.ones((), device="meta", requires_grad=True)


@needs_meta_addmm
@pytest.mark.parametrize(
    ("products", "options"),
    [
        (3, {}),
        (3, {"temperature": 0.02}),
        (4, {"temperature": 0.01}),  # the sums may need an offset of their own for every row
        (4, {"temperature": learned()}),
        (4, {"symmetric": True}),
        (4, {"symmetric": True, "temperature": learned()}),
        (4, {"reduction": "none"}),
    ],
    ids=str,
)
def test_how_many_products(products: int, options: dict[str, Any], cost: Cost) -> None:
    n = 1 << 14
    with cost:
        inputs = (torch.empty(n, D, dtype=torch.bfloat16, device="meta").requires_grad_() for _ in range(2))
        HF.info_nce(*inputs, **options).sum().backward()
    assert cost.operations == products * 2 * n * n * D


LAUNCHES: list[tuple[int, dict[str, Any]]] = [
    (11, {}),
    (16, {"temperature": 0.01}),
    (17, {"symmetric": True}),
    (25, {"temperature": "learned"}),
    (26, {"symmetric": True, "temperature": "learned"}),
]


@needs_meta_addmm
@pytest.mark.parametrize("n", [2048, 4096])
@pytest.mark.parametrize(("most", "options"), LAUNCHES, ids=str)
def test_how_many_launches(most: int, options: dict[str, Any], n: int, cost: Cost) -> None:
    """Below some 6,000 rows their number is the time of a step."""
    if options.get("temperature") == "learned":
        options = options | {"temperature": learned()}
    step(cost, n, **options)
    assert cost.launches <= most, cost.launches


@needs_meta_addmm
@pytest.mark.parametrize("n", [1 << 12, 1 << 16])
@pytest.mark.parametrize("budget", [1 << 27, 1 << 30])
def test_the_workspace_is_as_large_as_its_budget(
    n: int, budget: int, cost: Cost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_info_nce, "CHUNK_BYTES", budget)
    monkeypatch.setattr(triton_info_nce, "MOST_CHUNK_BYTES", budget)
    inputs, gradients, unit_keys = 2 * 2 * n * D, 2 * 4 * n * D, 2 * n * D
    num_rows = min(n, budget // (2 * n))
    row_products, sums = (4 + 2) * num_rows * D, 2 * 3 * 4 * num_rows * n / 128  # the last chunk's and the next one's
    by_row = 15 * 4 * n  # norms, positives, losses and the like
    copies = 2 * 2 * n * D  # of query and key, for long rows made shorter
    needed = step(cost, n) - (inputs + gradients + unit_keys + copies)
    assert 0.99 * min(budget, 2 * n * n) <= needed <= min(budget, 2 * n * n) + row_products + sums + by_row


@pytest.mark.parametrize("row_bytes", [64, 131072, 1 << 21, 1 << 24, 1 << 33])
def test_rows_of_a_chunk(row_bytes: int) -> None:
    rows = triton_info_nce.chunk_rows(row_bytes, 128)
    assert rows % 128 == 0 and rows > 0
    assert rows * row_bytes <= triton_info_nce.MOST_CHUNK_BYTES or rows == 128
    if 2048 * row_bytes <= triton_info_nce.MOST_CHUNK_BYTES:
        assert rows >= 2048
    if rows > 2048:
        assert rows * row_bytes <= triton_info_nce.CHUNK_BYTES < (rows + 128) * row_bytes
