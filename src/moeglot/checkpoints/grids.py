"""The grids that quantization leaves behind: whether numbers, in groups along an axis, lie where an encoding could have put them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROUNDING = 2.0**-7
"""A value and the largest of its group are each off by at most 2^-8 of themselves when they were rounded to BF16."""


@dataclass(frozen=True)
class Grid:
    """`levels` × a scale, for each group of `group` numbers in a row. `tops`: what the largest number of a group may be on that grid.

    `exact`: scales are powers of two, so that BF16 holds each value and encoding again is lossless.
    """

    name: str
    group: int
    levels: tuple[float, ...]
    tops: tuple[float, ...]
    exact: bool = False

    def fitting(self, rows: torch.Tensor) -> tuple[int, int]:
        """rows [n, in] of any float type -> how many of their groups lie on the grid, of how many that could miss it: with one or two magnitudes, any fits."""
        import torch

        whole = rows.shape[1] // self.group * self.group
        groups = rows[:, :whole].abs().to(torch.float64).reshape(-1, self.group)
        ordered = groups.sort(1).values
        magnitudes = (ordered.diff(dim=1) != 0).sum(1) + (ordered[:, 0] > 0)
        groups = groups[magnitudes >= WITNESS]
        if self.exact:
            scale = torch.exp2(torch.frexp(groups.amax(1, keepdim=True)).exponent - 3.0)  # the largest becomes 4 or 6
            return int(self._on_levels(groups / scale, 0.0).sum()), len(groups)
        found = torch.zeros(len(groups), dtype=torch.bool, device="cpu")
        for top in self.tops:
            found |= self._on_levels(groups * (top / groups.amax(1, keepdim=True)), ROUNDING)
        return int(found.sum()), len(groups)

    def _on_levels(self, ratios: torch.Tensor, tolerance: float) -> torch.Tensor:
        """ratios [n, group] >= 0 -> [n]: each is a level, to within a relative tolerance."""
        import torch

        levels = torch.tensor((0.0, *self.levels), dtype=torch.float64, device="cpu")
        middles = (levels[1:] + levels[:-1]) / 2
        nearest = levels[torch.bucketize(ratios, middles)]
        return ((ratios - nearest).abs() <= tolerance * nearest).all(1)


WITNESS = 3
"""Magnitudes, zero apart, that a group must have to say something: a scale can be chosen for one, and often for two."""
E2M1 = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3 = tuple(m * 2.0**k for k in range(-18, 1) for m in range(8, 16))  # the largest of 128 numbers is anywhere on a block's grid

GRIDS = (
    Grid("mxfp4", 32, E2M1, (4.0, 6.0), exact=True),
    Grid("nvfp4", 16, E2M1, (6.0, 4.0, 3.0)),
    Grid("int4", 32, tuple(map(float, range(1, 9))), (7.0, 8.0)),
    Grid("fp8", 128, E4M3, E4M3[-8:]),
)
"""The stricter first: what lies on one may lie on a later one too. Longer groups fit as well: int4 in 128, fp8 with one scale
a row. Blocks of 128 × 128 fit along both axes."""
