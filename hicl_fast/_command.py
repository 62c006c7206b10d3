"""What the commands share: options that are checked as they are read, and words instead of tracebacks.

A command ends with 2 where it can't do what its options ask, with 1 where something else failed, and says on standard
error what it was. A traceback is left for what nobody foresaw: a bug.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from hicl_fast import _checks as check
from hicl_fast.ops.backends import BackendError, registry

LONGEST_MESSAGE = 400  # characters of what argparse says, which repeats what it was given
LONGEST_PATH = 200

# Packages of the optional dependencies and the extra that brings them; None: the one of the command itself.
EXTRAS = {
    "accelerate": "trainer",
    "matplotlib": None,
    "open_clip": "open-clip",
    "pytorch_metric_learning": "metric-learning",
    "safetensors": "trainer",
    "scipy": "trainer",
    "sentence_transformers": "sentence-transformers",
    "tokenizers": "trainer",
    "tqdm": None,
    "transformers": "trainer",
    "triton": "triton",
}

Value = TypeVar("Value")
Main = TypeVar("Main", bound=Callable[..., Any])


class UsageError(ValueError):
    """The options ask for what can't be had."""


class Failed(SystemExit):
    """Ends the program with ``code``; ``str`` of it is what was said on standard error."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(f"error: {message}")
        self.code = code


def fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise Failed(message, code) from None


def command(extra: str = "trainer", *errors: type[Exception]) -> Callable[[Main], Main]:
    """For a command's ``main``: what a user can put right is said in a line.

    Args:
        extra: the optional dependencies that it needs.
        errors: what it raises with words for the user, beside ValueError, OSError and BackendError.
    """

    in_words: tuple[type[Exception], ...] = (ValueError, OSError, BackendError, *errors)

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return main(*args, **kwargs)
            except UsageError as error:
                fail(str(error), 2)
            except in_words as error:
                fail(str(error), 1)
            except ImportError as error:
                if (missing := _missing(error, extra)) is None:
                    raise
                fail(missing, 1)
            except KeyboardInterrupt:
                fail("interrupted", 130)

        return run  # type: ignore[return-value]

    return decorate


@contextmanager
def needs(extra: str, module: str) -> Iterator[None]:
    """Around imports of optional packages: says which extra brings the one that is missing.

    Args:
        extra: the command's own.
        module: ``__name__``; a module that is imported, not run, raises ImportError.
    """
    try:
        yield
    except ImportError as error:
        if (missing := _missing(error, extra)) is None:
            raise
        if module == "__main__":
            fail(missing, 1)
        raise ImportError(missing, name=error.name) from error


def _missing(error: ImportError, extra: str) -> str | None:
    """In words, where it is an optional package that is missing or too old."""
    package = (error.name or "").partition(".")[0]
    if package in EXTRAS:
        return f"{package} is not installed: pip install 'hicl-fast[{EXTRAS[package] or extra}]'"
    if error.name is None:  # a library's own words for what it lacks itself
        words = " ".join(str(error).split())
        return f"{words[:LONGEST_MESSAGE]} (or: pip install 'hicl-fast[{extra}]')"
    return None


@contextmanager
def usage() -> Iterator[None]:
    """Around checks of options: what they refuse is the user's to put right, any other TypeError a bug."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if isinstance(error, TypeError) and not re.match(r"[\w-]+: expected ", str(error)):
            raise
        raise UsageError(str(error)) from error


class Parser(argparse.ArgumentParser):
    """Says "name: expected …, got …" as all errors here do, and not "argument --name: …"."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (?:-\w/)?-{1,2}([\w-]+)(?:/\S*)?:", r"\1:", message)
        cut = message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]}…"
        fail(f"{cut} (--help lists the options)", 2)


def option(parse: Callable[[str], Value], check_value: Callable[[str, Any], None]) -> Callable[[str], Value]:
    """An argparse type: what ``parse`` makes of the text, if the check has nothing against it."""

    def convert(text: str) -> Value:
        value: Any = text  # where it can't be parsed the check says what was expected
        try:
            value = parse(text)
        except ValueError:
            pass
        try:
            check_value("", value)
        except (ValueError, TypeError) as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from None
        return value

    return convert


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    return option(int, functools.partial(check.whole_number, least=least, most=most))


positive = option(float, check.positive_number)


def check_device(name: str, value: object) -> None:
    """A device that PyTorch can put a tensor on."""
    expected = "cpu, cuda, cuda:1 or another device that PyTorch has here"
    try:
        is_there = torch.device(value).type != "meta" and torch.empty(0, device=value) is not None  # type: ignore[call-overload]
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):
        is_there = False
    if not is_there:
        raise ValueError(f"{name}: expected {expected}, got {check.describe(value)}")


def check_backend(backend: str, operator: str, device: str | torch.device, dtype: torch.dtype = torch.float32) -> None:
    """A backend that is there and does the operator on that device.

    Raises:
        ValueError: with the reason, and the backends that do.
    """
    try:
        registry.choose(backend, operator, torch.device(device).type, dtype)
    except BackendError as error:
        raise ValueError(str(error)) from None


def _shown(path: Path) -> str:
    """The end of a long path is what tells it from others."""
    text = str(path)
    return text if len(text) <= LONGEST_PATH else f"…{text[-LONGEST_PATH:]}"


def check_input_file(name: str, path: Path) -> None:
    if not path.is_file():
        raise ValueError(
            f"{name}: expected a file, but {_shown(path)} {'is a folder' if path.is_dir() else 'is not there'}"
        )


def check_output_file(name: str, path: Path) -> None:
    """A file that can be written, before what is to be written is worked out."""
    if path.is_dir():
        raise ValueError(f"{name}: expected a file, but {_shown(path)} is a folder")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ValueError(f"{name}: expected a file in a folder that is there, got {_shown(path)}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"{name}: expected a file that can be written, got {_shown(path)}")


def check_output_folder(name: str, path: Path) -> None:
    """A folder that is there or can be made."""
    path = path.resolve()
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    if not nearest.is_dir():
        raise ValueError(f"{name}: expected a folder, but {_shown(nearest)} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{name}: expected a folder that can be written to, but {_shown(nearest)} can't")


input_file = option(Path, check_input_file)
output_file = option(Path, check_output_file)
output_folder = option(Path, check_output_folder)
device = option(str, check_device)
backend = option(str, lambda name, value: registry.check_name(value, name))
