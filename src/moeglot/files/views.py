"""A part of a stored tensor, or one that several files hold in parts or as copies, as an entry like any other: read when it is asked for, and checked then."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from moeglot.dtypes import DTYPES
from moeglot.errors import Contradiction
from moeglot.files.shards import Entry

if TYPE_CHECKING:
    import torch


def cut(tensor: torch.Tensor, axis: int, run: range) -> torch.Tensor:
    """What lies in a run of an axis, as a view; where the run goes beyond the end, zeros are put there."""
    import torch

    size = tensor.shape[axis]
    found = tensor.narrow(axis, min(run.start, size), max(0, min(run.stop, size) - run.start))
    if (short := len(run) - found.shape[axis]) == 0:
        return found
    shape = [short if n == axis else size for n, size in enumerate(found.shape)]
    return torch.cat([found, found.new_zeros(shape)], axis)


class Window(Entry):
    """A run of rows (axis 0) or of columns (axis 1) of another tensor; rows beyond its end are zeros."""

    whole: Entry
    axis: int
    run: range

    def read(self, first: int = 0, rows: int | None = None) -> torch.Tensor:
        rows = self.shape[0] - first if rows is None else rows
        if self.axis:
            return cut(self.whole.read(first, rows), self.axis, self.run)
        size = self.whole.shape[0]
        begin = min(self.run.start + first, size)
        end = min(self.run.start + first + rows, size)
        return cut(self.whole.read(begin, end - begin), 0, range(rows))


class Joined(Entry):
    """Several tensors one after the other, along the rows or along the columns."""

    pieces: tuple[Entry, ...]
    axis: int

    def read(self, first: int = 0, rows: int | None = None) -> torch.Tensor:
        import torch

        rows = self.shape[0] - first if rows is None else rows
        if self.axis:
            return torch.cat([piece.read(first, rows) for piece in self.pieces], self.axis)
        found, at = [], 0
        for piece in self.pieces:
            begin, end = max(first, at), min(first + rows, at + piece.shape[0])
            if begin < end:
                found.append(piece.read(begin - at, end - begin))
            at += piece.shape[0]
        return torch.cat(found) if len(found) != 1 else found[0]


class Copies(Entry):
    """A tensor that several files hold, in the same bytes: reading it compares them, and raises `Contradiction` where they differ."""

    copies: tuple[Entry, ...]

    def read(self, first: int = 0, rows: int | None = None) -> torch.Tensor:
        from moeglot.kernels.bits import same

        one, *others = (copy.read() if not self.shape else copy.read(first, rows) for copy in self.copies)
        for copy, other in zip(self.copies[1:], others, strict=True):
            if not same(one, other):
                raise unequal(self.name, self.copies[0], copy)
        return one


def unequal(name: str, a: Entry, b: Entry) -> Contradiction:
    """Two copies of one tensor differ."""
    places = " and ".join(f"{entry.path.parent.name}/{entry.path.name}" for entry in (a, b))
    return Contradiction(f"{name} is not the same in {places}", "processes that hold it whole hold the same", "one of them is of another run: convert it again")


def window(whole: Entry, axis: int, run: range) -> Entry:
    """A run of an axis of a tensor."""
    found = Window(*_described(whole.name, whole, axis, len(run)))
    found.whole, found.axis, found.run = whole, axis, run
    return found


def joined(name: str, pieces: Sequence[Entry], axis: int) -> Entry:
    """Tensors of one dtype that are alike but for the size of one axis."""
    if len(pieces) == 1:
        return pieces[0]
    found = Joined(*_described(name, pieces[0], axis, sum(piece.shape[axis] for piece in pieces)))
    found.pieces, found.axis = tuple(pieces), axis
    return found


def copies(name: str, of: Sequence[Entry]) -> Entry:
    """Tensors of one dtype and shape that must have the same bytes."""
    if len(of) == 1:
        return of[0]
    found = Copies(name, of[0].dtype, of[0].shape, of[0].path, 0, of[0].nbytes)
    found.copies = tuple(of)
    return found


def _described(name: str, like: Entry, axis: int, size: int) -> Entry:
    """A tensor like another, but for the size of one axis."""
    shape = tuple(size if n == axis else length for n, length in enumerate(like.shape))
    return Entry(name, like.dtype, shape, like.path, 0, prod(shape) * DTYPES[like.dtype].size)
