"""Digests: the sha256 of files, and those that a certificate beside them states."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from moeglot.remote import Location, Remote

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


def certified(folder: Location) -> Mapping[str, str]:
    """File -> the sha256 that the certificate in a folder states; nothing where there is no certificate, or one that says none."""
    try:
        said = json.loads((folder / CERTIFICATE).read_text(encoding="utf-8"))["output"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return said if isinstance(said, Mapping) else {}
