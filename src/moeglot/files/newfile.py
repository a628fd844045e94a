"""A new file or folder: refused where something is before there is work to lose, and then there as a whole or not at all."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moeglot.errors import OutputExists, UsageError


def check(path: Path | None, option: str) -> None:
    """Before the work, not after it: raises `OutputExists` where something is, and `UsageError` where no file can be made."""
    if path is None:
        return
    _refuse_old(path)
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}", f"{option} names a file to write", "make the folder first, or choose another")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path}: {path.parent} takes no new files", f"{option} names a file to write", "choose another folder, or change its permissions")


@contextmanager
def making(path: Path) -> Iterator[Path]:
    """Where to write what is to become `path`; it gets its name once the block is done, and is removed if that fails."""
    _refuse_old(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield part
        part.rename(path)
    except OSError as error:
        error.filename = str(path)  # the name that the user knows
        raise
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def by_library(path: Path) -> Iterator[None]:
    """What the system refuses safetensors, as Python says it: `OSError` with its number and the file."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        if not (number := re.search(r"os error (\d+)", str(error))):
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error


@contextmanager
def folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, to be renamed to it; where that does not happen, it is removed with all that is in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as around:
        made = Path(around) / path.name
        made.mkdir()  # with the permissions of any other: those of a temporary folder are for its owner alone
        yield made


def write(path: Path, text: str) -> None:
    with making(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")  # a path may be no text


def _refuse_old(path: Path) -> None:
    if os.path.lexists(path):
        raise OutputExists(f"{path} exists", "moeglot overwrites nothing", "choose another name, or remove it yourself")
