"""The emulator finds what it is there to find, and rounds as GPUs do."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cuda import emulation


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if emulation.COMPILER is None:
        pytest.skip("no C++ compiler")
    source = Path(__file__).with_name("emulator_driver.cu")
    library = ctypes.CDLL(str(emulation.build(tmp_path_factory.mktemp("emulator"), [source], "driver.so")))
    library.describe.restype = ctypes.c_char_p
    library.to_bfloat16.restype = library.to_float16.restype = ctypes.c_uint16
    library.to_bfloat16.argtypes = library.to_float16.argtypes = [ctypes.c_float]
    library.of_float16.restype, library.of_float16.argtypes = ctypes.c_float, [ctypes.c_uint16]
    return library


def pointer(x: np.ndarray) -> Any:
    return x.ctypes.data_as(ctypes.c_void_p)


def test_a_missing_barrier_shows(driver: ctypes.CDLL, order: int) -> None:
    given, out = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    assert driver.reverse(pointer(given), pointer(out), 1) == 0
    assert (out == given[::-1]).all()
    assert driver.reverse(pointer(given), pointer(out), 0) == 0
    assert np.isnan(out).any()


def test_threads_that_wait_without_end_are_an_error(driver: ctypes.CDLL, order: int) -> None:
    assert b"wait for each other" in driver.describe(driver.divergent())


def test_a_write_past_shared_memory_is_an_error(driver: ctypes.CDLL) -> None:
    assert b"past the end" in driver.describe(driver.overrun())


def test_copies_arrive_when_they_are_waited_for(driver: ctypes.CDLL) -> None:
    given, out = np.arange(1, 9, dtype=np.float32), np.zeros(8, np.float32)
    driver.copy(pointer(given), pointer(out), 1)
    assert out.tolist() == [1, 2, 3, 4, 5, 6, 0, 0]  # the second thread copies half, and zeros
    driver.copy(pointer(given), pointer(out), 0)
    assert np.isnan(out).all()


def test_warps(driver: ctypes.CDLL, order: int) -> None:
    given = np.arange(-10, 22, dtype=np.float32)
    total, positive = np.zeros(32, np.float32), np.zeros(32, np.uint32)
    driver.warp(pointer(given), pointer(total), pointer(positive))
    assert (total == given.sum()).all()
    assert (positive == sum(1 << lane for lane in range(32) if given[lane] > 0)).all()


def test_rounding_is_pytorchs(driver: ctypes.CDLL) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2000, generator=generator) * torch.logspace(-9, 6, 2000)
    values = torch.cat(
        [values, torch.tensor([0.0, 65519.0, 65520.0, 1e30, -1e30, 6e-8, 2.9e-8, 2**-14, 2**-14 - 2**-26])]
    )
    for name, dtype in (("to_bfloat16", torch.bfloat16), ("to_float16", torch.float16)):
        expected = values.to(dtype).view(torch.int16).numpy().astype(np.uint16)
        assert [getattr(driver, name)(float(x)) for x in values] == expected.tolist()
    every = torch.arange(0, 65536, 7).to(torch.uint16)
    expected = every.view(torch.float16).float().numpy()
    np.testing.assert_array_equal([driver.of_float16(int(bits)) for bits in every], expected)
