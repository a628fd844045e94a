"""Add changes of low rank to the roles of one stored slice, and put the sums back on the grid of its encoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

from moeglot.encoding import Encoding, Parts
from moeglot.errors import BadNumbers
from moeglot.rounding import Rounding
from moeglot.survival import Survival

if TYPE_CHECKING:
    import torch

Move = Callable[["torch.Tensor"], "torch.Tensor"]
Join = Callable[[Callable[[str], "torch.Tensor"]], "torch.Tensor"]
"""role -> [out, in] to the numbers of a stored slice."""


@dataclass(frozen=True)
class Piece:
    """One role: weight float32 [out, in], its change left [out, r] @ right [r, in]; `cut` gives its numbers from those of the stored slice."""

    weight: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    cut: Move
    place: tuple[object, ...]

    @cached_property
    def change(self) -> torch.Tensor:
        """float32 [out, in]."""
        return (self.left @ self.right).view(self.weight.shape)

    @cached_property
    def sum(self) -> torch.Tensor:
        """Weight and change, float32 [out, in]. Raises `BadNumbers` if it is not finite."""
        from moeglot.kernels.finite import all_finite

        found = self.weight + self.change
        if not all_finite(found):
            what = ", ".join(map(str, self.place))
            raise BadNumbers(f"{what}: weight and change are not finite together", "both are finite alone", "the adapter diverged; ask for an earlier one")
        return found


def fold(
    encoding: Encoding,
    parts: Parts,
    shape: tuple[int, ...],
    pieces: Mapping[str, Piece],
    join: Join,
    rounding: Rounding,
    moments: Callable[..., torch.Tensor | None],
    moved: bool,
) -> tuple[Parts, dict[str, Survival]]:
    """The pieces of one stored slice with their changes added, in its encoding; and what is left of each change.

    `parts`: the slice without the change, whose numbers are of this `shape`, as it is stored; `join` makes such of the roles' [out, in].
    `moved`: in the base's own codes; then its scales are kept, but for blocks where they do not reach, and so are the codes of numbers that do not change.
    """
    import torch

    from moeglot.kernels.lattice import Lattice
    from moeglot.kernels.rounding import rounded

    total = join(lambda role: pieces[role].sum)
    grid, beyond = encoding.grid(parts, shape), None
    kept = torch.ones(shape, dtype=torch.bool, device="cpu")
    if isinstance(grid, Lattice) and moved:
        before, beyond = grid, grid.clips(total)
        if beyond is not None:
            parts = encoding.rescaled(parts, total, beyond)
            grid = encoding.grid(parts, shape)
            assert isinstance(grid, Lattice)
            kept = grid.same(before) & (grid.codes == before.codes)  # nested scales are coded anew, and all codes with them
    elif isinstance(grid, Lattice):
        parts = encoding.encode_like(parts, total)
        grid, kept = encoding.grid(parts, shape), ~kept
    found, survived = dict[str, torch.Tensor](), {}
    for role, piece in pieces.items():
        here = grid.moved(piece.cut) if isinstance(grid, Lattice) else grid
        found[role] = rounded(rounding, piece.sum, here, piece.right, partial(moments, *piece.place), piece.place)
        clipped = 0 if beyond is None else int(piece.cut(beyond).sum())
        survived[role] = Survival.of(piece.weight, piece.change, found[role], clipped)
    stay = join(lambda role: found[role] == pieces[role].weight) & kept
    return encoding.placed(join(found.__getitem__), parts, stay), survived
