"""A change added to MXFP4, compiled: the numbers of even and of odd columns lie apart, so that a group's sixteen bytes are sixteen of each."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy
import torch
from numpy import float32, int32, uint8, uint32

from moeglot.kernels.compiled.jit import Array, Run, checked, inline, jit, memory, rows_together, space
from moeglot.kernels.compiled.mxfp4 import CEIL, powers, scale_of, thresholds
from moeglot.kernels.compiled.numbers import e2m1

ROWS = 64
"""Rows whose change is multiplied out at a time: it stays in the second cache."""
INFINITE, MAGNITUDE = 0x7F800000, int32(0x7FFFFFFF)
LANES = 16
"""Bytes of a group: what is known of its numbers lies in one memory, in runs of as many, so that the compiler knows that none overlaps another."""
W, D, T, BYTE, SUM = 0, 2 * LANES, 4 * LANES, 6 * LANES, 7 * LANES
"""Where the bits of the numbers, of the change and of both together begin, of even columns and then of odd ones; the bytes; and the sums."""


@cache
def _reach() -> Run:
    """int32 [253]: under each scale, the bits of 7: above, a next level that the codes lack would be nearer."""
    return memory((7 * torch.exp2(torch.arange(253, dtype=torch.float64, device="cpu") - 127)).to(torch.float32)).view("int32")


def added(
    packed: torch.Tensor, scale: torch.Tensor, left: torch.Tensor, right: torch.Tensor, ties: str, to: torch.Tensor, to_scale: torch.Tensor
) -> tuple[float, ...] | None:
    """As `kernels.added.added`, into `to` and `to_scale`, which have no gaps; the sums, or None if one is not finite."""
    packed, scale = rows_together(packed, 2), rows_together(scale)
    rows, groups = scale.shape
    checked(packed, (rows, groups, LANES), torch.uint8)
    apart = torch.cat([right[:, 0::2], right[:, 1::2]], 1)
    change = torch.empty(min(ROWS, rows), 32 * groups, dtype=torch.float32, device="cpu")
    given = (memory(packed), packed.stride(0), memory(scale), scale.stride(0), groups, memory(change).view("int32"))
    tables = powers(), thresholds(ties, False), _reach()
    into = memory(checked(to, tuple(packed.shape), torch.uint8)), memory(checked(to_scale, (rows, groups), torch.uint8))
    lanes, sums, counts = space(SUM + 5 * LANES, "int32"), torch.zeros(4, dtype=torch.float64, device="cpu"), torch.zeros(2, dtype=torch.int64, device="cpu")
    room = (lanes, memory(sums).view("float64"), memory(counts).view("int64"))
    for first in range(0, rows, ROWS):
        count = min(ROWS, rows - first)
        torch.mm(left[first : first + count], apart, out=change[:count])
        if not _added(*given, first, count, *tables, *into, *room):
            return None
    return (*sums.tolist(), rows * groups * 32, *counts.tolist())


@jit
def _added(
    packed: Array,
    packed_row: int,
    scale: Array,
    scale_row: int,
    groups: int,
    change: Array,
    first: int,
    rows: int,
    powers: Array,
    limits: Array,
    reach: Array,
    to: Array,
    to_scale: Array,
    lanes: Array,
    sums: Array,
    counts: Array,
) -> bool:
    for r in range(rows):
        at = first + r
        codes, of_groups, new, new_scale = packed[at * packed_row :], scale[at * scale_row :], to[at * LANES * groups :], to_scale[at * groups :]
        lanes[SUM:] = 0
        for g in range(groups):
            low, of, fresh = g * LANES, numpy.int64(of_groups[g]), int32(0)
            largest = _totals(codes[low:], change[(2 * r * groups + g) * LANES :], change[((2 * r + 1) * groups + g) * LANES :], powers[of], lanes)
            if largest > reach[of]:
                if largest >= INFINITE:
                    return False
                counts[1] += _beyond(reach[of], lanes)
                of, fresh = scale_of(numpy.int64(largest), CEIL), int32(1)
            _coded(powers[of], limits[of * 7 :], fresh, lanes)
            for j in range(LANES):
                new[low + j] = uint8(lanes[BYTE + j])
            new_scale[g] = uint8(of)
        for j in range(LANES):
            for n in range(4):
                sums[n] += int32(lanes[SUM + n * LANES + j]).view(float32)
            counts[0] += lanes[SUM + 4 * LANES + j]
    return True


@jit
def _totals(packed: Array, low: Array, high: Array, by: float, lanes: Array) -> Any:
    """A group's numbers, and what they are with the change; returns the bits of the largest magnitude."""
    largest = int32(0)
    for j in range(LANES):
        byte, x, y = uint32(packed[j]), int32(low[j]), int32(high[j])
        w, v = float32(e2m1(uint32(byte & uint32(15))) * by), float32(e2m1(uint32(byte >> uint32(4))) * by)
        lanes[BYTE + j] = int32(byte)
        lanes[W + j], lanes[W + LANES + j], lanes[D + j], lanes[D + LANES + j] = w.view(int32), v.view(int32), x, y
        a, b = float32(w + x.view(float32)).view(int32), float32(v + y.view(float32)).view(int32)
        lanes[T + j], lanes[T + LANES + j] = a, b
        a, b = int32(a & MAGNITUDE), int32(b & MAGNITUDE)
        a = a if a > b else b
        largest = a if a > largest else largest
    return largest


