"""Stores of fsspec that count what is read of them: one in memory, and one on S3's protocol where s3fs is installed."""

from __future__ import annotations

from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

READ: list[tuple[str, int]] = []
"""(file, bytes) of each request."""
RANGES: list[tuple[str, int, int]] = []
"""(file, first byte, the one after the last) of each request for a range."""


class CountingMemory(MemoryFileSystem):
    """What lies in memory://, each read of it told."""

    protocol = "counted"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("counted://", "memory://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **more: Any) -> bytes:
        found: bytes = super().cat_file(path, start, end, **more)
        READ.append((path.rsplit("/", 1)[-1], len(found)))
        RANGES.append((READ[-1][0], start or 0, (start or 0) + len(found)))
        return found

    def open(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("opened as a whole")


fsspec.register_implementation("counted", CountingMemory, clobber=True)


def upload(fs: Any, folder: Any, to: str) -> None:
    """The files of a folder, into a store."""
    for path in sorted(folder.iterdir()):
        fs.pipe_file(f"{to}/{path.name}", path.read_bytes())


def total() -> int:
    return sum(count for _, count in READ)
