"""The files of a torch_dist checkpoint to be written: which chunk lies where, known before the first byte is, and what .metadata then says.

One chunk holds one matrix of one expert or layer: gate and up apart, as Megatron-Core cuts them. metadata.json and common.pt are in the form that
megatron-core 0.16 and its successors read: `content_metadata` is what a loader asks its model for (`dist_checkpointing.load_content_metadata`).
"""

from __future__ import annotations

import json
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import prod
from pathlib import Path
from typing import NamedTuple

from moeglot.dtypes import DTYPES
from moeglot.errors import TensorMismatch
from moeglot.files.shards import Piece, Slot, filled
from moeglot.files.torch_dist.blobs import STORAGES, Frame, frame, saved
from moeglot.files.torch_dist.keys import EXPERTS, LAYERS, Keyed, Stack, keyed
from moeglot.files.torch_dist.reading import DESCRIPTION, METADATA, STATES

LARGEST = 1 << 30
"""Bytes of the largest chunk; a reader reads a chunk as a whole."""
COMMON = "common.pt"
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
SINGLE = {"content_metadata": {"singleton_local_shards": True}}
"""What common.pt says beside its version where experts keep their numbers."""
NO_STATE = [None]
"""What Megatron-Core keeps of an _extra_state without content."""
Shape = tuple[int, ...]


class Cut(NamedTuple):
    """A chunk of a tensor to be written: how many rows of which name, and where in which key."""

    slot: Slot
    keyed: Keyed
    first: int
    rows: int

    @property
    def offsets(self) -> Shape:
        return (*self.keyed.place, *((self.first, *(0 for _ in self.slot.shape[1:])) if self.slot.shape else ()))

    @property
    def sizes(self) -> Shape:
        return (*(1 for _ in self.keyed.place), *((self.rows, *self.slot.shape[1:]) if self.slot.shape else ()))


class Placed(NamedTuple):
    """A chunk and its place in its file: the frame around its numbers begins at `at`."""

    cut: Cut
    at: int
    frame: Frame

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return prod(self.cut.sizes) * DTYPES[self.cut.slot.dtype].size

    @property
    def length(self) -> int:
        return len(self.frame.before) + self.nbytes + len(self.frame.after)


@dataclass(frozen=True)
class DistFile:
    """One .distcp file. `shapes`: key -> shape of the whole; `states`: keys of objects without content, which lie at the end of the file."""

    file: str
    slots: tuple[Slot, ...]
    stack: Stack
    shapes: dict[str, Shape]
    states: tuple[str, ...] = ()

    @cached_property
    def placed(self) -> tuple[Placed, ...]:
        at, found = 0, []
        for slot in self.slots:
            for cut in _cuts(slot, self.stack):
                found.append(Placed(cut, at, frame(DTYPES[slot.dtype], cut.sizes, at)))
                at += found[-1].length
        return tuple(found)

    @cached_property
    def pieces(self) -> dict[str, tuple[Piece, ...]]:
        found = defaultdict[str, list[Piece]](list)
        for cut, at, (before, _, sums) in self.placed:
            nbytes = cut.rows * cut.slot.nbytes // max(1, cut.slot.shape[0]) if cut.slot.shape else cut.slot.nbytes
            found[cut.slot.name].append(Piece(at + len(before), nbytes, tuple(at + place for place in sums)))
        return {name: tuple(pieces) for name, pieces in found.items()}

    @cached_property
    def frames(self) -> tuple[tuple[int, bytes], ...]:
        found = []
        for placed in self.placed:
            found += [(placed.at, placed.frame.before), (placed.at + placed.length - len(placed.frame.after), placed.frame.after)]
        return (*found, (self._end, saved(NO_STATE))) if self.states else tuple(found)

    @property
    def header(self) -> bytes:
        """How the file begins, up to the first byte that is not known before its tensors are: a CRC-32."""
        first = self.placed[0].frame
        return first.before[: min(first.sums)]

    @cached_property
    def _end(self) -> int:
        return self.placed[-1].at + self.placed[-1].length

    @cached_property
    def nbytes(self) -> int:
        return self._end + (len(saved(NO_STATE)) if self.states else 0)


