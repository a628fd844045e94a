"""A tensor that is no expert: as it is stored, under its name on the Hub; or a quantized matrix, as what it decodes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from moeglot.dtypes import DTYPES
from moeglot.encoding import Encoded, Encoding
from moeglot.errors import BadNumbers
from moeglot.shards import Entry, let_go

if TYPE_CHECKING:
    import torch


PIECE = 1 << 25
"""Bytes that are compared at a time."""


def in_groups(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """[rows, ...] -> [groups, rows of a group, ...]"""
    return tensor.view(groups, tensor.shape[0] // groups, *tensor.shape[1:])


def taking_turns(tensors: list[torch.Tensor], groups: int) -> torch.Tensor:
    """The rows of the tensors, group by group, and in each group those of each tensor in turn."""
    import torch

    if len(tensors) == 1:
        return tensors[0]
    return torch.cat([in_groups(tensor, groups) for tensor in tensors], 1).flatten(0, 1)


class DenseTensor(Protocol):
    """What can be read under a name of the Hub. `origin`: the stored tensors that it comes from."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    @property
    def origin(self) -> str: ...

    def read(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class HubTensor:
    """A tensor that is no expert, under its name on the Hub: rows `first` to `first + rows` of a stored one, or of each of its `groups` of rows."""

    name: str
    entry: Entry
    first: int = 0
    rows: int | None = None
    groups: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape if self.rows is None else (self.groups * self.rows, *self.entry.shape[1:])

    @property
    def dtype(self) -> str:
        return self.entry.dtype

    @property
    def origin(self) -> str:
        """The stored tensor that it comes from."""
        return self.entry.name

    def read(self) -> torch.Tensor:
        if self.groups == 1:
            return self.entry.read(self.first, self.rows)
        assert self.rows is not None
        return in_groups(self.entry.read(), self.groups)[:, self.first : self.first + self.rows].flatten(0, 1)

    def same(self, other: HubTensor) -> bool:
        """The same bytes under the same dtype and shape; some rows at a time, so that a large tensor is never ours as a whole."""
        from moeglot.kernels.bits import same

        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        if not self.shape or (self.groups, other.groups) != (1, 1):
            return same(self.read(), other.read())
        step = max(1, PIECE * self.shape[0] // max(1, self.entry.nbytes))
        for at in range(0, self.shape[0], step):
            rows = min(step, self.shape[0] - at)
            if not same(self.entry.read(self.first + at, rows), other.entry.read(other.first + at, rows)):
                return False
            let_go()
        return True


@dataclass(frozen=True)
class DecodedTensor:
    """A matrix that is no expert and that is quantized as the experts are: what it decodes to."""

    name: str
    encoding: Encoding
    parts: Mapping[str, Entry]
    dtype: str

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return self.encoding.matrix_shape(self._read())

    @property
    def origin(self) -> str:
        return " + ".join(entry.name for entry in self.parts.values())

    def exact(self) -> Encoded:
        """The matrix [out, in], still encoded."""
        shape = self.encoding.matrix_shape(stored := self._read())
        parts = {part.name: stored[part.name].view(part.shape(shape)) for part in self.encoding.parts}
        if problem := self.encoding.check(parts):
            raise BadNumbers(f"{self.origin}: {problem}", f"it is coded as {self.encoding}", "fetch the file again from its producer")
        return Encoded(self.encoding, parts, shape)

    def read(self) -> torch.Tensor:
        return self.exact().decode(DTYPES[self.dtype].torch)

    def _read(self) -> dict[str, torch.Tensor]:
        return {part: entry.read() for part, entry in self.parts.items()}
