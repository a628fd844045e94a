"""Float types as they are: one number, one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeglot.dtypes import DTYPES, WEIGHT_DTYPES
from moeglot.encoding import Encoding, Part, Parts, Stored
from moeglot.errors import BadNumbers

if TYPE_CHECKING:
    import torch

    from moeglot.kernels.lattice import Grid


@dataclass(frozen=True)
class Plain(Encoding):
    """value [..., out, in] of one float type. `dtype` None stands, in a spec, for whichever float type the file uses."""

    dtype: str | None = None

    @property
    def name(self) -> str:
        return DTYPES[self.dtype].torch_name if self.dtype else "plain"

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part("value", (self.dtype,) if self.dtype else WEIGHT_DTYPES),)

    def as_stored(self, found: Mapping[str, Stored], leading: int = 0) -> Plain:
        return Plain(found["value"][0])

    def decode(self, parts: Parts, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        from moeglot.kernels.alternate import widen

        value = parts["value"]
        if out is None:
            return value.to(dtype)
        return out if widen(value, out) else out.copy_(value)

    def encode(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        assert self.dtype, "a spec's 'any float' is no encoding to write"
        from moeglot.kernels.finite import all_finite

        coded = values.to(DTYPES[self.dtype].torch)
        if coded.dtype != values.dtype and not all_finite(coded):
            raise BadNumbers(
                f"a value is not finite as {self.name}",
                f"the largest magnitude here is {values.abs().max().item():g}, the largest {self.name} is smaller",
                "pass --encode bfloat16 or --encode float32",
            )
        return {"value": coded}

    def _problem(self, parts: Parts) -> str | None:
        from moeglot.kernels.finite import all_finite

        return None if all_finite(parts["value"]) else "holds NaN or infinite numbers"

    def matrix_shape(self, parts: Parts) -> tuple[int, int]:
        rows, columns = parts["value"].shape
        return rows, columns

    def grid(self, parts: Parts, shape: tuple[int, ...]) -> Grid:
        from moeglot.kernels.lattice import Floats

        return Floats(parts["value"].dtype)

    def placed(self, values: torch.Tensor, parts: Parts, kept: torch.Tensor) -> Parts:
        return {"value": parts["value"].where(kept, self.encode(values)["value"])}

    def inverted(self, parts: Parts) -> Parts:
        """The same: there are no scales."""
        return parts

    def fits_in(self, other: Encoding) -> bool:
        return bool(isinstance(other, Plain) and self.dtype and other.dtype and DTYPES[self.dtype].fits_in(DTYPES[other.dtype]))


FLOATS = Plain()
"""Any float type: what a spec says of a tensor that is stored as it is."""
