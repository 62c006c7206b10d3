"""What every test shares: which tests run on this machine, and where the data lies."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import hypothesis
import pytest

# Threads of OpenMP wait for their next work in a loop, which takes the core from the other processes of tests. Whoever asks for
# another policy has it; it is read when PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tests.gpu import device  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

# No deadline: times on a shared machine say nothing about right or wrong.
hypothesis.settings.register_profile("hicl_fast", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("hicl_fast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests that can't run here."""
    has_triton = importlib.util.find_spec("triton") is not None
    hindrances = {
        "gpu": "" if device.IS_HERE else "needs a GPU",
        "triton": "" if has_triton else "needs Triton",
        "interpret": "" if has_triton and INTERPRETING else "needs Triton and TRITON_INTERPRET=1: make test-interpret",
        "wheel": "" if os.environ.get("HICL_FAST_WHEEL") else "needs the wheel of `make wheel`: make test-wheel",
    }
    for item in items:
        for marker, hindrance in hindrances.items():
            if hindrance and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=hindrance))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The optional folder of STS tasks and English text: $HICL_FAST_DATA, else ../shared/data beside the checkout."""
    folder = Path(os.environ.get("HICL_FAST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}; HICL_FAST_DATA names the folder")
    return folder
