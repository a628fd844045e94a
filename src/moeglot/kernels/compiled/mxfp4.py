"""MXFP4 compiled: rows by a table of bytes, turned by building bfloat16 bits, and codes by comparing bits with those of thresholds.

A magnitude m of 2 to 7 (E2M1: 1 … 6) under a scale s has the bfloat16 bits (s - 1) << 7 + m << 6; 1 (a half) has (s - 1) << 7; 0 has none.
That holds for scales of 2 to 252; the table answers for the others, which make subnormal or infinite numbers. bfloat16 holds every product exactly.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy
import torch
from numpy import float32, int32, uint8, uint16, uint32, uint64

from moeglot.kernels.compiled.jit import Array, inline, jit, jit_sums, memory, rows_together
from moeglot.kernels.compiled.numbers import e2m1
from moeglot.kernels.e2m1 import E2M1, MIDPOINTS, TIES_UP

LAST_FINITE = 252
TILE = 1024
"""Rows that are turned at a time: two kilobytes of each row of the output."""
STEP = TILE + 64
"""From one row of turned bytes to the next: a power of two would put them all in the same few lines of the cache."""


@cache
def _pairs() -> Array:
    """u32 [256 × 256]: the two bfloat16 of each byte under each scale, low nibble in the low half; 256 entries of it are in use at a time."""
    codes = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64)
    byte = torch.arange(256)
    scales = torch.exp2(torch.arange(256, dtype=torch.float64) - 127)
    scales[255] = float("nan")
    pairs = torch.stack([codes[byte & 15], codes[byte >> 4]], -1)
    return memory((scales[:, None, None] * pairs).to(torch.bfloat16).view(torch.int32).flatten())


def decode(packed: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> int:
    """packed u8 [rows, n, 16], scale u8 [rows, n] -> out [rows, 32 n], bfloat16 or float32 of any strides; returns the largest scale that made a code
    infinite or NaN, or 0.
    """
    packed, scale = rows_together(packed, 2), rows_together(scale)
    rows, groups = scale.shape
    if not out.numel():
        return 0
    if out.stride(1) == 1 and out.stride(0) % 4 == 0:
        kernel = _rows_half if out.dtype == torch.bfloat16 else _rows_single
        if packed.is_contiguous() and scale.is_contiguous() and out.is_contiguous():
            rows, groups = 1, rows * groups
        most = kernel(memory(packed), packed.stride(0), memory(scale), scale.stride(0), rows, groups, _pairs(), memory(out).view(uint64), out.stride(0))
    elif out.stride(0) == 1 and out.dtype == torch.bfloat16:
        most = _turned_half(memory(packed), packed.stride(0), memory(scale), scale.stride(0), rows, groups, _pairs(), memory(out), out.stride(1))
    else:
        found = torch.empty(out.shape, dtype=out.dtype)
        bad = decode(packed, scale, found)
        out.copy_(found)
        return bad
    return _not_finite(packed, scale) if most > LAST_FINITE else 0


def _not_finite(packed: torch.Tensor, scale: torch.Tensor) -> int:
    """The largest scale under which a code of its group is infinite or NaN, or 0: 4 or 6 under 253, 2 and more under 254, all under 255."""
    magnitude = torch.maximum(packed & 7, (packed >> 4) & 7).amax(-1)
    bad = (scale == 255) | ((scale == 254) & (magnitude >= 4)) | ((scale == 253) & (magnitude >= 6))
    return int(scale[bad].max()) if bool(bad.any()) else 0


@jit
def _rows_half(packed: Array, packed_row: int, scale: Array, scale_row: int, rows: int, groups: int, pairs: Array, out: Array, out_row: int) -> int:
    """out u64: four numbers each, two bytes' worth. Returns the largest scale."""
    most = 0
    for r in range(rows):
        powers, codes, target = scale[r * scale_row :], packed[r * packed_row :], out[r * out_row // 4 :]
        for g in range(groups):
            power = numpy.int64(powers[g])
            most = power if power > most else most
            at = power * 256
            for j in range(8):
                low, high = uint64(pairs[at + codes[g * 16 + 2 * j]]), uint64(pairs[at + codes[g * 16 + 2 * j + 1]])
                target[g * 8 + j] = low | (high << uint64(32))
    return most


@jit
def _rows_single(packed: Array, packed_row: int, scale: Array, scale_row: int, rows: int, groups: int, pairs: Array, out: Array, out_row: int) -> int:
    """out u64: two numbers each, a byte's worth. Returns the largest scale."""
    most = 0
    for r in range(rows):
        powers, codes, target = scale[r * scale_row :], packed[r * packed_row :], out[r * out_row // 2 :]
        for g in range(groups):
            power = numpy.int64(powers[g])
            most = power if power > most else most
            at = power * 256
            for j in range(16):
                pair = uint64(pairs[at + codes[g * 16 + j]])
                target[g * 16 + j] = ((pair & uint64(0xFFFF)) << uint64(16)) | ((pair >> uint64(16)) << uint64(48))
    return most


@jit
def _column_pair(codes: Array, base: Array, low: Array, high: Array, count: int) -> None:
    """A byte of each row -> the two columns of numbers that they code, next to each other in memory."""
    for k in range(count):
        byte, half = uint16(codes[k]), base[k]
        m = uint16(byte & uint16(7))
        more = uint16(half + uint16(m << uint16(6)))
        bits = more if m > uint16(1) else uint16(0)
        bits = half if m == uint16(1) else bits
        low[k] = uint16(bits | uint16(uint16(byte & uint16(8)) << uint16(12)))
        m = uint16(uint16(byte >> uint16(4)) & uint16(7))
        more = uint16(half + uint16(m << uint16(6)))
        bits = more if m > uint16(1) else uint16(0)
        bits = half if m == uint16(1) else bits
        high[k] = uint16(bits | uint16(uint16(byte & uint16(128)) << uint16(8)))


@jit
def _turned_half(packed: Array, packed_row: int, scale: Array, scale_row: int, rows: int, groups: int, pairs: Array, out: Array, out_column: int) -> int:
    """The bytes of a group are turned, a quarter of the numbers' size, and columns are decoded from them. Returns the largest scale."""
    turned, base = numpy.empty(16 * STEP, uint8), numpy.empty(TILE, uint16)
    most = 0
    for first in range(0, rows, TILE):
        count = min(TILE, rows - first)
        for g in range(groups):
            special = False
            for k in range(count):
                power = numpy.int64(scale[(first + k) * scale_row + g])
                base[k] = uint16((power - 1) << 7)
                special |= (power < 2) | (power > LAST_FINITE)
                most = power if power > most else most
                codes = packed[(first + k) * packed_row + g * 16 :]
                for j in range(16):
                    turned[j * STEP + k] = codes[j]
            for j in range(16):
                at = (g * 32 + 2 * j) * out_column + first
                _column_pair(turned[j * STEP :], base, out[at:], out[at + out_column :], count)
            if special:
                for k in range(count):
                    table = pairs[numpy.int64(scale[(first + k) * scale_row + g]) * 256 :]
                    for j in range(16):
                        pair, at = table[turned[j * STEP + k]], (g * 32 + 2 * j) * out_column + first + k
                        out[at], out[at + out_column] = uint16(pair), uint16(pair >> uint32(16))
    return most


def times(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """x float32 [n, 32 g], packed u8 [rows, g, 16], scale u8 [rows, g], no code infinite under it -> out float32 [n, rows], rows without gaps."""
    packed, scale = rows_together(packed, 2), rows_together(scale)
    if out.numel():
        even, odd = (memory(x[:, first::2].contiguous()).view(float32) for first in (0, 1))
        where = (memory(packed), packed.stride(0), memory(scale), scale.stride(0), *scale.shape, _powers())
        _times(even, odd, len(x), *where, memory(out).view(float32), out.stride(0))


@cache
def _powers() -> Array:
    """float32 [256]: 2^(scale - 127)."""
    return memory(torch.exp2(torch.arange(256, dtype=torch.float64) - 127).to(torch.float32)).view(float32)


@jit_sums
def _times(
    even: Array,
    odd: Array,
    count: int,
    packed: Array,
    packed_row: int,
    scale: Array,
    scale_row: int,
    rows: int,
    groups: int,
    powers: Array,
    out: Array,
    out_row: int,
) -> None:
    """A row is decoded into the nearest cache, its even and its odd numbers apart, and multiplied there."""
    low, high = numpy.empty(16 * groups, float32), numpy.empty(16 * groups, float32)
    for r in range(rows):
        codes, of_groups = packed[r * packed_row :], scale[r * scale_row :]
        for g in range(groups):
            by, some, to_low, to_high = powers[of_groups[g]], codes[g * 16 :], low[g * 16 :], high[g * 16 :]
            for j in range(16):
                byte = uint32(some[j])
                to_low[j] = float32(e2m1(uint32(byte & uint32(15))) * by)
                to_high[j] = float32(e2m1(uint32(byte >> uint32(4))) * by)
        for n in range(count):
            x, y, total = even[n * 16 * groups :], odd[n * 16 * groups :], float32(0)
            for k in range(16 * groups):
                total += float32(low[k] * x[k]) + float32(high[k] * y[k])
            out[n * out_row + r] = total


# --- encode ----------------------------------------------------------------------------------------------------------------------------

CEIL, FLOOR, EVEN = 0, 1, 2
RULES = {"ceil": CEIL, "floor": FLOOR, "even": EVEN}


@cache
def _thresholds(ties: str, half: bool) -> Array:
    """int32 [255 × 7]: under each scale, the bits of the smallest magnitude that gets each code but the first; of a bfloat16, or of a float32."""
    middle = torch.tensor(MIDPOINTS, dtype=torch.float64) * torch.exp2(torch.arange(255, dtype=torch.float64) - 127)[:, None]
    bits = middle.to(torch.float32).view(torch.int32).to(torch.int64)  # exact, or infinite
    if ties == "even":
        bits += ~torch.tensor(TIES_UP)
    found: Array = ((bits + 0xFFFF) >> 16 if half else bits).to(torch.int32).flatten().numpy()
    return found


def encode(values: torch.Tensor, scale_rule: str, ties: str, packed: torch.Tensor, scale: torch.Tensor) -> bool:
    """values [n, 32], bfloat16 or float32, contiguous -> packed u8 [n, 16], scale u8 [n]; False if a number is not finite."""
    half = values.dtype == torch.bfloat16
    kernel = _encode_half if half else _encode_single
    return bool(kernel(memory(values).view(int32), len(values), RULES[scale_rule], _thresholds(ties, half), memory(packed), memory(scale)))


@jit
def _power(bits: int, rule: int) -> int:
    """The biased scale for the float32 bits of a group's largest magnitude; anything under the smallest scale's has that."""
    mantissa = bits & 0x7FFFFF
    bump = (rule == CEIL and mantissa > 0x400000) or (rule == EVEN and mantissa >= 0x600000)
    return max((bits >> 23) - 2 + (1 if bump else 0), 0)


@inline
def _place(bits: Any, limits: Any) -> Any:
    """How many of seven numbers are not above these bits."""
    a, b, c, d, e, f, g = limits
    return int32(int32(7) - int32(int32(bits < a) + int32(bits < b) + int32(bits < c) + int32(bits < d) + int32(bits < e) + int32(bits < f) + int32(bits < g)))


@jit
def _encode_half(values: Array, groups: int, rule: int, limits: Array, packed: Array, scale: Array) -> bool:
    """values: two bfloat16 in each int32, a byte's worth."""
    pairs = numpy.empty(16, int32)  # of bytes, the compiler would pack each of seven comparisons
    for n in range(groups):
        largest = int32(0)
        for i in range(16):
            pair = values[n * 16 + i]
            low, high = int32(pair & int32(0x7FFF)), int32(int32(pair >> int32(16)) & int32(0x7FFF))
            low = low if low > high else high
            largest = low if low > largest else largest
        if largest >= 0x7F80:
            return False
        power = _power(numpy.int64(largest) << 16, rule)
        at = power * 7
        a, b, c, d, e, f, g = limits[at], limits[at + 1], limits[at + 2], limits[at + 3], limits[at + 4], limits[at + 5], limits[at + 6]
        for i in range(16):
            pair = values[n * 16 + i]
            m = int32(pair & int32(0x7FFF))
            low = _place(m, (a, b, c, d, e, f, g))
            m = int32(int32(pair >> int32(16)) & int32(0x7FFF))
            high = _place(m, (a, b, c, d, e, f, g))
            signs = int32(int32(int32(pair >> int32(12)) & int32(8)) | int32(int32(pair >> int32(24)) & int32(128)))
            pairs[i] = int32(int32(low | int32(high << int32(4))) | signs)
        for i in range(16):
            packed[n * 16 + i] = uint8(pairs[i])
        scale[n] = power
    return True


@jit
def _encode_single(values: Array, groups: int, rule: int, limits: Array, packed: Array, scale: Array) -> bool:
    codes = numpy.empty(32, int32)
    for n in range(groups):
        largest = int32(0)
        for i in range(32):
            m = int32(values[n * 32 + i] & int32(0x7FFFFFFF))
            largest = m if m > largest else largest
        if largest >= 0x7F800000:
            return False
        power = _power(numpy.int64(largest), rule)
        at = power * 7
        a, b, c, d, e, f, g = limits[at], limits[at + 1], limits[at + 2], limits[at + 3], limits[at + 4], limits[at + 5], limits[at + 6]
        for i in range(32):
            bits = values[n * 32 + i]
            m = int32(bits & int32(0x7FFFFFFF))
            code = _place(m, (a, b, c, d, e, f, g))
            codes[i] = int32(code | int32(int32(bits >> int32(28)) & int32(8)))
        for j in range(16):
            packed[n * 16 + j] = uint8(codes[2 * j] | int32(codes[2 * j + 1] << int32(4)))
        scale[n] = power
    return True


def undetermined(packed: torch.Tensor) -> int:
    """packed u8 [n, 16] -> how many groups have no code above 3."""
    packed = packed.contiguous()
    return int(_undetermined(memory(packed).view(uint64), len(packed))) if packed.numel() else 0


@jit
def _undetermined(packed: Array, groups: int) -> int:
    """A magnitude is above 3 where the upper two of its three bits are set, as in codes 6 and 7."""
    count = 0
    for n in range(groups):
        a, b = packed[2 * n], packed[2 * n + 1]
        large = ((a & (a << uint64(1))) | (b & (b << uint64(1)))) & uint64(0x4444444444444444)
        count += 1 if large == 0 else 0
    return count
