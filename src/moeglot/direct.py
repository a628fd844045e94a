"""Writing large pieces of a file: past the page cache where the file system and the alignment allow it, else through it; never through a map."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from moeglot.shards import ALIGNMENT, let_go, tensor_bytes, write_at

if TYPE_CHECKING:
    import torch

LARGE = 1 << 20
"""Bytes from which a write is worth its own trip to the disk."""
PIECE = 1 << 25


class Output:
    """A file of known size that is written at known places, by several threads."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR)
        self._direct: int | None = None
        if hasattr(os, "O_DIRECT"):  # not on macOS
            try:
                self._direct = os.open(path, os.O_RDWR | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:  # what a file system says that has no such thing
                    raise

    def write(self, tensor: torch.Tensor, offset: int) -> int:
        """The bytes of a tensor, row-major, at `offset`; returns how many they are."""
        data = tensor_bytes(tensor)
        for at in range(0, len(data), PIECE):
            self._write(data[at : at + PIECE], offset + at)
            let_go()
        return len(data)

    def _write(self, data: memoryview, offset: int) -> None:
        if self._direct is not None and len(data) >= LARGE and not (_address(data) | offset | len(data)) % ALIGNMENT:
            try:
                return write_at(self._direct, data, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:  # a disk with larger sectors
                    raise
        write_at(self._descriptor, data, offset)

    def close(self, flush: bool = False) -> None:
        """`flush`: what was written is on the disk when this returns, and not only on its way."""
        if flush:
            os.fsync(self._descriptor)
        for descriptor in (self._descriptor, self._direct):
            if descriptor is not None:
                os.close(descriptor)


def _address(data: memoryview) -> int:
    import numpy

    return int(numpy.frombuffer(data, numpy.uint8).ctypes.data)
