"""A file that is read where it lies: one map of it, and whether it is still the one whose header was read."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from moeglot.errors import BrokenFile
from moeglot.files.remote import Location, Remote


class State(NamedTuple):
    """What is another once a file is: offsets that one file's header says are none of another's."""

    size: int
    changed: int
    inode: int
    """0 where it is not told: of a store, and of a file that another machine looked at, which may number them otherwise."""

    @classmethod
    def of(cls, path: Location) -> State:
        try:
            now = path.stat()
        except FileNotFoundError:
            return GONE
        return cls(now.st_size, now.st_mtime_ns, getattr(now, "st_ino", 0))

    def __reduce__(self) -> tuple[type[State], tuple[int, int, int]]:
        return State, (self.size, self.changed, 0)

    def check(self, path: Location, now: State) -> None:
        """Raises `BrokenFile` where the file is another by now."""
        if now[:2] != self[:2] or (self.inode and now.inode != self.inode):
            known = "it is gone" if now == GONE else f"it had {self.size} bytes then and has {now.size}; somebody has written it meanwhile"
            raise BrokenFile(f"{path.name}: not the file any more whose header was read", known, "start again, once nobody writes to its folder")


GONE = State(-1, 0, 0)


def check_unchanged(files: Iterable[tuple[Location, State]]) -> None:
    """Raises `BrokenFile` where a file is no longer in the state in which its header was read."""
    for path, then in dict.fromkeys(files):
        if isinstance(path, Remote):
            path.refresh()
        then.check(path, State.of(path))


@cache
def mapping(path: Path, state: State) -> mmap.mmap:
    """One map for each state of a file, so that one that was replaced is read anew."""
    with open(path, "rb") as file:
        now = os.fstat(file.fileno())
        state.check(path, State(now.st_size, now.st_mtime_ns, now.st_ino))
        found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # private: torch wants a writable buffer, nothing writes to it
    _maps.append(found)
    return found


_maps: list[mmap.mmap] = []


def let_go() -> None:
    """Pages of mapped files that were touched count as ours until we say so; whoever needs one again reads it again."""
    for found in _maps if hasattr(mmap, "MADV_DONTNEED") else ():
        found.madvise(mmap.MADV_DONTNEED)


def forget_mappings() -> None:
    """Drop all maps, because files are about to be renamed."""
    mapping.cache_clear()
    _maps.clear()
