"""One tensor as torch.save writes it: a zip archive whose record data/0 holds the numbers, and where these lie in it.

https://github.com/pytorch/pytorch/blob/main/torch/serialization.py and caffe2/serialize/inline_container.h: records are stored, not compressed; data.pkl says
dtype, shape and strides.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from functools import lru_cache
from itertools import accumulate
from math import prod
from operator import mul
from pathlib import Path
from typing import Any, NamedTuple

from moeglot.dtypes import DTYPES, DType
from moeglot.errors import BrokenFile
from moeglot.files.shards import ALIGNMENT
from moeglot.files.torch_dist.inert import is_a, look_at, numbers

STORAGES = {"F64": "DoubleStorage", "F32": "FloatStorage", "BF16": "BFloat16Storage", "F16": "HalfStorage", "U8": "ByteStorage", "I8": "CharStorage"}
"""dtype -> torch's name of its storage."""
LARGE = 1 << 20
"""Bytes from which numbers start at a page, so that they can be written past the page cache."""
SMALL_ALIGNMENT = 64  # what torch.save gives every record
SUMMED = 1 << 22
"""Bytes that are summed at a time."""


class _Slice(io.RawIOBase):
    """Some bytes of a file as a file."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length, self._at = descriptor, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, (0, self._at, self._length)[whence] + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._at)
        data = os.pread(self._descriptor, left if size is None or size < 0 else min(size, left), self._offset + self._at)
        self._at += len(data)
        return data


def find_numbers(path: Path, offset: int, length: int, dtype: str, shape: tuple[int, ...]) -> int:
    """Where in a file the numbers of a saved tensor begin; raises `BrokenFile` unless it is a contiguous one of this dtype and shape.

    Their CRC-32 is taken when they are first asked for. One that is 0 says nothing: torch.serialization.set_crc32_options(False) leaves all of them so.
    """
    now = path.stat()
    return _find(path, offset, length, dtype, shape, now.st_ino, now.st_mtime_ns)


@lru_cache(maxsize=1 << 17)
def _find(path: Path, offset: int, length: int, dtype: str, shape: tuple[int, ...], inode: int, changed: int) -> int:
    def refuse(why: str) -> BrokenFile:
        known = f"it should be a tensor {list(shape)} of {dtype}, as .metadata says, saved by torch.save"
        return BrokenFile(f"{path.name}: {length} bytes at {offset}: {why}", known, "fetch the file again from its producer")

    descriptor = os.open(path, os.O_RDONLY)
    try:
        file = _Slice(descriptor, offset, length)
        try:
            with zipfile.ZipFile(file) as archive:
                records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                for info in records.values():
                    if not info.CRC:
                        del info.CRC  # zipfile then asks for none
                if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
                    raise refuse("a record of it is compressed")
                said = look_at(archive.read(records["data.pkl"]), f"{path.name} at {offset}")
                order = archive.read(records["byteorder"]) if "byteorder" in records else b"little"
                record = records["data/0"]
                with archive.open(record):  # whose header is then the directory's
                    start = _content(file, record.header_offset)
        except (zipfile.BadZipFile, KeyError, OSError, RuntimeError, EOFError, ValueError, struct.error) as error:
            raise refuse(f"no saved tensor ({error})") from error
        if not _is_plain(said, dtype, shape) or order != b"little":
            raise refuse("another tensor, or one that is not contiguous")
        if record.file_size < prod(shape) * DTYPES[dtype].size or start + record.file_size > archive.start_dir:
            raise refuse("its numbers are too few, or not where they should be")
        if hasattr(record, "CRC") and _sum(descriptor, offset + start, record.file_size) != record.CRC:
            raise refuse("its numbers are not those whose CRC-32 was saved with them")
        return offset + start
    finally:
        os.close(descriptor)


def _sum(descriptor: int, offset: int, length: int) -> int:
    """The CRC-32 of some bytes of a file."""
    found = 0
    for at in range(0, length, SUMMED):
        found = zlib.crc32(os.pread(descriptor, min(SUMMED, length - at), offset + at), found)
    return found


def _content(file: _Slice, header: int) -> int:
    """Where a record's content begins; raises `ValueError` where the extra fields before it are not as long as they are said to be together."""
    file.seek(header)
    *_, name, length = struct.unpack("<4s5H3L2H", file.read(30))
    file.seek(header + 30 + name)
    extra = file.read(length)
    at = 0
    while at < len(extra):
        at += 4 + int.from_bytes(extra[at + 2 : at + 4], "little")
    if at != length:
        raise ValueError(f"extra fields of {length} bytes end at {at}")
    return header + 30 + int(name) + int(length)


