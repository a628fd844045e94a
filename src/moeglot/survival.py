"""How much of a change is left once it has been added to weights and rounded to their encoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


RUN = 1 << 18
"""Numbers that are summed at a time."""
SAFE = (1e-25, 1e30)
"""Sums of squares in float32 that lost nothing to its range."""


@dataclass(frozen=True)
class Survival:
    """Sums over the numbers of some matrices, where W were the weights, δ is the change and Q what is stored: ⟨Q - W, δ⟩, ⟨δ, δ⟩, ⟨Q - W, Q - W⟩,
    ⟨W, W⟩; how many numbers there are, how many differ from W, and how many lay beyond the scale that they had, so that their block got a new one.
    """

    along: float = 0.0
    change: float = 0.0
    applied: float = 0.0
    weight: float = 0.0
    values: int = 0
    changed: int = 0
    clipped: int = 0

    @classmethod
    def of(cls, weight: torch.Tensor, change: torch.Tensor, stored: torch.Tensor, clipped: int = 0) -> Survival:
        """weight, change, stored: float32 of one shape. Some numbers are summed at a time, in float32, and their sums in float64."""
        found, rows = cls(clipped=clipped), max(1, RUN * len(weight) // max(1, weight.numel()))
        for first in range(0, len(weight), rows):
            w, d, q = (tensor[first : first + rows].flatten() for tensor in (weight, change, stored))
            a = q - w
            along, size, applied, of = (float(x.dot(y)) for x, y in ((a, d), (d, d), (a, a), (w, w)))
            if not all(SAFE[0] < one < SAFE[1] for one in (size, applied, of)):
                a, d, w = q.double() - w, d.double(), w.double()
                along, size, applied, of = (float(x.dot(y)) for x, y in ((a, d), (d, d), (a, a), (w, w)))
            found += cls(along, size, applied, of, len(w), int(a.ne_(0).sum()))
        return found

    def __add__(self, other: Survival) -> Survival:
        return Survival(*(a + b for a, b in zip(self.row(), other.row(), strict=True)))

    def row(self) -> tuple[Any, ...]:
        return self.along, self.change, self.applied, self.weight, self.values, self.changed, self.clipped

    @property
    def rec(self) -> float:
        """The share of the change that is recovered along its own direction, ⟨Q - W, δ⟩ / ⟨δ, δ⟩: 1 is all of it, and more is too much. 1 if there is none."""
        return self.along / self.change if self.change else 1.0

    @property
    def cosine(self) -> float:
        """Between what was applied and the change; below `rec` by the noise that rounding adds."""
        return float(self.along / (self.change * self.applied) ** 0.5) if self.change and self.applied else 0.0 if self.change else 1.0

    @property
    def rho(self) -> float:
        """‖δ‖ / ‖W‖."""
        return float((self.change / self.weight) ** 0.5) if self.weight else 0.0

    @property
    def noise(self) -> float:
        """‖Q - (W + δ)‖ / ‖W‖: how far the stored weights are from those with all of the change."""
        return float((max(self.applied - 2 * self.along + self.change, 0.0) / self.weight) ** 0.5) if self.weight else 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "rec": self.rec,
            "cosine": self.cosine,
            "rho": self.rho,
            "values": self.values,
            "changed": self.changed,
            "clipped": self.clipped,
        }


def percent(share: float) -> str:
    """For people; what rounds to nothing has no sign."""
    told = f"{share:.1%}"
    return told.removeprefix("-") if float(told[:-1]) == 0 else told


def added(a: Mapping[str, Survival], b: Mapping[str, Survival]) -> dict[str, Survival]:
    """Role -> the sum of both."""
    return {role: a.get(role, Survival()) + b.get(role, Survival()) for role in (*a, *(role for role in b if role not in a))}


OTHERS = "other modules"
"""What takes the place of a role for matrices that are no experts."""
