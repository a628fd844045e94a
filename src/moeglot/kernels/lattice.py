"""The numbers that codes can hold under scales that are already chosen: which is nearest, which lie on either side, and what lies beyond them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from moeglot.kernels.grid import Block, largest, tile_rows

Columns = slice | int


class Grid(ABC):
    """Numbers that a matrix [out, in] may hold, each entry its own; values are float32."""

    @abstractmethod
    def nearest(self, values: torch.Tensor, at: Columns = slice(None)) -> torch.Tensor:
        """[out, n] of the columns `at` -> the nearest numbers, as the encoding itself rounds."""

    @abstractmethod
    def around(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[out, in] -> the largest number that is not above each value, and the smallest that is not below; beyond the grid both are its end."""


@dataclass(frozen=True)
class Floats(Grid):
    """The numbers of a float type."""

    dtype: torch.dtype

    def nearest(self, values: torch.Tensor, at: Columns = slice(None)) -> torch.Tensor:
        return values.to(self.dtype).to(torch.float32)

    def around(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        near = values.to(self.dtype)
        if self.dtype in (torch.float32, torch.float64):
            return values, values
        below = torch.nextafter(near, torch.full_like(near, -torch.inf)).to(torch.float32)
        above = torch.nextafter(near, torch.full_like(near, torch.inf)).to(torch.float32)
        middle = near.to(torch.float32)
        return torch.where(middle <= values, middle, below), torch.where(middle >= values, middle, above)


@dataclass(frozen=True)
class Levels:
    """The codes of an encoding. `table` float32 [codes]: what each stands for, in units of its scale; `nearest`: quotients -> codes u8, as the encoding
    rounds them.
    """

    table: torch.Tensor
    nearest: Callable[[torch.Tensor], torch.Tensor]

    def of(self, codes: torch.Tensor) -> torch.Tensor:
        """float32: the level of each code u8; selected from a vector, in a third of the time that indexing takes."""
        return self.table.index_select(0, codes.flatten().int()).view(codes.shape)

    @property
    def ascending(self) -> torch.Tensor:
        """float32: every level once."""
        found: torch.Tensor = torch.unique(self.table[self.table.isfinite()])
        return found

    @property
    def reach(self) -> tuple[float, float]:
        """The quotients that are nearest to some level, and not to a next one at the same distance that the codes lack."""
        levels = self.ascending
        return float(1.5 * levels[0] - 0.5 * levels[1]), float(1.5 * levels[-1] - 0.5 * levels[-2])


@dataclass(frozen=True)
class Lattice(Grid):
    """value = (level of the code - zero) × scale in float32, rounded to `dtype`. scale, zero float32 and codes u8, each [out, in]: one for each number."""

    levels: Levels
    scale: torch.Tensor
    codes: torch.Tensor
    dtype: torch.dtype = torch.float32
    zero: torch.Tensor | None = None

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Lattice:
        """Of some of its rows, or with its axes moved."""
        return replace(self, scale=move(self.scale), codes=move(self.codes), zero=None if self.zero is None else move(self.zero))

    def same(self, other: Lattice) -> torch.Tensor:
        """bool [out, in]: a code stands for the same number in both."""
        found = self.scale == other.scale
        return found if self.zero is None or other.zero is None else found & (self.zero == other.zero)

    def kept(self, values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """u8: the codes of values that lie on it; where `kept`, those that are there."""
        return torch.where(kept, self.codes, self.coded(values))

    def values(self, codes: torch.Tensor | None = None, at: Columns = slice(None)) -> torch.Tensor:
        """float32: what these codes stand for; by default its own."""
        levels = self.levels.of(self.codes if codes is None else codes)
        found: torch.Tensor = (levels if self.zero is None else levels - self.zero[:, at]) * self.scale[:, at]
        return found if self.dtype == torch.float32 else found.to(self.dtype).to(torch.float32)

    def coded(self, values: torch.Tensor, at: Columns = slice(None)) -> torch.Tensor:
        """The nearest codes u8; under a scale of zero, that of zero."""
        return self.levels.nearest(self._quotients(values, at))

    def _quotients(self, values: torch.Tensor, at: Columns = slice(None)) -> torch.Tensor:
        """Which level each would be, if there were one everywhere; under a scale of zero, that of zero."""
        scale = self.scale[:, at]
        found = values / scale
        if scale.numel() and not scale.amin() > 0:
            found = torch.where(scale == 0, 0.0, found)
        return found if self.zero is None else found + self.zero[:, at]

    def nearest(self, values: torch.Tensor, at: Columns = slice(None)) -> torch.Tensor:
        return self.values(self.coded(values, at), at)

    def around(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        levels, quotients = self.levels.ascending, self._quotients(values)
        near = self.nearest(values)
        index = torch.bucketize(self.levels.of(self.coded(values)), levels)
        step = torch.where(near < values, 1, torch.where(near > values, -1, 0))
        step = torch.where(self.scale < 0, -step, step)  # levels ascend, and numbers do not
        other = levels[(index + step).clamp_(0, len(levels) - 1)]
        other = (other if self.zero is None else other - self.zero) * self.scale
        other = torch.where((quotients < levels[0]) | (quotients > levels[-1]), near, other.to(self.dtype).to(torch.float32))
        return torch.minimum(near, other), torch.maximum(near, other)

    def clips(self, values: torch.Tensor) -> torch.Tensor | None:
        """bool: a next level at the same distance, which the codes lack, would be nearer; and everything but zero under a scale of zero. None if none is so."""
        low, high = self.levels.reach
        quotients = values / self.scale  # infinite under a scale of zero, and NaN for zero itself
        quotients = quotients if self.zero is None else quotients + self.zero
        if not values.numel() or (quotients.amin() >= low and quotients.amax() <= high):  # one pass each; never so where some are NaN
            return None
        found = (quotients < low) | (quotients > high)
        return found if bool(found.any()) else None


# --- scales ----------------------------------------------------------------------------------------------------------------------------


def spread(scale: torch.Tensor, block: Block, shape: tuple[int, ...]) -> torch.Tensor:
    """float32 [tiles, tiles] -> [out, in]: the scale of each number."""
    rows = scale[tile_rows(slice(0, shape[0]), block)]
    return rows.repeat_interleave(block[1] or shape[1], 1)[:, : shape[1]]


def spread_flat(scale: torch.Tensor, size: int, shape: tuple[int, ...]) -> torch.Tensor:
    """float32 [runs of the flattened matrix] -> [out, in]."""
    return scale.repeat_interleave(size)[: shape[0] * shape[1]].view(shape)


def any_in(mask: torch.Tensor, block: Block) -> torch.Tensor:
    """bool [out, in] -> [tiles, tiles]: for some number of each."""
    return largest(mask, block) > 0


def any_in_flat(mask: torch.Tensor, size: int) -> torch.Tensor:
    """bool [out, in] -> [runs of the flattened matrix]."""
    flat = mask.flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size).any(-1)


def chosen(new: torch.Tensor, theirs: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
    """Scales of one type: `theirs` where `new`, else `mine`."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[mine.element_size()]
    found = torch.where(new.view(mine.shape), theirs.contiguous().view(bits).view(mine.shape), mine.contiguous().view(bits))
    return found.view(mine.dtype)
