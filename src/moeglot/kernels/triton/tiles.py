"""Which tiles suit which GPU: how many rows, columns and steps of a product a program takes."""

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


Steps = tuple[tuple[int, Tiles], ...]
"""The tiles for up to so many rows an expert, in rising order; the last one also for more."""


@dataclass(frozen=True)
class Table:
    """Of one architecture: tiles for plain numbers (`steps`), for FP8, whose scales need registers beside the sum's, and for four bits."""

    steps: Steps
    fp8: Steps
    mxfp4: Steps

    def of(self, kind: str) -> Steps:
        return {"fp8": self.fp8, "mxfp4": self.mxfp4}.get(kind, self.steps)


FEW = Tiles(16, 128, 64, 4, 4)
SHORT: Steps = ((16, FEW), (32, Tiles(32, 64, 64, 4, 3)))
"""Where registers and shared memory are short and tensor cores slow against decoding: runs of rows stay short."""
SINGLE = Tiles(16, 128, 32, 4, 4)
"""For float32, which takes twice the memory: beside an adapter too, it fits where a program has 99 KB, as on sm_86, 89 and 120."""
LONG: Steps = ((16, FEW), (32, Tiles(32, 128, 64, 4, 4)), (64, Tiles(64, 128, 64, 4, 3)), (128, Tiles(128, 128, 64, 8, 3)))
LONG_FP8: Steps = ((16, FEW), (32, Tiles(32, 128, 64, 4, 4)), (64, Tiles(64, 128, 64, 8, 3)), (128, Tiles(128, 128, 64, 8, 3)))
LONGER: Steps = (*LONG, (256, Tiles(256, 128, 64, 8, 3)))
LONG_MXFP4: Steps = ((16, Tiles(16, 64, 256, 4, 3)), *LONG[1:3], (128, Tiles(128, 128, 64, 4, 3)), LONGER[-1])
"""Of so few bits, more of the sum at a time: as many bytes are on their way. Four warps take fewer instructions than eight, and their registers suffice."""
TABLES: dict[str, Table] = {
    "sm_80": Table(SHORT, SHORT, SHORT),  # and 86, 89
    "sm_90": Table(LONGER, LONG_FP8, LONG_MXFP4),
    "sm_100": Table(LONG, LONG_FP8[:3], LONG),  # and 110
    "sm_120": Table(SHORT, SHORT, SHORT),
}
INTERPRETED = Tiles(16, 32, 32, 4, 1)


def table(capability: tuple[int, int]) -> Table | None:
    """The table of a compute capability; None for one without tensor cores for bfloat16 (sm_75 and before): decode, then multiply."""
    if capability < (8, 0):
        return None
    return TABLES[{8: "sm_80", 9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(capability[0], "sm_120")]


@cache
def table_of(device: torch.device) -> Table | None:
    """The table of a GPU."""
    return table(torch.cuda.get_device_capability(device))


def tiles_for(device: torch.device, rows: float, kind: str, dtype: torch.dtype) -> Tiles:
    """The tiles for so many rows an expert, on average."""
    if device.type == "cpu":
        return INTERPRETED
    found = table_of(device)
    assert found, "checked before"
    if dtype == torch.float32:
        return SINGLE
    steps = found.of(kind)
    return next((tiles for most, tiles in steps if rows <= most), steps[-1][1])
