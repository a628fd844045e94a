"""A tensor that is no expert: as it is stored, under its name on the Hub; or a quantized matrix, as what it decodes to; or a run of rows or columns of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from moeglot.axes import exchanged
from moeglot.codings.coding import WEIGHT, brief
from moeglot.codings.rules import Quantization
from moeglot.dtypes import DTYPES, WEIGHT_DTYPES
from moeglot.encoded import Encoded
from moeglot.encoding import Encoding, Parts, agree
from moeglot.errors import BadNumbers, TensorMismatch, UnknownFormat
from moeglot.files.mapped import let_go
from moeglot.files.shards import Entry
from moeglot.files.views import cut, window

if TYPE_CHECKING:
    import torch


CODES = (".qweight", ".qzeros", ".SCB")
"""How other names of codes end: words of GPTQ and AWQ, which are known where config.json declares them, and bitsandbytes' 8 bits, which never are."""
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


def _all_finite(numbers: torch.Tensor) -> bool:
    from moeglot.kernels.finite import all_finite

    return all_finite(_in_numbers(numbers))


def _in_numbers(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.float() if numbers.element_size() == 1 else numbers


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

    def is_sound(self) -> bool:
        """No number of it is NaN or infinite; some rows at a time. Of other types than floats, nothing is.

        A vector may mask with -inf: a sink, a bias of a router.
        """
        if not DTYPES[self.dtype].is_float:
            return True
        if len(self.shape) < 2:
            return not bool((found := _in_numbers(self.read())).isnan().any() or found.isposinf().any())
        if self.groups != 1:
            return _all_finite(self.read())
        step = max(1, PIECE * self.shape[0] // max(1, self.entry.nbytes))
        for at in range(0, self.shape[0], step):
            if not _all_finite(self.entry.read(self.first + at, min(step, self.shape[0] - at))):
                return False
            let_go()
        return True

    def part(self, name: str, axis: int, run: range) -> HubTensor:
        """A run of rows (axis 0) or columns (axis 1) under a name of its own; rows beyond the last one are zeros. Where there are groups, none is cut."""
        if axis:
            return replace(self, name=name, entry=window(self.entry, axis, run))
        if self.groups > 1:
            stored, each = self.entry.shape[0] // self.groups, self.shape[0] // self.groups
            first, groups = run.start // each, len(run) // each
            return replace(self, name=name, entry=window(self.entry, 0, range(first * stored, (first + groups) * stored)), groups=groups)
        if run.stop <= self.shape[0]:
            return replace(self, name=name, first=self.first + run.start, rows=len(run))
        own = window(self.entry, 0, range(self.first, self.first + self.shape[0]))
        return HubTensor(name, window(own, 0, run))

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
    """A matrix that is no expert and that is quantized as the experts are: what it decodes to, or a run of an axis of that."""

    name: str
    encoding: Encoding
    parts: Mapping[str, Entry]
    dtype: str
    axis: int = 0
    run: range | None = None

    @cached_property
    def shape(self) -> tuple[int, ...]:
        whole = self.encoding.matrix_shape({part: entry.read() if part in self.encoding.told_by else entry.hollow() for part, entry in self.parts.items()})
        whole = whole[::-1] if self.encoding.is_turned else whole
        return whole if self.run is None else tuple(len(self.run) if n == self.axis else size for n, size in enumerate(whole))

    @property
    def origin(self) -> str:
        return " + ".join(entry.name for entry in self.parts.values())

    def exact(self) -> Encoded:
        """The whole matrix [out, in], still encoded."""
        stored = self._read()
        try:
            shape = self.encoding.matrix_shape(stored)
        except (ValueError, IndexError) as error:
            known = f"it is coded as {self.encoding}, and its parts are { ({name: list(part.shape) for name, part in stored.items()}) }"
            raise TensorMismatch(f"{self.origin}: no matrix", known, "check quantization_config against the producer's") from error
        for part in self.encoding.parts:  # a view of another shape would be other numbers
            expected, found = part.shape(shape), tuple(stored[part.name].shape)
            if not agree(tuple(size for size in expected if size != 1), tuple(size for size in found if size != 1)):
                wrong = f"{self.parts[part.name].name} is {list(found)}, a matrix {list(shape)} has {list(expected)} there"
                raise TensorMismatch(wrong, f"it is coded as {self.encoding}", "check quantization_config against the producer's")
        parts = {part.name: stored[part.name].view(part.shape(shape)) for part in self.encoding.parts}
        if problem := self.encoding.check(parts):
            raise BadNumbers(f"{self.origin}: {problem}", f"it is coded as {self.encoding}", "fetch the file again from its producer")
        whole = Encoded(self.encoding, parts, shape)
        return exchanged(whole) if self.encoding.is_turned else whole

    def lying(self, parts: Parts, part: str) -> torch.Tensor:
        """A part of a matrix [out, in] that is coded as this one, as the file has it."""
        return parts[part].mT if self.encoding.is_turned else parts[part]

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """Its values [out, in]."""
        found = self.exact().decode(dtype)
        return found if self.run is None else cut(found, self.axis, self.run)

    def read(self) -> torch.Tensor:
        return self.decode(DTYPES[self.dtype].torch)

    def part(self, name: str, axis: int, run: range) -> DecodedTensor:
        """As `HubTensor.part`; once cut along one axis, it is not cut along the other."""
        if self.run is not None:
            assert axis == self.axis
            run = range(self.run.start + run.start, self.run.start + run.stop)
        return replace(self, name=name, axis=axis, run=run)

    def _read(self) -> dict[str, torch.Tensor]:
        return {part: entry.read() for part, entry in self.parts.items()}


def check_codes(tensors: Mapping[str, HubTensor], known: Collection[str], declared: Quantization) -> None:
    """Raises `UnknownFormat` where config.json says that there are codes, and one of these tensors looks like some that we do not decode."""
    for name, tensor in tensors.items() if declared else ():
        codes = name.endswith(WEIGHT) and tensor.dtype not in WEIGHT_DTYPES and len(tensor.shape) == 2
        if name not in known and (codes or name.endswith(CODES)):
            raise UnknownFormat(
                f"{name} is coded in a way that moeglot does not know",
                f"quantization_config says {brief(declared)}; the tensor is {tensor.dtype} {list(tensor.shape)}",
                "convert to a layout that keeps the encoding as it is, or decode it with the library that wrote it",
            )
