"""The commands and the Python that README.md and docs/ show, found where they stand."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

PROGRAMS = ("python", "make", "pip", "pytest")
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`]+)`")
_COMMAND = re.compile(rf"^\s*(?:[A-Z_]+=\S* )*(?:[A-Z_]+=\")?(?:{'|'.join(PROGRAMS)}) ", re.MULTILINE)
_SAY = "".join(f"{name}() {{ printf '%s\\0' {name} \"$@\"; printf '\\n'; }}\n" for name in PROGRAMS)


@dataclass(frozen=True)
class Shown:
    """What a page shows: a command's words, or a block of Python."""

    page: str
    line: int
    words: tuple[str, ...] = ()
    python: str = ""

    @property
    def program(self) -> str:
        """What is run, without its arguments: "python -m hicl_fast.info", "make test"."""
        return " ".join(self.words[: 3 if self.words[1] == "-m" else 2])

    @property
    def arguments(self) -> list[str]:
        """Those of the program; "...", which stands for more of them, is the last."""
        return list(self.words[3 if self.words[1] == "-m" else 2 :])

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {' '.join(self.words)[:80]}"


def python_blocks() -> list[Shown]:
    return [Shown(page, line, python=text) for page, line, language, text in _blocks() if language == "python"]


def commands() -> list[Shown]:
    """Every command, once, its loops and variables expanded by a shell that runs none of them."""
    found = {}
    for page, line, text in [*_shell_blocks(), *_inline()]:
        for words in _expanded(text):
            found.setdefault(words, Shown(page, line, words))
    return list(found.values())


def _blocks() -> list[tuple[str, int, str, str]]:
    found = []
    for path in PAGES:
        text = path.read_text()
        for block in _BLOCK.finditer(text):
            lines = (line.removeprefix(block[1]) for line in block[3].splitlines())
            line = text.count("\n", 0, block.start()) + 1
            found.append((path.relative_to(ROOT).as_posix(), line, block[2], "\n".join(lines) + "\n"))
    return found


def _shell_blocks() -> list[tuple[str, int, str]]:
    return [
        (page, line, text)
        for page, line, language, text in _blocks()
        if language in ("sh", "bash", "console") or (not language and _COMMAND.search(_plain(text)))
    ]


def _inline() -> list[tuple[str, int, str]]:
    found = []
    for path in PAGES:
        text = _BLOCK.sub(lambda block: "\n" * block[0].count("\n"), path.read_text())
        for span in _INLINE.finditer(text):
            command = " ".join(span[1].split())
            if _COMMAND.match(_plain(command)):
                found.append((path.relative_to(ROOT).as_posix(), text.count("\n", 0, span.start()) + 1, command))
    return found


def _plain(text: str) -> str:
    """Without what says where a program lies and how it is timed: a shell's function has no path."""
    return re.sub(r"\.venv/bin/|/usr/bin/time -v ", "", text)


def _expanded(text: str) -> list[tuple[str, ...]]:
    # Nothing is on the path: whatever is none of PROGRAMS ends this, and is a command that has to be taken in above.
    done = subprocess.run(["/bin/bash", "-euc", _SAY + _plain(text)], env={"PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, f"{text}\n{done.stderr}"
    return [tuple(line.split("\0")[:-1]) for line in done.stdout.splitlines()]
