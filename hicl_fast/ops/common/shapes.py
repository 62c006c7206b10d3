"""What the registered operators ask of shapes: whoever calls ``torch.ops.hicl_fast`` comes past no other check."""

from __future__ import annotations

from torch import Tensor


def check_shapes(operator: str, **arguments: tuple[Tensor | None, str]) -> None:
    """Raise ``ValueError`` where sizes don't fit together; kernels would read other memory.

    Args:
        operator: its name.
        arguments: by name a tensor and its shape, a letter for each dimension: the same letter is the same size, at least 1
            for N; where there is an N, O (offsets) is one more; and a digit is itself.
    """
    sizes: dict[str, int] = {}
    for name, (x, shape) in arguments.items():
        if x is None:
            continue
        expected = [_size(s, sizes) for s in shape]
        fits = x.dim() == len(shape) and all(
            isinstance(want, str) or want == got for want, got in zip(expected, x.shape, strict=True)
        )
        if not fits or ("N" in shape and x.shape[shape.index("N")] == 0):
            wanted = ", ".join(map(str, expected))
            raise ValueError(f"{operator}: {name}: expected shape ({wanted}), got {tuple(x.shape)}")
        sizes.update({s: got for s, got in zip(shape, x.shape, strict=True) if not s.isdigit()})


def _size(letter: str, sizes: dict[str, int]) -> int | str:
    if letter.isdigit():
        return int(letter)
    return sizes["N"] + 1 if letter == "O" and "N" in sizes else sizes.get(letter, letter)
