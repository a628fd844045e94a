"""Encoded: a tensor as the parts of its encoding, cut and decoded; and one on disk, of which an expert is read at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import lcm
from typing import TYPE_CHECKING, SupportsIndex

from moeglot.dtypes import weight_dtype
from moeglot.encoding import Encoding, Parts
from moeglot.errors import TensorMismatch, UsageError

if TYPE_CHECKING:
    import torch

ROWS = 128
"""Rows are cut at multiples of this, or of a block if that is larger."""


@dataclass(frozen=True)
class Encoded:
    """A tensor [..., out, in] as the parts of its encoding, all with the same leading axes."""

    encoding: Encoding
    parts: Parts
    shape: tuple[int, ...]

    def __getitem__(self, expert: int) -> Encoded:
        return Encoded(self.encoding, {name: part[expert] for name, part in self.parts.items()}, self.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def is_flat(self) -> bool:
        """No run of rows has parts of its own."""
        return self.encoding.is_whole

    @property
    def row_unit(self) -> int:
        """Rows are cut at multiples of this."""
        return lcm(ROWS, *(part.blocks(len(self.shape))[0] or 1 for part in self.encoding.parts))

    def row_blocks(self, values: int = 1 << 18, unit: int = 1) -> Iterator[Encoded]:
        """A matrix [out, in] (or a vector) in runs of whole rows and blocks, of about `values` numbers each, as views; what is flat is not cut.

        `unit`: the runs are multiples of that many rows, too.
        """
        if self.is_flat:
            yield self
            return
        unit = lcm(unit, self.row_unit)
        blocks = {part.name: part.blocks(len(self.shape))[0] for part in self.encoding.parts}
        step = max(1, values // (self.shape[-1] * unit)) * unit if len(self.shape) > 1 else self.shape[0]
        for first in range(0, self.shape[0], step):
            last = min(first + step, self.shape[0])
            parts = {name: tensor[first // block : -(-last // block)] if (block := blocks[name]) else tensor for name, tensor in self.parts.items()}
            yield Encoded(self.encoding, parts, (last - first, *self.shape[1:]))

    def cut(self, axis: int, run: range) -> Encoded:
        """A run along one of the axes of `shape`, as views; every part `cuts` there."""
        blocks = {part.name: part.blocks(len(self.shape))[axis] for part in self.encoding.parts}
        parts = {
            name: tensor.narrow(axis, run.start // block, -(-run.stop // block) - run.start // block) if (block := blocks[name]) else tensor
            for name, tensor in self.parts.items()
        }
        return Encoded(self.encoding, parts, tuple(len(run) if n == axis else size for n, size in enumerate(self.shape)))

    def decode(self, dtype: str | torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """Values [..., out, in], in `out` if it is given; `dtype`: float32, bfloat16, float16 or float64.

        Raises `UsageError` for another dtype, and `TensorMismatch` if the parts themselves declare another shape.
        """
        values = self.encoding.decode(self.parts, weight_dtype(dtype), out)
        if tuple(values.shape) != self.shape:
            raise TensorMismatch(
                f"parts of {self.encoding} declare a tensor of shape {list(values.shape)}, not {list(self.shape)}",
                "the first is written beside the codes, the second follows from the format and config.json",
                "check config.json against the producer's, or pass --format if the format is another",
            )
        return values


@dataclass(frozen=True)
class LazyEncoded:
    """A tensor [e, out, in] on disk: indexing it by expert reads that expert's bytes and no others."""

    encoding: Encoding
    shape: tuple[int, ...]
    load: Callable[[int], Encoded] = field(repr=False)

    def __getitem__(self, expert: int) -> Encoded:
        if not isinstance(expert, SupportsIndex):
            raise UsageError(f"[{expert!r}] of a tensor on disk", "it is read one expert at a time", f"an expert is a number from 0 to {len(self) - 1}")
        if not -len(self) <= expert < len(self):
            raise IndexError(f"expert {expert} of {len(self)}")
        return self.load(expert % len(self))

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """The parts of all experts at once, each [e, ...]; reads everything."""
        import torch

        experts = [self[expert].parts for expert in range(len(self))]
        return {name: torch.stack([parts[name] for parts in experts]) for name in experts[0]}

    def decode(self, dtype: str | torch.dtype) -> torch.Tensor:
        """Values [e, out, in]; reads everything."""
        import torch

        return torch.stack([self[expert].decode(dtype) for expert in range(len(self))])
