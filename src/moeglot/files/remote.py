"""A file or a folder of a store that fsspec speaks to, by its URL: what we ask of a path, and ranges of bytes.

https://filesystem-spec.readthedocs.io. Credentials and endpoints are fsspec's own affair: its config files and environment (`FSSPEC_S3_ENDPOINT_URL`).
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from moeglot.errors import CheckpointError, MoeglotError, OutputError, UsageError

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::[A-Za-z0-9+.-]+)*://.+")
COLLAPSED = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/[^/]")
"""What `pathlib` makes of a URL."""
BLOCKS = re.compile(r"(^|::)(blockcache|cached)::")
"""What fsspec calls it."""
CHANGED = ("ETag", "etag", "mtime", "LastModified", "last_modified", "created")
"""What stores call the mark of a file's state, the surest first."""


class Stat(NamedTuple):
    """As `os.stat` says it."""

    st_size: int
    st_mtime_ns: int
    """Of a store: any number that is another once the file is."""


@dataclass(frozen=True, order=True)
class Remote:
    """A URL with the methods of `pathlib.Path` that reading a checkpoint needs."""

    url: str

    @cached_property
    def _store(self) -> tuple[Any, str]:
        """(file system, path in it)"""
        with _refusals(self.url):
            from fsspec.core import url_to_fs

            found: tuple[Any, str] = url_to_fs(self.url)
            return found

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url.rstrip('/')}/{name}")

    def __reduce__(self) -> tuple[type[Remote], tuple[str]]:
        """Another process opens the store for itself."""
        return Remote, (self.url,)

    @property
    def name(self) -> str:
        return PurePosixPath(self.url).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.url).suffix

    @property
    def parent(self) -> Remote:
        return Remote(self.url.rstrip("/").rpartition("/")[0])

    def refresh(self) -> None:
        """Ask the store itself again, where its library would answer from what it has listed."""
        self._store[0].invalidate_cache()

    def stat(self) -> Stat:
        fs, path = self._store
        with _refusals(self.url):
            info = fs.info(path)
        state = next((str(info[key]) for key in CHANGED if info.get(key) is not None), "")
        return Stat(int(info["size"]), int.from_bytes(hashlib.sha256(state.encode()).digest()[:7], "big"))

    def exists(self) -> bool:
        fs, path = self._store
        with _refusals(self.url):
            return bool(fs.exists(path))

    def is_file(self) -> bool:
        fs, path = self._store
        with _refusals(self.url):
            return bool(fs.isfile(path))

    def is_dir(self) -> bool:
        fs, path = self._store
        with _refusals(self.url):
            return bool(fs.isdir(path))

    def iterdir(self) -> Iterator[Remote]:
        fs, path = self._store
        with _refusals(self.url):
            names = [PurePosixPath(str(found)).name for found in fs.ls(path, detail=False)]
        return (self / name for name in sorted(set(names)))

    def files(self) -> list[Remote]:
        """All that is below it, as deep as it lies; nothing where nothing is there."""
        fs, path = self._store
        with _refusals(self.url):
            self.refresh()
            return [self / found.removeprefix(path.rstrip("/") + "/") for found in sorted(fs.find(path))]

    def range(self, start: int, count: int) -> bytearray:
        """`count` bytes from `start`: one request, and no more bytes than these."""
        fs, path = self._store
        with _refusals(self.url):
            found = bytearray(fs.cat_file(path, start=start, end=start + count))
        if len(found) != count:
            do = "the file changed while it was read; start again" if len(found) < count else "its server gives no ranges of a file: copy it here first"
            raise CheckpointError(f"{self.name}: {len(found)} bytes from {start}, asked for {count}", str(self), do)
        return found

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """To be read from the beginning to the end; each read is one request."""
        assert mode == "rb"
        return io.BufferedReader(_Ranges(self), 1)

    def read_bytes(self) -> bytearray:
        return self.range(0, self.stat().st_size)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes | bytearray) -> None:
        fs, path = self._store
        with _refusals(self.url, "written"):
            fs.pipe_file(path, bytes(data))

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        self.write_bytes(text.encode(encoding))

    def upload(self, file: Path) -> None:
        """What a file of this machine holds; raises `OutputError` unless the store then says that it has as many bytes."""
        fs, path = self._store
        with _refusals(self.url, "written"):
            fs.put_file(str(file), path)
        if self.stat().st_size != file.stat().st_size:
            raise OutputError(
                f"{self}: has {self.stat().st_size} bytes after the upload of {file.stat().st_size}", "so says the store", "pass --resume to go on"
            )

    def move(self, to: Remote) -> None:
        fs, path = self._store
        with _refusals(self.url, "moved"):
            fs.mv(path, to._store[1])

    def remove(self) -> None:
        """With all that is in it; nothing happens if nothing is there."""
        fs, path = self._store
        with _refusals(self.url, "removed"):
            if fs.exists(path):
                fs.rm(path, recursive=True)


