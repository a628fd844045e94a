"""MXFP4 compiled: rows by a table of bytes, turned by building bfloat16 bits from turned bytes, and codes by rounding bits.

A magnitude m of 2 to 7 (E2M1: 1 … 6) under a scale s has the bfloat16 bits (s - 1) << 7 + m << 6; 1 (a half) has (s - 1) << 7; 0 has none.
That holds for scales of 2 to 252; the table answers for the others, which make subnormal or infinite numbers. bfloat16 holds every product exactly.
"""

from __future__ import annotations

from functools import cache

import numpy
import torch
from numpy import float32, int32, uint8, uint16, uint32, uint64

from moeglot.kernels.compiled.jit import FLOATS, Array, Run, checked, jit, jit_sums, memory, rows_together, singles, space
from moeglot.kernels.compiled.numbers import e2m1, e2m1_code, exponent, magnitude, single
from moeglot.kernels.compiled.turning import STEP, TILE, WORDS, turn
from moeglot.kernels.e2m1 import E2M1, MIDPOINTS, TIES_UP

LAST_FINITE = 252


@cache
def _pairs() -> Run:
    """u32 [256 × 256]: the two bfloat16 of each byte under each scale, low nibble in the low half; 256 entries of it are in use at a time."""
    codes = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64, device="cpu")
    byte = torch.arange(256, dtype=torch.int64, device="cpu")
    scales = torch.exp2(torch.arange(256, dtype=torch.float64, device="cpu") - 127)
    scales[255] = float("nan")
    pairs = torch.stack([codes[byte & 15], codes[byte >> 4]], -1)
    return memory((scales[:, None, None] * pairs).to(torch.bfloat16).view(torch.int32).flatten())


