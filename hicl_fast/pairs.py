"""Which of a row's hard negatives are mixed with which: pairs from a counter, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from hicl_fast import _checks as check
from hicl_fast.ops.backends import registry

__all__ = ["random_pairs"]

LARGEST_K = 1 << 16  # k (k − 1) / 2 then stays below 2³¹, and its product with 32 random bits within an int64

_WORD = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15  # 2⁶⁴ / the golden ratio: what splitmix64's counter goes up by
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27)
_LAST_SHIFT = 31


def random_pairs(
    num_rows: int,
    num_mixed: int,
    k: int,
    seed: int,
    device: torch.device | str | None = None,
    *,
    first_row: int = 0,
) -> Tensor:  # (num_rows, num_mixed, 2) int64
    """Pairs (a, b), 0 ≤ a < b < k, each drawn uniformly, with replacement, from the k (k − 1) / 2 there are.

    Pair j of row i is a function of (seed, first_row + i, j) and k alone: splitmix64's mixing of a counter, in integers. So every
    device draws the same pairs, whatever ``num_rows`` and ``num_mixed``, and no generator's state is read or changed.
    A pair's probability is off by less than 2⁻³² at most, from the multiplication that maps 32 bits onto the pairs.

    Args:
        num_rows: N ≥ 0.
        num_mixed: m ≥ 0 pairs for each row.
        k: how many vectors there are to choose from, 2 to 65536.
        seed: any integer; taken modulo 2⁶⁴.
        device: where the pairs are made; default: PyTorch's default device.
        first_row: ≥ 0; for a part of a larger batch, which row of it the first one is.

    Returns:
        (num_rows, num_mixed, 2) int64.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    numbers = {"num_rows": num_rows, "num_mixed": num_mixed, "k": k, "seed": seed, "first_row": first_row}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name}: expected an integer, got {check.describe(value)}")
    if not 2 <= k <= LARGEST_K:
        raise ValueError(f"k: expected 2 to {LARGEST_K} vectors, of which two are mixed, got {check.shown(k)}")
    for name in ("num_rows", "num_mixed", "first_row"):
        if (value := numbers[name]) < 0:
            raise ValueError(f"{name}: expected at least 0, got {check.shown(value)}")
        if isinstance(value, int) and value >= _WORD // 2:
            raise ValueError(f"{name}: expected a number of 64 bits, got {check.shown(value)}")
    if _runs_in_cpp(device, *numbers.values()):
        return torch.ops.hicl_fast_cpp.random_pairs(num_rows, num_mixed, k, _signed(seed % _WORD), first_row)
    return _random_pairs(num_rows, num_mixed, k, seed, device, first_row)


def _runs_in_cpp(device: torch.device | str | None, *numbers: int | torch.SymInt) -> bool:
    """One pass of csrc/cpu/pairs.cpp, where it is there and nothing is traced."""
    is_traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    if is_traced or not all(isinstance(number, int) for number in numbers):
        return False
    device = torch.get_default_device() if device is None else torch.device(device)
    return device.type == "cpu" and registry.is_available("cpp")


def _random_pairs(
    num_rows: int, num_mixed: int, k: int, seed: int, device: torch.device | str | None, first_row: int
) -> Tensor:  # (num_rows, num_mixed, 2) int64
    row = first_row + torch.arange(num_rows, dtype=torch.int64, device=device)
    pair = torch.arange(num_mixed, dtype=torch.int64, device=device)
    counter = (row << 32)[:, None] + pair
    random = _shift_right(_mix(counter * _signed(_GOLDEN) + _mixed_seed(seed)), 32)  # 32 bits
    return _pair_of_rank((random * (k * (k - 1) // 2)) >> 32)


def _pair_of_rank(rank: Tensor) -> Tensor:  # (...,) -> (..., 2)
    """The pairs in order, (0, 1), (0, 2), (1, 2), (0, 3), ...: rank = b (b − 1) / 2 + a."""
    b = ((1 + torch.sqrt((8 * rank + 1).to(torch.float32))) / 2).to(torch.int64)
    b = b - (b * (b - 1) // 2 > rank).to(torch.int64)  # float32's root is off by one at most
    b = b + (b * (b + 1) // 2 <= rank).to(torch.int64)
    return torch.stack((rank - b * (b - 1) // 2, b), dim=-1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser: every bit of the result depends on every bit of x."""
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=True):
        x = (x ^ _shift_right(x, shift)) * _signed(multiplier)
    return x ^ _shift_right(x, _LAST_SHIFT)


def _mixed_seed(seed: int) -> int:
    """:func:`_mix` of the seed, on the host, so that neighbouring seeds are far apart."""
    x = (seed + _GOLDEN) % _WORD
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=True):
        x = (x ^ (x >> shift)) * multiplier % _WORD
    return _signed(x ^ (x >> _LAST_SHIFT))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """``>>`` as if x were unsigned: PyTorch's repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word
