"""hicl_fast.info: the facts it gathers and the two ways it prints them."""

from __future__ import annotations

import json
import subprocess
import sys

import hicl_fast
from hicl_fast import info


def run_info(*arguments: str) -> str:
    command = [sys.executable, "-m", "hicl_fast.info", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_json_lists_every_backend() -> None:
    found = json.loads(run_info("--json"))
    assert [backend["name"] for backend in found["backends"]] == [status.name for status in hicl_fast.backends()]
    assert hicl_fast.__version__ in found["package"]


def test_text_names_every_fact_and_backend() -> None:
    text = run_info()
    for word in ("python", "torch", "triton", "compiler", "cpu capability", "threads", "devices"):
        assert f"\n{word}" in text
    for status in hicl_fast.backends():
        assert f"\n{status.name:<10}{'yes' if status.available else 'no'}" in text


def test_missing_backend_has_reason_and_remedy(monkeypatch) -> None:
    missing = hicl_fast.BackendStatus("cpp", False, "the extension was not built", "")
    monkeypatch.setattr(hicl_fast, "backends", lambda: [missing])
    found = info.collect()
    assert "compiler" in found["backends"][0]["remedy"]
    text = info.render(found)
    assert "cpp       no          the extension was not built" in text
    assert "To get it: with a C++ compiler" in text


def test_available_backend_has_no_remedy(monkeypatch) -> None:
    there = hicl_fast.BackendStatus("cpp", True, "", "row kernels for avx2")
    monkeypatch.setattr(hicl_fast, "backends", lambda: [there])
    found = info.collect()
    assert found["backends"][0]["remedy"] == ""
    assert "cpp       yes         row kernels for avx2" in info.render(found)


def test_unknown_compiler_is_none_found(monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert info.collect()["compiler"] == "none found"