def _cuts(slot: Slot, stack: Stack) -> Iterator[Cut]:
    """A tensor -> its chunks: one for each matrix that lies in it, or several of at most `LARGEST` bytes."""
    keys, rows = keyed(slot.name, stack), slot.shape[0] if slot.shape else 1
    each, share = rows // max(slot.cuts, len(keys)), rows // len(keys)
    step = max(1, min(each, LARGEST * rows // max(1, slot.nbytes)))
    for first in range(0, rows, each):
        for begin in range(first, first + each, step):
            yield Cut(slot, keys[begin // share], begin % share, min(step, first + each - begin))


def plan_files(slots: Iterable[Slot], file_size: int, stack: Stack, states: Iterable[str]) -> tuple[DistFile, ...]:
    """Tensors in their order -> files of about `file_size` bytes.

    Raises `TensorMismatch` for a tensor that some layers or experts lack or have in another shape.
    """
    slots = list(slots)
    shapes = _shapes(slots, stack)
    experts = next((shape[stack.layers] for key, shape in shapes.items() if EXPERTS in key), 0) if stack.experts else 0
    named = tuple(dict.fromkeys(_state_key(name, stack, experts) for name in states))
    return tuple(DistFile(f"__0_{n}.distcp", tuple(group), stack, shapes, () if n else named) for n, group in enumerate(filled(slots, file_size)))


def _shapes(slots: list[Slot], stack: Stack) -> dict[str, Shape]:
    """Key -> shape of the whole; every place along its stacked axes is taken once, by tensors that are alike."""
    found = defaultdict[str, dict[Shape, Slot]](dict)
    for slot in slots:
        if slot.dtype not in STORAGES:
            raise TensorMismatch(f"{slot.name}: {slot.dtype}", f"a torch_dist checkpoint holds {', '.join(STORAGES)}", "decode it: pass --encode bfloat16")
        keys = keyed(slot.name, stack)
        for key, index in keys:
            if index in found[key]:
                raise TensorMismatch(f"{slot.name}: written twice", f"{key} has one place for it", "report this as a bug")
            found[key][index] = replace(slot, shape=(slot.shape[0] // len(keys), *slot.shape[1:])) if slot.shape else slot
    shapes = {}
    for key, places in found.items():
        first = next(iter(places.values()))
        length = tuple(max(numbers) + 1 for numbers in zip(*places, strict=True))
        if stack.layers and length and key.startswith(LAYERS):
            length = (stack.depth, *length[1:])
        if missing := next((index for index in product(*map(range, length)) if index not in places), None):
            known = f"layers and experts are the first axes of one tensor {key}, and {first.name} is there"
            raise TensorMismatch(f"{key}: nothing for layer and expert {missing}", known, "fetch the missing shard; a model whose layers differ is not stacked")
        if other := next((slot for slot in places.values() if (slot.shape, slot.dtype) != (first.shape, first.dtype)), None):
            known = f"{key} holds both; {first.name} is {first.dtype} {list(first.shape)}"
            raise TensorMismatch(f"{other.name}: {other.dtype} {list(other.shape)}", known, "check the source; one tensor has one dtype and shape")
        shapes[key] = (*length, *first.shape)
    return shapes


def _state_key(name: str, stack: Stack, experts: int) -> str:
    """The key of a module's _extra_state: its place along the stacked axes, and their lengths, are in it."""
    ((key, index),) = keyed(name + STATES, stack)
    lengths = ([stack.depth] if stack.layers and name.startswith(LAYERS) else []) + ([experts] if stack.experts and EXPERTS in name else [])
    return f"{key}/shard_{'.'.join(map(str, index or (0,)))}_{'.'.join(map(str, lengths or (1,)))}"


def finish(folder: Path, files: tuple[DistFile, ...]) -> None:
    """Write what makes the files a checkpoint: .metadata, metadata.json and common.pt."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for file in files:
        for placed in file.placed:
            (key, _), slot = placed.cut.keyed, placed.cut.slot
            offsets = torch.Size(placed.cut.offsets)
            if key not in tensors:
                tensors[key] = TensorStorageMetadata(TensorProperties(DTYPES[slot.dtype].torch), torch.Size(file.shapes[key]), [])
            described = tensors[key]
            assert isinstance(described, TensorStorageMetadata)
            described.chunks.append(ChunkStorageMetadata(offsets, torch.Size(placed.cut.sizes)))
            places[MetadataIndex(key, offsets)] = _StorageInfo(file.file, placed.at, placed.length)
        for key in file.states:
            tensors[key] = BytesStorageMetadata()
            places[MetadataIndex(key)] = _StorageInfo(file.file, file._end, len(saved(NO_STATE)))
    (folder / METADATA).write_bytes(pickle.dumps(Metadata(tensors, storage_data=places)))
    (folder / DESCRIPTION).write_text(json.dumps(BACKEND), encoding="utf-8")
    (folder / COMMON).write_bytes(saved({"checkpoint_version": 3.0, **({} if files[0].stack.experts else SINGLE)}))