@inline
def _place(bits: Any, limits: Any) -> Any:
    """How many of seven numbers are not above these bits."""
    a, b, c, d, e, f, g = limits
    return int32(int32(7) - int32(int32(bits < a) + int32(bits < b) + int32(bits < c) + int32(bits < d) + int32(bits < e) + int32(bits < f) + int32(bits < g)))


@jit
def _beyond(most: int, lanes: Array) -> Any:
    """How many magnitudes of a group have bits above `most`."""
    count = int32(0)
    for j in range(2 * LANES):
        count += int32(int32(lanes[T + j] & MAGNITUDE) > most)
    return count


@jit
def _coded(by: float, limits: Array, fresh: int, lanes: Array) -> None:
    """The nearest codes of a group, two a byte; and what they add to the sums."""
    a, b, c, d, e, f, g = limits[0], limits[1], limits[2], limits[3], limits[4], limits[5], limits[6]
    for j in range(LANES):
        old, bits = lanes[BYTE + j], lanes[T + j]
        low = int32(_place(int32(bits & MAGNITUDE), (a, b, c, d, e, f, g)) | int32(int32(bits >> int32(28)) & int32(8)))
        bits = lanes[T + LANES + j]
        high = int32(_place(int32(bits & MAGNITUDE), (a, b, c, d, e, f, g)) | int32(int32(bits >> int32(28)) & int32(8)))
        w, x = uint32(lanes[W + j]).view(float32), uint32(lanes[D + j]).view(float32)
        v, y = uint32(lanes[W + LANES + j]).view(float32), uint32(lanes[D + LANES + j]).view(float32)
        p, q = float32(float32(e2m1(uint32(low)) * by) - w), float32(float32(e2m1(uint32(high)) * by) - v)
        # what was zero and is zero keeps its sign
        low = int32(old & int32(15)) if int32(int32(int32(low | old) & int32(7)) | fresh) == int32(0) else low
        was = int32(old >> int32(4))
        high = was if int32(int32(int32(high | was) & int32(7)) | fresh) == int32(0) else high
        lanes[BYTE + j] = int32(low | int32(high << int32(4)))
        lanes[SUM + j] = float32(uint32(lanes[SUM + j]).view(float32) + float32(float32(p * x) + float32(q * y))).view(int32)
        lanes[SUM + LANES + j] = float32(uint32(lanes[SUM + LANES + j]).view(float32) + float32(float32(x * x) + float32(y * y))).view(int32)
        lanes[SUM + 2 * LANES + j] = float32(uint32(lanes[SUM + 2 * LANES + j]).view(float32) + float32(float32(p * p) + float32(q * q))).view(int32)
        lanes[SUM + 3 * LANES + j] = float32(uint32(lanes[SUM + 3 * LANES + j]).view(float32) + float32(float32(w * w) + float32(v * v))).view(int32)
        lanes[SUM + 4 * LANES + j] += int32(int32(p != float32(0)) + int32(q != float32(0)))
