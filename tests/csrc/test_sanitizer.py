"""What ``make sanitize`` relies on: that memory of a call has ends which the sanitizer knows."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tools import sanitize

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not sanitize.runtime("libasan.so"), reason="needs a compiler with AddressSanitizer")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("sanitizer") / "driver"
    command = [sanitize.compiler(), "-std=c++17", "-O1", "-g1", sanitize.SANITIZERS, f"-I{ROOT / 'csrc' / 'cpu'}"]
    subprocess.run([*command, str(Path(__file__).with_name("sanitizer_driver.cpp")), "-o", str(target)], check=True)
    return target


@pytest.mark.parametrize("what", ["write", "operand"])
def test_a_part_of_a_workspace_ends(driver: Path, what: str) -> None:
    assert subprocess.run([str(driver), what, "0"]).returncode == 0
    beyond = subprocess.run([str(driver), what, "1"], capture_output=True, text=True)
    assert beyond.returncode != 0
    assert "heap-buffer-overflow" in beyond.stderr


def test_more_than_a_workspace_was_made_for(driver: Path) -> None:
    assert subprocess.run([str(driver), "take", "0"]).returncode == 3
