"""One step of a plan, from which encodings to which; and a unit of it: what it does to numbers, and the tensors of the output that it writes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from moeglot.checkpoints.dense import DecodedTensor, DenseTensor
from moeglot.dtypes import DTYPES
from moeglot.encoding import Encoding
from moeglot.encodings.plain import Plain
from moeglot.format import Dense
from moeglot.layout import Sizes, Stored
from moeglot.planning.merging import Merged, MergedPart


@dataclass(frozen=True)
class Step:
    """How one stored tensor of a layer comes about: from which encodings of its roles to which."""

    line: Stored
    layer: int
    sources: tuple[Encoding, ...]
    target: Encoding
    movable: bool
    twin: Stored | None = None
    """A line of the source that holds the same roles along the same axes, in the same parts: its slices are copied."""

    @property
    def moves_codes(self) -> bool:
        """Codes are moved as they are, without a decode."""
        return self.twin is not None or (self.movable and all(source.recodes(self.target) for source in self.sources))

    @property
    def exact(self) -> bool:
        """Nothing is lost, whatever the numbers."""
        if self.moves_codes and all(source.parts == self.target.parts for source in self.sources):
            return True
        return isinstance(self.target, Plain) and all(source.fits_in(self.target) for source in self.sources)

    def nbytes(self, sizes: Sizes) -> int:
        """Bytes of one expert's slice."""
        return sum(prod(self.line.slice_shape(part, sizes)) * DTYPES[part.dtypes[0]].size for part in self.target.parts)

    @property
    def verb(self) -> str:
        if self.moves_codes and all(encoding.name == self.target.name for encoding in self.sources):
            return f"move {self.target.name} codes"
        source = " and ".join(sorted({encoding.name for encoding in self.sources}))
        if isinstance(self.target, Plain):
            return f"{'cast' if isinstance(self.sources[0], Plain) else 'decode'} {source} to {self.target.name}"
        return f"encode {source} as {self.target}"


@dataclass(frozen=True)
class ExpertUnit:
    """One expert's slice of a step, which can be made in any order, any number of times."""

    step: Step
    expert: int
    nbytes: int
    merged: bool
    """An adapter's change is added to the slice."""

    @property
    def key(self) -> str:
        """What a journal calls it."""
        return f"{self.step.line.key}|{self.step.layer}|{self.expert + self.step.line.offset}"

    @property
    def place(self) -> str:
        return f"layer {self.step.layer}, expert {self.expert}"

    @property
    def outputs(self) -> tuple[str, ...]:
        """The tensors of the output in which it lies, in the order of the parts of its encoding."""
        return tuple(self.step.line.key_of(part, self.step.layer, self.expert) for part in self.step.target.parts)

    @property
    def verb(self) -> str:
        """What it does to numbers."""
        return f"add the adapter's change and round to {self.step.target}" if self.merged else self.step.verb


@dataclass(frozen=True)
class DenseUnit:
    """One tensor that is no expert, made like a slice."""

    name: str
    parts: tuple[DenseTensor, ...]
    line: Dense | None
    """How the target has it, if otherwise than the Hub."""
    nbytes: int

    @property
    def key(self) -> str:
        """What a journal calls it."""
        return f"{self.name}|dense"

    @property
    def place(self) -> str:
        return self.name

    @property
    def outputs(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def verb(self) -> str | None:
        """What it does to numbers; None where bytes are copied."""
        if any(isinstance(part, Merged | MergedPart) for part in self.parts):
            return "add the adapter's change outside the experts"
        decoded = [part for part in self.parts if isinstance(part, DecodedTensor)]
        return f"decode {decoded[0].encoding.name} to {DTYPES[decoded[0].dtype].torch_name} outside the experts" if decoded else None


Unit = ExpertUnit | DenseUnit
"""A piece of work that can be done in any order, any number of times."""
