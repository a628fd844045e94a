"""The safetensors container: headers checked before anything is believed, tensors mapped lazily, files written in place at known offsets.

https://github.com/huggingface/safetensors#format: u64 header length, JSON header, then the tensors' bytes without holes.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, compress
from math import prod
from operator import eq, itemgetter, mul, ne, sub
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moeglot.dtypes import DTYPES
from moeglot.errors import BrokenFile
from moeglot.files.mapped import State, mapping
from moeglot.files.remote import Location, Remote

if TYPE_CHECKING:
    import torch

MAX_HEADER = 100_000_000  # the limit of the safetensors library
ALIGNMENT = 4096  # where our data starts, so that a tensor can be read and written without the page cache
SLICE = 1 << 26
"""Bytes of the largest slices that are read as a whole."""
SPEC = "https://github.com/huggingface/safetensors#format"


class Entry(NamedTuple):
    """One tensor of a file: `start` and `end` are bytes from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Location
    start: int
    end: int
    state: State | None = None
    """Of the file, when its header was read."""

    @property
    def files(self) -> tuple[tuple[Location, State], ...]:
        """Where it lies, and the state in which that file was then."""
        return ((self.path, self.state),) if self.state else ()

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def read(self, first: int = 0, rows: int | None = None) -> torch.Tensor:
        """The tensor, or `rows` entries of its first axis from `first`; a view of the mapped file, read when it is touched, or fetched from a store.

        Of a slice as large as an expert's, the kernel is told that all of it will be.
        """
        import torch

        shape = self.shape if rows is None else (rows, *self.shape[1:])
        size, dtype = DTYPES[self.dtype].size, DTYPES[self.dtype].torch
        if not prod(shape):
            return torch.empty(shape, dtype=dtype, device="cpu")
        offset = self.start + first * prod(self.shape[1:]) * size
        if isinstance(self.path, Remote):
            return torch.frombuffer(self.path.range(offset, prod(shape) * size), dtype=dtype).view(shape)
        now = State.of(self.path)
        if self.state:
            self.state.check(self.path, now)
        mapped = mapping(self.path, now)
        if ALIGNMENT < prod(shape) * size <= SLICE and hasattr(mmap, "MADV_WILLNEED"):
            page = offset // mmap.PAGESIZE * mmap.PAGESIZE
            mapped.madvise(mmap.MADV_WILLNEED, page, offset + prod(shape) * size - page)
        return torch.frombuffer(mapped, dtype=dtype, count=prod(shape), offset=offset).view(shape)

    def hollow(self) -> torch.Tensor:
        """Its dtype and shape without its numbers, on the meta device; nothing is read."""
        import torch

        return torch.empty(self.shape, dtype=DTYPES[self.dtype].torch, device="meta")


def _refuse(path: Location, what: str, known: str) -> BrokenFile:
    return BrokenFile(f"{path.name}: {what}", known, "fetch the file again from its producer; nothing was read from it")


def parse(text: str) -> Any:
    """JSON in which no name stands twice; raises `ValueError`. The exact check is slow: it is made where there are more colons than names, two levels deep."""
    value = json.loads(text)
    if isinstance(value, dict) and text.count(":") == len(value) + sum(map(len, [inner for inner in value.values() if isinstance(inner, dict)])):
        return value
    return json.loads(text, object_pairs_hook=unique)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json's object_pairs_hook: a name that stands twice says two things, and is an error."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for n, (key, _) in enumerate(pairs) if key in {k for k, _ in pairs[:n]})
        raise ValueError(f"{twice!r} stands twice")
    return found


