"""Encoding: how numbers are coded in parts; nothing of names, and of experts and orientation what the codes depend on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from moeglot.errors import TensorMismatch
from moeglot.survival import Survival

if TYPE_CHECKING:
    import torch

    from moeglot.kernels.lattice import Grid

Parts = Mapping[str, "torch.Tensor"]
Stored = tuple[str, tuple[int, ...]]
"""dtype and shape of a tensor in a file."""

WHOLE = 0
"""A block as long as the axis of a matrix, whatever its size."""

ANY = -1
"""A length that each file settles for itself, as the bytes of a text do; only in a shape that is read, never in one that is written."""


@dataclass(frozen=True)
class Part:
    """One stored tensor of an encoding. A matrix [..., out, in] has it as [..., ⌈out / block[0]⌉, ⌈in / block[1]⌉, *trailing].

    `ragged`: the last block of an axis may be short. WHOLE in `block`: one entry, whatever the axis' size. If both are WHOLE (`is_single`), a file
    has the shape `single` in place of the two axes: none, or ones; if one is, a `bare` part has no axis there in a file.
    `flat`: the axes are flattened, and each entry codes so many numbers.
    `joint`: gate and up have one between them where a stored tensor holds both, so that neither has codes of its own, unless it is carried beside them.
    `shared`: one [*trailing] for the whole stored tensor, whatever experts and projections it holds; `trailing` may be ANY there.
    """

    name: str
    dtypes: tuple[str, ...]
    block: tuple[int, int] = (1, 1)
    trailing: tuple[int, ...] = ()
    ragged: bool = False
    single: tuple[int, ...] = ()
    flat: int = 0
    shared: bool = False
    bare: bool = False
    joint: bool = False

    @property
    def apart(self) -> str:
        """The letters of a stored tensor's axes for which it has an entry each, whatever its blocks: experts, and which projection."""
        return "e" if self.joint else "ep"

    @property
    def is_single(self) -> bool:
        """One entry for a matrix."""
        return self.block == (WHOLE, WHOLE)

    def blocks(self, rank: int) -> tuple[int, ...]:
        """Values for one stored entry, along each of `rank` axes; only the last two are ever blocked."""
        return ((1,) * rank + self.block)[-rank:]

    def cuts(self, rank: int, axis: int, step: int) -> bool:
        """One of `rank` axes can be cut at each multiple of `step` values: no block lies across, and nothing here says how long the axis is."""
        block = self.blocks(rank)[axis]
        return not (self.flat or self.shared or (self.is_single and self.trailing)) and not (block and step % block)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of this part, for values of a shape [..., out, in]; a size that is no whole number of blocks is an error unless `ragged`."""
        if self.shared:
            return self.trailing
        if self.flat:
            return (-(-prod(shape) // self.flat), *self.trailing)
        blocks = tuple(block or size for size, block in zip(shape, self.blocks(len(shape)), strict=True))
        if not self.ragged and any(n % b for n, b in zip(shape, blocks, strict=True)):
            raise TensorMismatch(
                f"a tensor of shape {list(shape)} has no {self.name}: its blocks are {list(self.block)} values",
                f"the encoding codes [out, in] in blocks of {self.block[0]} × {self.block[1]}, whole ones only",
                "choose an encoding without blocks, for example --encode bfloat16",
            )
        return (*(-(-n // b) for n, b in zip(shape, blocks, strict=True)), *self.trailing)


def agree(declared: tuple[int, ...], found: tuple[int, ...]) -> bool:
    """A tensor of a file has the shape that its format derives."""
    return len(declared) == len(found) and all(size in (ANY, there) for size, there in zip(declared, found, strict=True))


class Encoding(ABC):
    """How a matrix [..., out, in] is coded in parts. Law: decode∘encode∘decode = decode.

    `name` says how to decode. Two encodings of one name, turned alike, decode each other's parts; what else they hold (rounding rules) matters to
    `encode` alone.
    """

    carried: tuple[Part, ...] = ()
    """Parts that a file may have and that weights do not tell: moved, never made."""

    @property
    def bare_of_carried(self) -> Encoding:
        """This encoding without them."""
        return self

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    def kind(self) -> str:
        """Its name without what sizes its blocks and chooses its rules."""
        return self.name.partition(":")[0]

    @property
    @abstractmethod
    def parts(self) -> tuple[Part, ...]: ...

    @property
    def joint_parts(self) -> frozenset[str]:
        """Names of the parts that gate and up have in common where a stored tensor holds both."""
        return frozenset(part.name for part in self.parts if part.joint or (part.shared and not part.trailing))

    def as_stored(self, found: Mapping[str, Stored], leading: int = 0) -> Encoding:
        """This encoding with what a spec leaves open (a scale's dtype, an input scale) settled by a file's tensors: part -> (dtype, shape).
        `leading`: how many axes a part with one entry for a matrix has before it.
        """
        return self

    @property
    def turned(self) -> Encoding | None:
        """The same numbers in the same parts, all with their two axes exchanged; None where parts are not to be turned."""
        return None

    @property
    def is_turned(self) -> bool:
        """What it calls [out, in] is [in, out] of the matrix: its groups lie down the columns."""
        return False

    @property
    def upright(self) -> Encoding:
        """Of the two, the one of [out, in]."""
        return self.turned or self if self.is_turned else self

    def lying(self, upright: bool) -> Encoding:
        """How a slice [out, in], or [in, out] if not `upright`, is coded whose roles are coded so; this one where parts are not to be turned."""
        return self.upright if upright else self if self.is_turned else self.turned or self

    @property
    def is_whole(self) -> bool:
        """No run of rows or columns of a matrix has parts of its own."""
        return any(part.flat for part in self.parts)

    @abstractmethod
    def decode(self, parts: Parts, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """parts of a matrix -> values [..., out, in] in `dtype`; written to `out` if it is given, whatever its strides, and returned."""

    @abstractmethod
    def encode(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """values [..., out, in] of any float dtype -> parts; raises `BadNumbers` for values that are not finite."""

    told_by: tuple[str, ...] = ()
    """Parts whose numbers say the shape of a matrix; of all others, `matrix_shape` looks at shapes alone."""

    @abstractmethod
    def matrix_shape(self, parts: Parts) -> tuple[int, int]:
        """[out, in] of a matrix, from its parts as they lie in a file."""

    def like(self, other: Encoding) -> Encoding:
        """This encoding with what a spec leaves open taken from another of its name, so that codes can be moved."""
        return other if type(other) is type(self) else self

    def lent(self, target: Encoding) -> Encoding:
        """A target as `like` has it where it is of this kind, so that these codes can be moved to it; else as it is."""
        return target.like(self) if self.kind == target.kind else target

    def check(self, parts: Parts) -> str | None:
        """What makes these parts impossible (a NaN, zero or placeholder scale), or None."""
        return "is a placeholder without numbers (meta device)" if any(part.is_meta for part in parts.values()) else self._problem(parts)

    @abstractmethod
    def _problem(self, parts: Parts) -> str | None:
        """As `check`, of parts that have numbers."""

    @abstractmethod
    def fits_in(self, other: Encoding) -> bool:
        """Every value that this encoding can hold, the other holds too, so that the step loses nothing whatever the numbers."""

    def recodes(self, other: Encoding) -> bool:
        """Parts of this encoding can become parts of the other without decoding, at least for some numbers."""
        return self.name == other.name and self.parts == other.parts

    def recode(self, parts: Parts, other: Encoding) -> Parts | None:
        """The same values, bit for bit, as parts of an encoding that this one `recodes` to; None if these numbers cannot be."""
        return parts

    def nearest(self, parts: Parts, other: Encoding) -> Parts | None:
        """Where `recode` gives None: the same codes under scales that move values by their last places; None if there is no such way."""
        return None

    def common(self, matrices: Sequence[torch.Tensor]) -> Encoding:
        """This encoding with what it has one of for a matrix settled for several, as if they were one: values [out, in] of each."""
        return self

    def common_codes(self, matrices: Sequence[Parts], other: Encoding) -> Encoding | None:
        """As `common` of the other encoding, for `recode` of all of these to it; None if that cannot be."""
        return other

    def raised(self, parts: Parts, beside: Iterable[tuple[Parts, float]]) -> Parts:
        """The same values under what is large enough for the numbers of several matrices, each (its parts, its largest number); may raise `LossRefused`."""
        return parts

    @property
    def is_joint(self) -> bool:
        """In a tensor of several experts, the parts of each depend on all of them; `settled` says how, and until then nothing can be encoded for it."""
        return False

    @property
    def apart(self) -> Encoding:
        """An `is_joint` encoding as it codes an expert by itself, before what depends on all."""
        return self

    def settled(self, experts: Iterable[Parts]) -> Encoding:
        """An `is_joint` encoding for one tensor of several experts, from the parts of all in `apart`, or of one in parts that are settled already."""
        return self

    def stacked(self, parts: Parts, experts: int) -> Parts:
        """The parts of one expert as a tensor of so many experts has them; only `shared` parts can differ."""
        return parts

    @abstractmethod
    def grid(self, parts: Parts, shape: tuple[int, ...]) -> Grid:
        """The numbers that a matrix [out, in] can hold under the scales of these parts."""

    @abstractmethod
    def placed(self, values: torch.Tensor, parts: Parts, kept: torch.Tensor) -> Parts:
        """values float32 [out, in], which lie on the grid of `parts`, under the same scales; where `kept`, in the codes that `parts` have."""

    def encode_like(self, parts: Parts, values: torch.Tensor) -> Parts:
        """values [..., out, in] encoded, with what `parts` say of the whole tensor beside the numbers."""
        return {**parts, **self.encode(values)}

    def rescaled(self, parts: Parts, values: torch.Tensor, beyond: torch.Tensor) -> Parts:
        """These parts with a new scale, as `encode` chooses it, for each block with a value `beyond` (bool [out, in]) its old one; codes mean nothing there."""
        return parts

    def added(self, parts: Parts, left: torch.Tensor, right: torch.Tensor) -> tuple[Parts, Survival] | None:
        """These parts with left [out, r] @ right [r, in] added and rounded to the nearest, as `grid`, `rescaled` and `placed` have it, and what is left of
        the change; None if this encoding has no shorter way than those, or some number is not finite.
        """
        return None

    def undetermined(self, parts: Parts) -> int:
        """How many blocks have values that other parts could code as well, so that decode∘encode need not return these bytes."""
        return 0

    @abstractmethod
    def inverted(self, parts: Parts) -> Parts:
        """The parts with every scale turned into its reciprocal, as a reader would see them who divides where he should multiply."""

    def __str__(self) -> str:
        return self.name
