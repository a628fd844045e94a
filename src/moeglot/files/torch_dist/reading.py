"""A torch_dist folder as tensors by name: what .metadata says of keys and chunks, checked, and read from the chunks that hold them.

https://github.com/pytorch/pytorch/blob/main/torch/distributed/checkpoint/metadata.py: `Metadata` maps each key to its shape and chunks, and each chunk to a
file, an offset and a length.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from moeglot.dtypes import DTYPES
from moeglot.errors import BrokenFile
from moeglot.files.mapped import GONE, State
from moeglot.files.remote import Location
from moeglot.files.shards import Entry
from moeglot.files.torch_dist.blobs import find_numbers
from moeglot.files.torch_dist.boxes import Box, overlapping
from moeglot.files.torch_dist.inert import Record, is_a, look_at, numbers
from moeglot.files.torch_dist.keys import HALVES, has_expert, unstacked

if TYPE_CHECKING:
    import torch

METADATA = ".metadata"
DESCRIPTION = "metadata.json"
STATES = "._extra_state"
TRAINING = ("optimizer.", "chained_", "optimizer_state", "opt_param_scheduler", "rng_state", "rerun_state_machine_state")
"""Beginnings of keys that are the training run's, and no weights."""
Shape = tuple[int, ...]
MASTERS = ".fp32_param."
"""In the keys of the float32 weights that an optimizer keeps of what it trains in 16 bits."""


class Found(NamedTuple):
    """Name -> tensor, the files that hold them, how experts lie there, and the keys of `MASTERS`, which are not read."""

    entries: dict[str, Entry]
    files: tuple[Path, ...]
    experts: Literal["stacked", "single"]
    masters: tuple[str, ...]


class Chunk(NamedTuple):
    """A block of a stored tensor, and where it was saved."""

    offsets: Shape
    sizes: Shape
    path: Path
    at: int
    length: int
    state: State

    def read(self, dtype: str) -> torch.Tensor:
        start = find_numbers(self.path, self.at, self.length, dtype, self.sizes)
        return Entry(str(self.path), dtype, self.sizes, self.path, start, start + prod(self.sizes) * DTYPES[dtype].size, self.state).read()


class Run(NamedTuple):
    """What a chunk has of one of our tensors: at `inner` of the chunk's stacked axes, a block of `sizes` that belongs at `offsets`."""

    chunk: Chunk
    inner: Shape
    offsets: Shape
    sizes: Shape

    def read(self, dtype: str) -> torch.Tensor:
        found = self.chunk.read(dtype)
        for place in self.inner:
            found = found[place]
        return found


class ChunkedEntry(Entry):
    """A tensor that lies in one chunk or in several."""

    runs: tuple[Run, ...]

    @property
    def files(self) -> tuple[tuple[Location, State], ...]:
        return tuple((run.chunk.path, run.chunk.state) for run in self.runs)

    def read(self, first: int = 0, rows: int | None = None) -> torch.Tensor:
        """As `Entry.read`: a view where one chunk has all of it, a copy where several have."""
        import torch

        if not self.shape:
            return self.runs[0].read(self.dtype)
        rows = self.shape[0] if rows is None else rows
        touched = [run for run in self.runs if run.offsets[0] < first + rows and first < run.offsets[0] + run.sizes[0]]
        if len(touched) == 1 and touched[0].sizes[1:] == self.shape[1:]:
            return touched[0].read(self.dtype).narrow(0, first - touched[0].offsets[0], rows)
        found = torch.empty((rows, *self.shape[1:]), dtype=DTYPES[self.dtype].torch, device="cpu")
        for run in touched:
            begin, end = max(first, run.offsets[0]), min(first + rows, run.offsets[0] + run.sizes[0])
            place = found.narrow(0, begin - first, end - begin)
            for axis, (offset, size) in enumerate(zip(run.offsets[1:], run.sizes[1:], strict=True), 1):
                place = place.narrow(axis, offset, size)
            place.copy_(run.read(self.dtype).narrow(0, begin - run.offsets[0], end - begin))
        return found