def _is_plain(said: Any, dtype: str, shape: tuple[int, ...]) -> bool:
    """What data.pkl says is a contiguous tensor of this dtype and shape, from the start of its storage."""
    if not is_a(said, "_rebuild_tensor_v2") or len(said.args) < 4:
        return False
    storage, first, size, stride = said.args[:4]
    if not isinstance(storage, tuple) or len(storage) < 2 or getattr(storage[1], "__name__", "") != STORAGES.get(dtype):
        return False
    strides = numbers(stride)
    straight = strides is not None and all(n == 1 or own == want for n, own, want in zip(shape, strides, _strides(shape), strict=True))
    return first == 0 and numbers(size) == shape and straight


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(accumulate(shape[:0:-1], mul, initial=1))[: len(shape)][::-1]


# --- writing -------------------------------------------------------------------------------------------------------------------------


class Frame(NamedTuple):
    """A saved tensor around its numbers: what comes before and after them, and where in the whole their CRC-32 stands (in the bytes it is still 0)."""

    before: bytes
    after: bytes
    sums: tuple[int, ...]


def frame(dtype: DType, shape: tuple[int, ...], at: int) -> Frame:
    """The frame of a tensor that begins at byte `at` of its file."""
    alignment = ALIGNMENT if prod(shape) * dtype.size >= LARGE else SMALL_ALIGNMENT
    return _frame(dtype, shape, at % alignment, alignment)


@lru_cache(maxsize=4096)
def _frame(dtype: DType, shape: tuple[int, ...], at: int, alignment: int) -> Frame:
    """Kept, so that a hundred thousand experts share one."""
    nbytes = prod(shape) * dtype.size
    archive = _Archive()
    archive.add("data.pkl", _pickled(dtype, shape))
    archive.add("byteorder", b"little")
    summed = archive.begin("data/0", nbytes, at, alignment)
    before = len(archive.data)
    archive.virtual += nbytes
    archive.add("version", b"3\n")
    places = archive.finish()
    return Frame(bytes(archive.data[:before]), bytes(archive.data[before:]), (summed, places["data/0"]))


def saved(value: Any) -> bytes:
    """A plain value as torch.save writes it."""
    archive = _Archive()
    archive.add("data.pkl", pickle.dumps(value, 2))
    archive.add("byteorder", b"little")
    archive.add("version", b"3\n")
    archive.finish()
    return bytes(archive.data)


class _Archive:
    """A zip archive of stored records under archive/, of which one may be left out: `virtual` counts its bytes."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.virtual = 0
        self._records: list[tuple[bytes, int, int, int]] = []

    def begin(self, name: str, nbytes: int, at: int, alignment: int, checksum: int = 0) -> int:
        """A record's header, so long that its content is aligned in the file; returns where its checksum stands."""
        full = f"archive/{name}".encode()
        start = len(self.data) + self.virtual
        pad = -(at + start + 30 + len(full) + 4) % alignment if alignment > 1 else 0
        extra = struct.pack("<2sH", b"FB", pad) + b"Z" * pad if alignment > 1 else b""
        self._records.append((full, start, nbytes, checksum))
        self.data += struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 33, checksum, nbytes, nbytes, len(full), len(extra)) + full + extra
        return start + 14

    def add(self, name: str, content: bytes) -> None:
        self.begin(name, len(content), 0, 1, zlib.crc32(content))
        self.data += content

    def finish(self) -> dict[str, int]:
        """Write the directory; returns where the checksum of each record stands in it."""
        first, places = len(self.data) + self.virtual, {}
        for name, start, nbytes, checksum in self._records:
            places[name.decode().partition("/")[2]] = len(self.data) + self.virtual + 16
            self.data += struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 33, checksum, nbytes, nbytes, len(name), 0, 0, 0, 0, 0, start) + name
        size, count = len(self.data) + self.virtual - first, len(self._records)
        self.data += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, first, 0)
        return places


def _pickled(dtype: DType, shape: tuple[int, ...]) -> bytes:
    """What torch.save's data.pkl says of a contiguous tensor."""
    import torch

    storage = ("storage", getattr(torch, STORAGES[dtype.name]), "0", "cpu", prod(shape))

    class Storage:
        pass

    class Tensor:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Storage(), 0, shape, _strides(shape), False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, found: Any) -> Any:
            return storage if isinstance(found, Storage) else None

    data = io.BytesIO()
    Pickler(data, 2).dump(Tensor())
    return data.getvalue()
