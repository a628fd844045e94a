"""Writing large pieces of a file: past the page cache where the file system and the alignment allow it, else through it; never through a map."""

from __future__ import annotations

import errno
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moeglot.errors import NoSpace
from moeglot.files.mapped import let_go
from moeglot.files.remote import Location
from moeglot.files.shards import ALIGNMENT, Piece, tensor_bytes, write_at

if TYPE_CHECKING:
    import torch

LARGE = 1 << 20
"""Bytes from which a write is worth its own trip to the disk."""
PIECE = 1 << 25


class File(Protocol):
    """A file to be written, whose bytes that are not tensors are known beforehand. `header`: those that no tensor changes any more."""

    @property
    def nbytes(self) -> int: ...

    @property
    def header(self) -> bytes: ...

    @property
    def frames(self) -> tuple[tuple[int, bytes], ...]: ...


def allocate(path: Path, shard: File) -> None:
    """Create the file at its full size and write what is known beforehand; raises `NoSpace` before any tensor is written."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        if hasattr(os, "posix_fallocate"):  # macOS has none; there a full disk shows while writing
            os.posix_fallocate(descriptor, 0, shard.nbytes)
        else:
            os.ftruncate(descriptor, shard.nbytes)
        for offset, data in shard.frames:
            write_at(descriptor, memoryview(data), offset)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise no_space(path, shard.nbytes) from error
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """What was written to a file, or the names in a folder, are on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # what a file system says that has no such thing for folders
            raise
    finally:
        os.close(descriptor)


def no_space(path: Location, needed: int, started: bool = True) -> NoSpace:
    """The refusal for a full disk, before or after something was written."""
    return NoSpace(
        f"no space left for {path.name}",
        f"it needs {needed:,} bytes on the disk of {path.parent}",
        "free space there, then pass --resume to go on" if started else "free space there or choose another OUT; nothing was written",
    )


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

    def put(self, tensor: torch.Tensor, pieces: tuple[Piece, ...], at: int = 0) -> None:
        """The bytes of a tensor from `at` in the pieces in turn, and the checksum of each piece that is then whole. Only in one without a checksum may it fill
        a part; raises `ValueError` for a tensor that would lie elsewhere.
        """
        nbytes, room = tensor.numel() * tensor.element_size(), sum(piece.nbytes for piece in pieces)
        in_parts = len(pieces) == 1 and not pieces[0].sums
        if at + nbytes > room or (nbytes < room and not in_parts):
            raise ValueError(f"{nbytes} bytes from {at} on do not fit in the {room} of {len(pieces)} pieces")
        if in_parts:
            self.write(tensor, pieces[0].offset + at)
            return
        data = tensor_bytes(tensor)
        for piece in pieces:
            run, data = data[: piece.nbytes], data[piece.nbytes :]
            for first in range(0, piece.nbytes, PIECE):
                self._write(run[first : first + PIECE], piece.offset + first)
            checksum = zlib.crc32(run).to_bytes(4, "little")
            for place in piece.sums:
                self._write(memoryview(checksum), place)
            let_go()

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