def is_torch_dist(folder: Path) -> bool:
    """Whether a folder is what this file reads."""
    return (folder / METADATA).is_file()


def read_entries(folder: Path) -> Found:
    """What a folder holds; training state is left aside. Raises `BrokenFile`."""
    try:
        return _read(folder, look_at((folder / METADATA).read_bytes(), METADATA))
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise _refuse(METADATA, "it is not what torch.distributed.checkpoint writes", str(error).split("\n")[0]) from error


def _read(folder: Path, said: Any) -> Found:
    tensors, places = (getattr(said, name, None) for name in ("state_dict_metadata", "storage_data"))
    if not isinstance(tensors, dict) or not isinstance(places, dict):
        raise _refuse(METADATA, "it does not say which tensors there are", "it has no state_dict_metadata or no storage_data")
    stored = _places(folder, places)
    found: dict[str, list[tuple[int | None, str, Shape, list[Run]]]] = {}
    weights = {key: described for key, described in tensors.items() if not key.startswith(TRAINING) and STATES not in key}
    for key, described in weights.items():
        if not is_a(described, "TensorStorageMetadata"):
            raise _refuse(key, "an object that is no tensor", "it is neither an _extra_state nor known training state")
        dtype, shape, chunks = _described(key, described, stored)
        template, axes, half = unstacked(key)
        for index, runs in _by_index(key, shape, axes, chunks).items():
            found.setdefault(template.format(*index), []).append((half, dtype, shape[axes:], runs))
    entries = {name: _entry(name, parts) for name, parts in found.items()}
    files = {run.chunk.path for entry in entries.values() for run in entry.runs}
    masters = tuple(key for key in tensors if key.startswith(TRAINING) and MASTERS in key)
    return Found(dict(entries), tuple(sorted(files)), "single" if any(map(has_expert, weights)) else "stacked", masters)


def _refuse(what: str, wrong: str, known: str) -> BrokenFile:
    return BrokenFile(f"{what}: {wrong}", known, "fetch the checkpoint again from its producer, or have Megatron save it again")


def _places(folder: Path, said: Mapping[Any, Any]) -> dict[tuple[str, Shape], tuple[Path, int, int]]:
    """(key, offsets) -> file, offset and length."""
    found = {}
    for index, info in said.items():
        name, offset, length = (getattr(info, key, None) for key in ("relative_path", "offset", "length"))
        if not isinstance(name, str) or Path(name).name != name or not isinstance(offset, int) or not isinstance(length, int):
            raise _refuse(METADATA, f"{getattr(index, 'fqn', '?')} has no place in a file of this folder", f"it says {name!r}, {offset!r}, {length!r}")
        if getattr(info, "transform_descriptors", None):
            raise _refuse(METADATA, f"{index.fqn} is compressed or encrypted", f"it says {info.transform_descriptors}")
        found[index.fqn, numbers(getattr(index, "offset", None)) or ()] = (folder / name, offset, length)
    return found


