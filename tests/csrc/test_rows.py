"""The row kernels at every vector width, whatever this processor has: wide vectors are split by the compiler."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++")
# Around one and two vectors of 4, 8 and 16 elements, and a single one.
LENGTHS = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 70)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


class Rows:
    def __init__(self, library: ctypes.CDLL, dtype: type) -> None:
        self.library, self.dtype = library, dtype
        self.real = ctypes.c_double if dtype is np.float64 else ctypes.c_float

    def __call__(self, name: str, *arguments: Any) -> float:
        function = getattr(self.library, name)
        function.restype = self.real
        converted = []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                assert argument.dtype == self.dtype or argument.dtype.kind == "i"
                converted.append(argument.ctypes.data_as(ctypes.c_void_p))
            else:
                is_length = isinstance(argument, int)
                converted.append(ctypes.c_int64(argument) if is_length else self.real(argument))
        return function(*converted)


@pytest.fixture(scope="module", params=[(b, d) for b in (16, 32, 64) for d in (np.float32, np.float64)], ids=str)
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    width, dtype = request.param
    target = tmp_path_factory.mktemp("rows") / "rows.so"
    real = "double" if dtype is np.float64 else "float"
    source = Path(__file__).with_name("rows_driver.cpp")
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cpu'}"]
    flags += [f"-DHICL_VEC_BYTES={width}", f"-DREAL={real}"]
    subprocess.run([str(COMPILER), *flags, str(source), "-o", str(target)], check=True)
    return Rows(ctypes.CDLL(str(target)), dtype)


def draw(rows: Rows, n: int, low: float = -3.0, high: float = 3.0) -> np.ndarray:
    return np.random.default_rng(n).uniform(low, high, n).astype(rows.dtype)


def near(rows: Rows, got: Any, expected: Any, size: float = 1.0) -> None:
    tolerance = 16 * float(np.finfo(rows.dtype).eps)
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("n", LENGTHS)
def test_linear(rows: Rows, n: int) -> None:
    a, b, c = draw(rows, n), draw(rows, n)[::-1].copy(), draw(rows, n) ** 2
    near(rows, rows("dot", a, b, n), float(a.astype(float) @ b.astype(float)), size=n)
    out = np.full(n, np.nan, rows.dtype)
    rows("scale", a, 1.5, out, n)
    near(rows, out, a * rows.dtype(1.5))
    y = b.copy()
    rows("add_scaled", a, -0.5, y, n)
    near(rows, y, b - a / 2, size=4)
    y = b.copy()
    rows("combine", y, 2.0, 3.0, a, -1.5, c, n)
    near(rows, y, 2 * b + 3 * a - 1.5 * c, size=20)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7])
def test_several_rows_at_once(rows: Rows, count: int, n: int) -> None:
    x, y, out = draw(rows, n), draw(rows, 7 * n).reshape(7, n), np.full(7, 9, rows.dtype)
    rows("dots", x, y, count, out, n)
    near(rows, out[:count], y[:count].astype(float) @ x.astype(float), size=n)
    assert (out[count:] == 9).all()
    skipped, factor = 2, draw(rows, 7)
    wide, total = draw(rows, 7 * (n + skipped)).reshape(7, n + skipped), x.copy()
    rows("add_rows", total, wide, factor, count, skipped, n)
    near(rows, total, x + factor[:count].astype(float) @ wide[:count, skipped:], size=10 * (1 + count))


@pytest.mark.parametrize("n", LENGTHS)
def test_softmax(rows: Rows, n: int) -> None:
    raw, factors = draw(rows, n), np.abs(draw(rows, n)) + rows.dtype(0.5)
    row = raw.copy()
    largest = rows("to_logits", row, factors, 20.0, n)
    near(rows, row, raw * factors * 20, size=100)
    assert largest == row.max()

    row[n // 2] = -np.inf  # a column that is left out
    logits, offset = row.astype(float), float(row.max()) if n > 1 else 0.0
    weights = np.exp(logits - offset)
    near(rows, rows("exp_sum", row, offset, n), weights.sum(), size=n)
    again, moment = row.copy(), np.zeros(1, rows.dtype)
    near(rows, rows("exp_in_place", row, factors, offset, n), weights.sum(), size=n)
    np.testing.assert_allclose(row, weights * factors, rtol=3e-5 if rows.dtype is np.float32 else 1e-12, atol=1e-37)
    near(rows, rows("exp_in_place_with_moment", again, factors, offset, n, moment), weights.sum(), size=n)
    assert (again == row).all()
    near(
        rows,
        moment[0],
        np.where(weights > 0, weights * np.nan_to_num(logits - offset, neginf=0), 0).sum(),
        size=100 * n,
    )


@pytest.mark.parametrize("n", LENGTHS)
def test_columns(rows: Rows, n: int) -> None:
    first, second = draw(rows, n), draw(rows, n)[::-1].copy()
    second[0] = first[0] = -np.inf  # left out of both rows
    best, total = np.full(n, -np.inf, rows.dtype), np.zeros(n, rows.dtype)
    for row in (first, second):
        rows("column_max", row, best, n)
    np.testing.assert_array_equal(best, np.maximum(first, second))
    for row in (first, second):
        rows("column_exp_sum", row, best, total, n)
    expected = np.zeros(n)
    expected[1:] = np.exp(first[1:].astype(float) - best[1:]) + np.exp(second[1:].astype(float) - best[1:])
    near(rows, total, expected)


@pytest.mark.parametrize("n", (1, 3, 8, 33, 256, 257, 520))
def test_exp_of_difference(rows: Rows, n: int) -> None:
    row = draw(rows, n)
    offset = float(row.max())
    row[n // 2] = -np.inf if n > 1 else row[0]
    expected = np.exp((row.astype(float) - offset) * 5.0)
    near(rows, rows("exp_of_difference", row, offset, 5.0, n), expected.sum(), size=n)
    near(rows, row, expected, size=10)


@pytest.mark.parametrize("n", (1, 3, 8, 33, 256, 257, 520))
@pytest.mark.parametrize("kind", ["different", "equal", "nan", "all nan", "left out"])
def test_largest_and_its_first_place(rows: Rows, kind: str, n: int) -> None:
    row, generator = draw(rows, n), np.random.default_rng(n)
    if kind == "equal":
        row = generator.integers(0, 3, n).astype(rows.dtype)
    elif kind == "nan":
        row[generator.integers(0, n, 3)] = np.nan
    elif kind != "different":
        row[:] = np.nan if kind == "all nan" else -np.inf
    index = np.full(1, -1, np.int64)
    largest = rows("largest", row, n, index)
    assert index[0] == np.argmax(row)  # which takes the first of several, and NaN for the largest
    np.testing.assert_equal(largest, row.max())


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("count", [1, 3, 4, 6, 9])
def test_largest_down_the_columns(rows: Rows, count: int, n: int) -> None:
    generator = np.random.default_rng(n + count)
    block = generator.integers(0, 4, (count, n)).astype(rows.dtype)
    block[generator.random((count, n)) < 0.1] = np.nan
    best = generator.integers(0, 4, n).astype(rows.dtype)
    at = np.full(n, -1, np.int64 if rows.dtype is np.float64 else np.int32)
    together = np.vstack((best, block))
    rows("column_largest", block, count, best, at, n)
    np.testing.assert_array_equal(at, np.argmax(together, axis=0) - 1)
    np.testing.assert_array_equal(best, together.max(axis=0))


def test_exp_over_its_whole_range(rows: Rows) -> None:
    lowest = -87.3 if rows.dtype is np.float32 else -708.0
    x = np.linspace(lowest, 0.0, 4001).astype(rows.dtype)
    expected, ones = np.exp(x.astype(float)), np.ones_like(x)
    rows("exp_in_place", x, ones, 0.0, len(x))
    relative = np.abs(x - expected) / expected
    assert relative.max() < 2 * np.finfo(rows.dtype).eps


def test_exp_of_extremes(rows: Rows) -> None:
    x = np.array([-np.inf, -1e30, -1e5, 0.0, np.nan], rows.dtype)
    rows("exp_in_place", x, np.ones_like(x), 0.0, len(x))
    np.testing.assert_array_equal(x, np.array([0, 0, 0, 1, np.nan], rows.dtype))
