"""Digests: the sha256 of files, as a certificate states them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from moeglot.files.remote import Location, Remote

CERTIFICATE = "moeglot.json"
CHUNK, REQUEST = 1 << 20, 1 << 24
"""Bytes that are hashed at a time: in the nearest caches, or as a store is asked for them."""


def sha256(path: Location) -> str:
    """Hex digest of a file's bytes."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(REQUEST if isinstance(path, Remote) else CHUNK))
    with path.open("rb") as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def digests(paths: Sequence[Location], threads: int) -> dict[Location, str]:
    """Of files by the thread each, the largest first, so that the threads end together."""
    from concurrent.futures import ThreadPoolExecutor

    ordered = sorted(paths, key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(ordered, pool.map(sha256, ordered), strict=True))