def _described(key: str, described: Record, stored: Mapping[tuple[str, Shape], tuple[Path, int, int]]) -> tuple[str, Shape, list[Chunk]]:
    """dtype, shape and chunks of a stored tensor; the chunks cover it, each part once."""
    shape, properties = numbers(described.size), described.properties.state
    named = properties[0].__name__ if isinstance(properties, tuple) and isinstance(properties[0], type) else str(properties)
    dtype = next((one.name for one in DTYPES.values() if one.torch_name == named), None)
    if shape is None or dtype is None:
        raise _refuse(key, "it has no shape or no dtype that we know", f"its properties are {named}")
    chunks, states = [], dict[Path, State]()
    for one in described.chunks:
        offsets, sizes = numbers(one.offsets), numbers(one.sizes)
        if offsets is None or sizes is None or (key, offsets) not in stored:
            raise _refuse(key, f"the chunk at {offsets} is in no file", f"{METADATA} has {len(stored)} places")
        path, at, length = stored[key, offsets]
        if path not in states:
            states[path] = State.of(path) if path.is_file() else GONE
        if states[path].size < at + length:
            raise _refuse(path.name, "missing or too short", f"{key} has {length} bytes at {at} in it")
        if length < prod(sizes) * DTYPES[dtype].size:
            raise _refuse(key, f"the chunk at {list(offsets)} is too short", f"{METADATA} says {list(sizes)} of {dtype}, and {length} bytes")
        chunks.append(Chunk(offsets, sizes, path, at, length, states[path]))
    _check_cover(key, shape, chunks)
    return dtype, shape, chunks


def _check_cover(key: str, shape: Shape, chunks: list[Chunk]) -> None:
    volume = sum(prod(chunk.sizes) for chunk in chunks)
    within = all(len(c.offsets) == len(shape) and all(o + s <= n for o, s, n in zip(c.offsets, c.sizes, shape, strict=True)) for c in chunks)
    if volume != prod(shape) or not within or len({chunk.offsets for chunk in chunks}) != len(chunks):
        raise _refuse(key, f"its chunks do not make up {list(shape)}", f"{len(chunks)} chunks hold {volume} numbers, each place should be in one of them")
    if both := overlapping(Box(c.offsets, tuple(map(sum, zip(c.offsets, c.sizes, strict=True)))) for c in chunks):
        known = f"those at {' and '.join(str(list(box.starts)) for box in both)} share places, so that other places are in none"
        raise _refuse(key, f"its chunks do not make up {list(shape)}", known)


def _by_index(key: str, shape: Shape, axes: int, chunks: list[Chunk]) -> dict[Shape, list[Run]]:
    """Place along the stacked axes -> what chunks have of the tensor there."""
    if len(shape) < axes or not prod(shape):
        raise _refuse(key, f"{list(shape)} has no axis for each layer and expert, or no numbers", "they are stacked there, since no number is in the key")
    found: dict[Shape, list[Run]] = {index: [] for index in product(*map(range, shape[:axes]))}
    for chunk in chunks:
        for inner in product(*map(range, chunk.sizes[:axes])):
            index = tuple(map(sum, zip(inner, chunk.offsets[:axes], strict=True)))
            found[index].append(Run(chunk, inner, chunk.offsets[axes:], chunk.sizes[axes:]))
    return found


def _entry(name: str, parts: list[tuple[int | None, str, Shape, list[Run]]]) -> ChunkedEntry:
    """One tensor from one key, or from the two that hold gate and up."""
    parts = sorted(parts, key=lambda part: part[0] or 0)
    halves = [half for half, *_ in parts]
    held = ", ".join(f"{name}{'' if half is None else HALVES[half]} {dtype} {list(shape)}" for half, dtype, shape, _ in parts)
    if halves in ([0], [1]):
        raise _refuse(name, "gate or up is missing", f"it is in two keys, and here is {held} alone")
    if halves not in ([None], [0, 1]) or len({(dtype, shape) for _, dtype, shape, _ in parts}) > 1:
        raise _refuse(name, "stored twice, or gate and up differ", f"here are {held}")
    runs, rows, dtype, shape = [], 0, parts[0][1], parts[0][2]
    for _, _, _, own in parts:
        runs += [run._replace(offsets=(run.offsets[0] + rows, *run.offsets[1:])) if run.offsets else run for run in own]
        rows += shape[0] if shape else 0
    whole = (rows, *shape[1:]) if shape else ()
    entry = ChunkedEntry(name, dtype, whole, runs[0].chunk.path, 0, prod(whole) * DTYPES[dtype].size)
    entry.runs = tuple(sorted(runs, key=lambda run: run.offsets))
    return entry