def decode(packed: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> int:
    """packed u8 [rows, n, 16], scale u8 [rows, n] -> out [rows, 32 n], bfloat16 or float32 of any strides; returns the largest scale that made a code
    infinite or NaN, or 0.
    """
    rows, groups = scale.shape
    packed, scale = rows_together(checked(packed, (rows, groups, 16), torch.uint8), 2), rows_together(scale)
    if not checked(out, (rows, 32 * groups), *FLOATS).numel():
        return 0
    if out.stride(1) == 1 and out.stride(0) % 4 == 0:
        kernel = _rows_half if out.dtype == torch.bfloat16 else _rows_single
        if packed.is_contiguous() and scale.is_contiguous() and out.is_contiguous():
            rows, groups = 1, rows * groups
        most = kernel(memory(packed), packed.stride(0), memory(scale), scale.stride(0), rows, groups, _pairs(), memory(out).view("uint64"), out.stride(0))
    elif out.stride(0) == 1 and out.dtype == torch.bfloat16 and packed.stride(0) % 8 == 0:
        words = memory(packed).view("uint64"), packed.stride(0) // 8
        turned = space(16 * WORDS, "uint64")
        room = (turned, turned.view("uint8"), space(TILE, "uint16"), space(groups * STEP, "uint8"))
        most = _turned_half(*words, memory(scale), scale.stride(0), rows, groups, _pairs(), memory(out), out.stride(1), *room)
    else:
        found = torch.empty(out.shape, dtype=out.dtype, device="cpu")
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
def _turned_half(
    packed: Array,
    packed_row: int,
    scale: Array,
    scale_row: int,
    rows: int,
    groups: int,
    pairs: Array,
    out: Array,
    out_column: int,
    words: Array,
    turned: Array,
    base: Array,
    powers: Array,
) -> int:
    """packed u64. The bytes of a group are turned, a quarter of the numbers' size, and columns are decoded from them. Returns the largest scale."""
    most = uint8(0)
    for first in range(0, rows, TILE):
        count = min(TILE, rows - first)
        for k in range(count):
            for g in range(groups):
                powers[g * STEP + k] = scale[(first + k) * scale_row + g]
        for g in range(groups):
            some, least, greatest = powers[g * STEP :], uint8(255), uint8(0)
            for k in range(count):
                base[k] = uint16(uint16(some[k] - 1) << uint16(7))
                least, greatest = min(least, some[k]), max(greatest, some[k])
            most = max(most, greatest)
            for half in range(2):
                turn(packed[first * packed_row + g * 2 + half :], packed_row, count, words[half * 8 * WORDS :])
            for j in range(16):
                at = (g * 32 + 2 * j) * out_column + first
                _column_pair(turned[j * STEP :], base, out[at:], out[at + out_column :], count)
            if least < 2 or greatest > LAST_FINITE:
                for k in range(count):
                    table = pairs[numpy.int64(some[k]) * 256 :]
                    for j in range(16):
                        pair, at = table[turned[j * STEP + k]], (g * 32 + 2 * j) * out_column + first + k
                        out[at], out[at + out_column] = uint16(pair), uint16(pair >> uint32(16))
    return int(most)


def times(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """x float32 [n, 32 g], packed u8 [rows, g, 16], scale u8 [rows, g], no code infinite under it -> out float32 [n, rows], rows without gaps."""
    packed, scale = rows_together(packed, 2), rows_together(scale)
    if out.numel():
        even, odd = (singles(checked(x, (len(x), 32 * scale.shape[1]), torch.float32)[:, first::2].contiguous()) for first in (0, 1))
        where = (memory(packed), packed.stride(0), memory(scale), scale.stride(0), *scale.shape, powers())
        room = (space(even.size // len(x), "float32"), space(odd.size // len(x), "float32"))
        _times(even, odd, len(x), *where, singles(checked(out, (len(x), len(packed)), torch.float32)), out.stride(0), *room)


@cache
def powers() -> Run:
    """float32 [256]: 2^(scale - 127)."""
    return singles(torch.exp2(torch.arange(256, dtype=torch.float64, device="cpu") - 127).to(torch.float32))


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
    low: Array,
    high: Array,
) -> None:
    """A row is decoded into the nearest cache, its even and its odd numbers apart, and multiplied there."""
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


SUBNORMAL = 2
"""The largest scale under which a subnormal number may have a code other than 0."""
BLOCK = 64
"""Groups whose scales are found before their codes: a group's codes would wait for its scale."""


@cache
def thresholds(ties: str, half: bool) -> Run:
    """int32 [255 × 7]: under each scale, the bits of the smallest magnitude that gets each code but the first; of a bfloat16, or of a float32."""
    middle = torch.tensor(MIDPOINTS, dtype=torch.float64, device="cpu") * torch.exp2(torch.arange(255, dtype=torch.float64, device="cpu") - 127)[:, None]
    bits = middle.to(torch.float32).view(torch.int32).to(torch.int64)  # exact, or infinite
    if ties == "even":
        bits += ~torch.tensor(TIES_UP, dtype=torch.bool, device="cpu")
    return memory(((bits + 0xFFFF) >> 16 if half else bits).to(torch.int32).flatten()).view("int32")


def encode(values: torch.Tensor, scale_rule: str, ties: str, packed: torch.Tensor, scale: torch.Tensor) -> bool:
    """values [n, 32], bfloat16 or float32, contiguous -> packed u8 [n, 16], scale u8 [n]; False if a number is not finite."""
    half, count = values.dtype == torch.bfloat16, len(values)
    given = memory(checked(values, (count, 32), *FLOATS)).view("int16" if half else "int32")
    codes = space(32 * BLOCK, "int16")
    room = (codes, codes.view("int32"), space(BLOCK, given.dtype))
    to = memory(checked(packed, (count, 16), torch.uint8)), memory(checked(scale, (count,), torch.uint8))
    return bool(_encode(given, *values.shape, RULES[scale_rule], ties == "even", thresholds(ties, half), *to, *room))


@jit
def scale_of(bits: int, rule: int) -> int:
    """The biased scale for the float32 bits of a group's largest magnitude; anything under the smallest scale's has that."""
    mantissa = bits & 0x7FFFFF
    bump = (rule == CEIL and mantissa > 0x400000) or (rule == EVEN and mantissa >= 0x600000)
    return max((bits >> 23) - 2 + (1 if bump else 0), 0)


@jit
def _encode(
    values: Array, groups: int, width: int, rule: int, even: bool, limits: Array, packed: Array, scale: Array, codes: Array, pairs: Array, powers: Array
) -> bool:
    """`width` is 32: where the compiler knows that, it takes the largest of a group without lanes. Nor are there lanes where `codes` is handed on."""
    for first in range(0, groups, BLOCK):
        count, least = min(BLOCK, groups - first), 255
        for n in range(count):
            some = values[(first + n) * 32 :]
            largest = magnitude(some[0])
            for i in range(width):
                m = magnitude(some[i])
                largest = m if m > largest else largest
            bits = single(largest)
            if bits >= 0x7F800000:
                return False
            power = scale_of(bits, rule)
            scale[first + n], powers[n], least = power, exponent(power, largest), min(least, power)
        for n in range(count):
            some, to, power = values[(first + n) * 32 :], codes[32 * n :], powers[n]
            for i in range(32):
                to[i] = e2m1_code(some[i], power, even)
        for n in range(count if least <= SUBNORMAL else 0):
            for i in range(32 if scale[first + n] <= SUBNORMAL else 0):
                number = values[(first + n) * 32 + i]
                code = 8 if number < 0 else 0
                for j in range(7):
                    code += magnitude(number) >= limits[scale[first + n] * 7 + j]
                codes[32 * n + i] = code
        into = packed[first * 16 :]
        for i in range(count * 16):
            both = pairs[i]
            into[i] = uint8(int32(both | int32(both >> int32(12))))
    return True


def undetermined(packed: torch.Tensor) -> int:
    """packed u8 [n, 16] -> how many groups have no code above 3."""
    packed = packed.contiguous()
    return int(_undetermined(memory(packed).view("uint64"), len(packed))) if packed.numel() else 0


@jit
def _undetermined(packed: Array, groups: int) -> int:
    """A magnitude is above 3 where the upper two of its three bits are set, as in codes 6 and 7."""
    count = 0
    for n in range(groups):
        a, b = packed[2 * n], packed[2 * n + 1]
        large = ((a & (a << uint64(1))) | (b & (b << uint64(1)))) & uint64(0x4444444444444444)
        count += 1 if large == 0 else 0
    return count
