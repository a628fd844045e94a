"""Which tiles suit which GPU: how many rows, columns and steps of a product a program takes, and from how many rows an expert on decoding first is cheaper."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Tiles:
    """A program takes `rows` rows × `outer` of what they become, and `inner` numbers of the sum at a time."""

    rows: int
    outer: int
    inner: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Table:
    """Of one architecture: the tiles for up to so many rows an expert, in rising order; the last one also for more.

    `crossover`: rows an expert from which decoding all matrices and torch's grouped GEMM are cheaper than decoding tiles again for each run of rows;
    None where that GEMM is a loop that waits for the host.
    """

    steps: tuple[tuple[int, Tiles], ...]
    crossover: int | None = None


SMALL = Tiles(16, 64, 128, 4, 4)
TABLES: dict[str, Table] = {
    # registers and shared memory are short, tensor cores slow against decoding: runs of rows stay short
    "sm_80": Table(((16, Tiles(16, 64, 64, 4, 4)), (32, Tiles(32, 64, 64, 4, 3)))),
    "sm_90": Table(((16, Tiles(16, 128, 64, 4, 4)), (32, Tiles(32, 128, 64, 4, 4)), (64, Tiles(64, 128, 64, 4, 3)), (128, Tiles(128, 128, 64, 8, 3))), 1024),
    "sm_100": Table(((16, Tiles(16, 128, 64, 4, 4)), (32, Tiles(32, 128, 64, 4, 4)), (64, Tiles(64, 128, 64, 4, 3)), (128, Tiles(128, 128, 64, 8, 3))), 1024),
    "sm_120": Table(((16, Tiles(16, 64, 64, 4, 3)), (32, Tiles(32, 64, 64, 4, 3)))),
}
INTERPRETED = Tiles(16, 32, 32, 4, 1)


def table(capability: tuple[int, int]) -> Table | None:
    """The table of a compute capability; None for one without tensor cores for bfloat16 (sm_75 and before): decode, then multiply."""
    if capability < (8, 0):
        return None
    name = "sm_80" if capability[0] == 8 else "sm_90" if capability[0] == 9 else "sm_100" if capability[0] in (10, 11) else "sm_120"
    return TABLES[name]


@cache
def table_of(device: torch.device) -> Table | None:
    """The table of a GPU."""
    return table(torch.cuda.get_device_capability(device))


def tiles_for(device: torch.device, rows: float) -> Tiles:
    """The tiles for so many rows an expert, on average."""
    if device.type == "cpu":
        return INTERPRETED
    found = table_of(device)
    assert found, "checked before"
    return next((tiles for most, tiles in found.steps if rows <= most), found.steps[-1][1])


def crossover(device: torch.device) -> int | None:
    """Rows an expert from which decoding first is cheaper, where it ever is."""
    found = table_of(device) if device.type == "cuda" else None
    return found.crossover if found else None
