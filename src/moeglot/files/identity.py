"""Which source the files of one process were made of: a digest that all processes find alike, though none reads it all, and the mark by which files say it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

from moeglot.errors import Contradiction
from moeglot.files.remote import Location, Remote
from moeglot.files.shards import Entry

SOURCE = "moeglot.source"
"""Key of the mark in a safetensors header, beside `moeglot.share`."""
PLACES = 128
"""Places that are looked at, at equal distances in all files one after the other."""
PIECE = 4096
"""Bytes that are read at each."""
DIGITS = 32


def identity(files: Sequence[Location], entries: Mapping[str, Entry]) -> str:
    """A digest of the names, types and shapes of the tensors, the sizes of the files, and a sample of their bytes; the files' names are not in it."""
    sizes = [path.stat().st_size for path in files]
    tensors = sorted((entry.name, entry.dtype, entry.shape) for entry in entries.values())
    found = hashlib.sha256(json.dumps([sizes, tensors]).encode())
    for path, offset, count in _places(files, sizes):
        found.update(_read(path, offset, count))
    return found.hexdigest()[:DIGITS]


def _places(files: Sequence[Location], sizes: Sequence[int]) -> Iterator[tuple[Location, int, int]]:
    total, first, number = sum(sizes), 0, 0
    for path, size in zip(files, sizes, strict=True):
        while number < PLACES and (at := number * total // PLACES) < first + size:
            yield path, at - first, min(PIECE, first + size - at)
            number += 1
        first += size


def _read(path: Location, offset: int, count: int) -> bytes | bytearray:
    if isinstance(path, Remote):
        return path.range(offset, count)
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(count)


def declared(marks: Iterable[Mapping[str, str]]) -> str | None:
    """What the metadata of all shards says, None if nothing; raises `Contradiction` where they disagree."""
    said = {mark.get(SOURCE) for mark in marks} or {None}
    if len(said) > 1:
        told = " and ".join(sorted(text or "nothing" for text in said))
        raise Contradiction("the shards were made of different sources", f"their headers say {SOURCE} = {told}", "pass the shards of one")
    return said.pop()