Location = Path | Remote


class _Ranges(io.RawIOBase):
    """A remote file as a stream."""

    def __init__(self, path: Remote) -> None:
        self.path, self.at, self.size = path, 0, path.stat().st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self.size - self.at)
        if count > 0:
            buffer[:count] = self.path.range(self.at, count)
        self.at += max(0, count)
        return max(0, count)


def location(path: str | Path) -> Location:
    """A path of this machine, or a URL; `file://` is a path. Raises `UsageError` for what is none: an empty one would be the current folder."""
    if not isinstance(path, (str, os.PathLike)) or not str(path) or "\0" in str(path):
        raise UsageError(f"{path!r} is no path", "a path, a URL or a Hub id is text; the current folder is '.'", "pass the folder that is meant")
    text = str(path)
    for local in ("file://", "local://"):
        if text.startswith(local):
            return Path(text.removeprefix(local))
    if not isinstance(path, str) or not URL.fullmatch(text):
        return Path(path)
    if BLOCKS.search(text):
        known = "fsspec fills its cache of blocks from many threads without a lock, and a block that is there is not asked for again once the file is another"
        raise UsageError(
            f"{text}: bytes that pass through a cache of blocks may be wrong", known, "leave the cache out of the URL, or copy the folder here first"
        )
    return Remote(text)


def here(place: Location) -> Location:
    """The same from wherever this process goes later."""
    return place.absolute() if isinstance(place, Path) else place


def local_only(path: str | Path, what: str) -> Path:
    """A path of this machine; raises `UsageError` for a URL."""
    found = location(path)
    if isinstance(found, Remote) or COLLAPSED.match(str(found)):
        raise UsageError(
            f"{what} {path} is a URL", "files are written in place, at many places at once, and stores take them whole", "write to a folder here, then copy it"
        )
    assert isinstance(found, Path)
    return found


def on_disk(place: Location, reader: str) -> Path:
    """A folder or a file of this machine, for those who read files themselves; raises `UsageError` for a URL."""
    if isinstance(place, Remote):
        raise UsageError(f"{place} is a URL", f"{reader} reads files of this machine", "copy the folder here first, or leave that out")
    return place


@contextmanager
def _refusals(url: str, done: str = "read") -> Iterator[None]:
    """What a store raises, in our three lines. Every library behind fsspec has errors of its own, without a common base, so all are caught."""
    try:
        yield
    except (ImportError, ValueError) as error:
        raise UsageError(f"{url}: no store that could be opened", _reason(error), "install what fsspec says, and check the URL") from error
    except Exception as error:
        if isinstance(error, MoeglotError) or (type(error).__module__ == "builtins" and not isinstance(error, OSError)):
            raise  # ours, or a mistake in this program
        raise CheckpointError(f"{url}: could not be {done}", _reason(error), "check the URL and the credentials that fsspec finds") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