def read_header(path: Location, *, ask_library: bool = True) -> tuple[dict[str, Entry], dict[str, str]]:
    """(name -> Entry, metadata) of a safetensors file; raises `BrokenFile` for each way in which a header can be wrong.

    `ask_library`: also have the safetensors library accept it, which costs the import of numpy; whoever only looks can do without.
    """
    if not path.is_file():
        raise _refuse(path, "no file", "it is a folder, a device or a link to nothing")
    size = (state := State.of(path)).size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise BrokenFile(f"{path.name}: a git-lfs pointer, not the file itself", "it begins as git-lfs writes them", "run `git lfs pull` in its folder")
        length = int.from_bytes(start, "little")
        if size < 8 or length > MAX_HEADER or 8 + length > size:
            raise _refuse(path, f"the header claims {length} bytes", f"the file has {size}, and a header at most {MAX_HEADER} ({SPEC})")
        raw = file.read(length)
    try:
        header = parse(raw.decode("utf-8"))
        if b"\\u" in raw:  # half a pair of surrogates is no text, and in no file that we could write
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise _refuse(path, "the header is no JSON object", str(error).split("\n")[0]) from error
    if not isinstance(header, dict):
        raise _refuse(path, "the header is no JSON object", f"it is a {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _refuse(path, "__metadata__ is no map from text to text", f"it is {str(metadata)[:80]}")
    entries = describe(path, header, 8 + length, state)
    lying = sorted(entries.values(), key=itemgetter(4, 5))
    *before, end = 8 + length, *map(itemgetter(5), lying)
    for entry, at in compress(zip(lying, before, strict=True), map(ne, map(itemgetter(4), lying), before)):
        kind = "overlaps the tensor before it" if entry.start < at else "leaves a hole before it"
        raise _refuse(path, f"{entry.name} {kind}", f"it starts at byte {entry.start}, the one before it ends at {at} ({SPEC})")
    if end != size:
        raise _refuse(path, "truncated" if end > size else "has bytes that no tensor owns", f"the tensors end at byte {end}, the file at {size}")
    if ask_library and isinstance(path, Path):
        _ask_safetensors(path)
    return entries, metadata


def _ask_safetensors(path: Path) -> None:
    """The library's own reader has the last word: what it refuses, nobody else will load."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise _refuse(path, "refused by the safetensors library", str(error)) from error


def describe(path: Location, header: Mapping[str, Any], base: int, state: State | None = None) -> dict[str, Entry]:
    """Tensors' descriptions in a header -> name -> Entry; `base`: where the data starts in the file, `state`: that of the file. Raises `BrokenFile`.

    All are looked at together, and each by itself where one is wrong, to say which and why.
    """
    values = header.values()
    try:
        dtypes, shapes = [value["dtype"] for value in values], [tuple(value["shape"]) for value in values]
        starts, ends = zip(*(value["data_offsets"] for value in values), strict=True)
        sizes = map(mul, map(prod, shapes), [DTYPES[dtype].size for dtype in dtypes])
        whole = {*map(type, chain(starts, ends, *shapes))} == {int} and min(chain(starts, *shapes)) >= 0
        fits = whole and all(map(eq, sizes, map(sub, ends, starts)))
    except (TypeError, KeyError, ValueError):
        fits = False
    if not fits:
        return {name: _describe(path, name, value, base, state) for name, value in header.items()}
    rows = zip(header, dtypes, shapes, [path] * len(shapes), map(base.__add__, starts), map(base.__add__, ends), [state] * len(shapes), strict=True)
    return dict(zip(header, map(Entry._make, rows), strict=True))


def _describe(path: Location, name: str, value: Any, base: int, state: State | None = None) -> Entry:
    try:
        dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        known = DTYPES.get(dtype)
    except (TypeError, KeyError, ValueError) as error:
        raise _refuse(path, f"{name} is not described", f"it needs dtype, shape and data_offsets, it has {str(value)[:80]}") from error
    if not known:
        raise _refuse(path, f"{name} has dtype {dtype!r}", f"known are {', '.join(DTYPES)}")
    if any(type(n) is not int for n in (*shape, start, end)) or min(*shape, start, 0) < 0:
        raise _refuse(path, f"{name} has a shape or an offset that is no whole number", f"{str(value)[:120]}")
    if end - start != (nbytes := prod(shape) * known.size):
        raise _refuse(path, f"{name} has {end - start} bytes", f"its shape {list(shape)} of {dtype} needs {nbytes}")
    return Entry._make((name, dtype, shape, path, base + start, base + end, state))


# --- writing -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """A tensor to be written: its name, safetensors dtype and shape. `cuts`: how many matrices lie in it one after the other."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    cuts: int = 1

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].size


class Piece(NamedTuple):
    """Where a run of a tensor's bytes goes in a file; `sums`: where the CRC-32 of the run is to be written, too."""

    offset: int
    nbytes: int
    sums: tuple[int, ...] = ()


@dataclass(frozen=True)
class ShardPlan:
    """One file to be written: its name and its tensors, in the order in which they lie there."""

    file: str
    slots: tuple[Slot, ...]
    metadata: Mapping[str, str]

    @cached_property
    def header(self) -> bytes:
        """The length, the JSON and the spaces that make the data start at a multiple of 4096."""
        offset = 0
        described: dict[str, Any] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        for slot in self.slots:
            described[slot.name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [offset, offset + slot.nbytes]}
            offset += slot.nbytes
        text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def offsets(self) -> dict[str, int]:
        """name -> bytes from the beginning of the file."""
        at, found = len(self.header), {}
        for slot in self.slots:
            found[slot.name] = at
            at += slot.nbytes
        return found

    @property
    def pieces(self) -> dict[str, tuple[Piece, ...]]:
        return {slot.name: (Piece(self.offsets[slot.name], slot.nbytes),) for slot in self.slots}

    @property
    def frames(self) -> tuple[tuple[int, bytes], ...]:
        """What is written beside the tensors, and where."""
        return ((0, self.header),)

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(slot.nbytes for slot in self.slots)


def filled(slots: Iterable[Slot], file_size: int) -> list[list[Slot]]:
    """Slots in their order, in runs of at most `file_size` bytes; a larger one is alone."""
    groups, held = list[list[Slot]]([[]]), 0
    for slot in slots:
        if groups[-1] and held + slot.nbytes > file_size:
            groups.append([])
            held = 0
        groups[-1].append(slot)
        held += slot.nbytes
    return groups


def plan_shards(slots: Iterable[Slot], shard_size: int, metadata: Mapping[str, str]) -> tuple[ShardPlan, ...]:
    """Slots in their order -> files of at most `shard_size` bytes of tensors (more only for one tensor that is larger)."""
    groups = filled(slots, shard_size)
    names = ["model.safetensors"] if len(groups) == 1 else [f"model-{n + 1:05}-of-{len(groups):05}.safetensors" for n in range(len(groups))]
    return tuple(ShardPlan(name, tuple(sorted(group, key=_rank)), metadata) for name, group in zip(names, groups, strict=True))


def _rank(slot: Slot) -> tuple[bool, int, int, str]:
    """Tensors of whole pages first, then by falling item size: everything starts where its type, and the large where a page, may start."""
    return slot.nbytes % ALIGNMENT != 0, -DTYPES[slot.dtype].size, -slot.nbytes, slot.name


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """All of `data` at `offset`."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, row-major; a copy only if its strides are others."""
    import torch

    flat = tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)
    return memoryview(flat.numpy().data)
