"""What a step did to the numbers: how many changed, by how much, and how many blocks the values no longer determine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moeglot.encoded import Encoded
from moeglot.floats import row_pairs, squares, values
from moeglot.survival import Survival, added

if TYPE_CHECKING:
    import torch

NONE = "0, as of signs of zero"
"""The relative error of numbers of which bits changed, in words."""


@dataclass(frozen=True)
class Loss:
    """What a step did to the numbers: `changed` of `values`, their squared error and size; of the `blocks` that were looked at, those whose bytes the
    values do not determine.

    `survived`: role -> what is left of the change that was added. The other figures are those of the same step without the change.
    """

    values: int = 0
    changed: int = 0
    error: float = 0.0
    size: float = 0.0
    blocks: int = 0
    undetermined: int = 0
    survived: Mapping[str, Survival] = field(default_factory=dict)

    def __add__(self, other: Loss) -> Loss:
        sums = (a + b for a, b in zip(self._sums(), other._sums(), strict=True))
        return replace(Loss(*sums), survived=added(self.survived, other.survived))

    def _sums(self) -> tuple[Any, ...]:
        return self.values, self.changed, self.error, self.size, self.blocks, self.undetermined

    def row(self) -> tuple[Any, ...]:
        """As a line of JSON can hold it."""
        return (*self._sums(), {role: survival.row() for role, survival in self.survived.items()})

    @classmethod
    def of_row(cls, row: Sequence[Any]) -> Loss:
        """Raises `ValueError` and its like for what `row` did not make."""
        if not all(isinstance(number, (int, float)) for number in row[:-1]):
            raise ValueError(f"{row[:-1]} are not numbers")
        return replace(cls(*row[:-1]), survived={role: Survival(*of) for role, of in row[-1].items()})

    @property
    def relative(self) -> float:
        """‖changed - original‖ / ‖original‖."""
        return float((self.error / self.size) ** 0.5) if self.size else 0.0

    @property
    def told(self) -> str:
        """Of a loss that was measured on a few experts."""
        return f"relative error {f'about {self.relative:.2g}' if self.relative else NONE}"

    def as_json(self) -> dict[str, Any]:
        return {
            "exact": self.changed == 0,
            "relative_error": self.relative,
            "changed_values": self.changed,
            "blocks": self.blocks,
            "blocks_whose_scale_the_values_do_not_show": self.undetermined,
        }


def of_bytes(encoded: Encoded) -> Loss:
    """How many of its blocks have values that other codes and scales give as well. It takes ten (FP8) to eighty (INT4) times as long as decoding them."""
    scale = encoded.parts.get("scale")
    return Loss(blocks=scale.numel() if scale is not None else 0, undetermined=encoded.encoding.undetermined(encoded.parts))


def measure(stored: torch.Tensor, coded: Encoded) -> Loss:
    """Compare what was given with what will be read, some rows at a time."""
    import torch

    changed, error, size = 0, 0.0, 0.0
    for before, after in row_pairs(values(stored), coded):
        given = before.decode(torch.float64 if stored.dtype == torch.float64 else torch.float32)
        read = after.decode(given.dtype)
        integer = torch.int64 if given.dtype == torch.float64 else torch.int32
        changed += int((read.view(integer) != given.contiguous().view(integer)).sum())
        error += squares(read - given)
        size += squares(given)
    return Loss(stored.numel(), changed, error, size)
