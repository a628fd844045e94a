"""Codes to numbers inside a kernel: the bits of E2M1 and E4M3 shifted into those of a wider float, and one multiplication for all that is left.

The three last bits of an E2M1 code, or the seven of an E4M3 code, are the exponent and the significand of a float whose bias is wrong by a power of two,
subnormals included. So shifting gives code × 2^-126 or code × 2^-120, and the scale brings the rest back. No table is read.
Formats: OCP Microscaling Formats (MX) 1.0, 5.3; OCP 8-bit Floating Point (OFP8) 1.0.
"""

from __future__ import annotations

import triton.language as tl

from moeglot.kernels.triton.launch import jit


@jit
def e2m1(word: tl.tensor, factor: tl.tensor, second: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """Nibbles N and N + 4 of words int32 × a factor of bfloat16 or float32, which holds 2^126 × the scale -> two numbers of the factor's type.

    Both are shifted at once, the second in the word's upper half. `second`: None, or another factor, where 2^126 × the scale would be too large for one.
    """
    magnitude = word << 6 - 4 * N if N < 2 else word >> 4 * N - 6
    bits = ((word << 12 - 4 * N) & -0x7FFF8000) | (magnitude & 0x01C001C0)
    if factor.dtype == tl.bfloat16:
        low, high = bits.to(tl.int16).to(tl.bfloat16, bitcast=True), (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        low, high = (bits << 16).to(tl.float32, bitcast=True), (bits & -0x10000).to(tl.float32, bitcast=True)
    low, high = low * factor, high * factor
    if second is not None:
        low, high = low * second, high * second
    return low, high


@jit
def eight(word: tl.tensor, factor: tl.tensor, second: tl.tensor = None) -> tl.tensor:
    """words int32 [r, w] of eight nibbles, factors [r, w] or one -> [r, 8 w]; within a thread's registers."""
    a, e = e2m1(word, factor, second, 0)
    b, f = e2m1(word, factor, second, 1)
    c, g = e2m1(word, factor, second, 2)
    d, h = e2m1(word, factor, second, 3)
    even = tl.interleave(tl.interleave(a, e), tl.interleave(c, g))
    odd = tl.interleave(tl.interleave(b, f), tl.interleave(d, h))
    return tl.interleave(even, odd)


@jit
def factor_of(scale: tl.tensor, COMPUTE: tl.constexpr) -> tl.tensor:
    """E8M0 scales up to 128 -> 2^(scale - 1), the one number that a shifted E2M1 code is multiplied by. Larger ones overflow: they are refused before."""
    exponent = scale.to(tl.int32) + 126
    if COMPUTE == tl.bfloat16:
        found = (exponent << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        found = (exponent << 23).to(tl.float32, bitcast=True)
    return found


@jit
def power_of(scale: tl.tensor) -> tl.tensor:
    """Any E8M0 scale -> 2^(scale - 127) in float32, which is subnormal for 0; NaN for 255."""
    byte = scale.to(tl.int32)
    bits = tl.where(byte == 0, 1 << 22, byte << 23)
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@jit
def e4m3(word: tl.tensor, COMPUTE: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    """Bytes N and N + 2 of words int32, N 0 or 1 -> their numbers in bfloat16 or float32; the two codes of NaN become ±480."""
    sign = word << 8 if N == 0 else word
    magnitude = (word & 0x007F007F) << 4 if N == 0 else (word >> 4) & 0x07F007F0
    bits = (sign & -0x7FFF8000) | magnitude
    if COMPUTE == tl.bfloat16:
        low, high = bits.to(tl.int16).to(tl.bfloat16, bitcast=True), (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        low, high = (bits << 16).to(tl.float32, bitcast=True), (bits & -0x10000).to(tl.float32, bitcast=True)
    rest = tl.full([], 2.0**120, COMPUTE)
    return low * rest, high * rest


@jit
def four(word: tl.tensor, COMPUTE: tl.constexpr) -> tl.tensor:
    """words int32 [r, w] of four codes of E4M3 -> [r, 4 w]; within a thread's registers."""
    a, c = e4m3(word, COMPUTE, 0)
    b, d = e4m3(word, COMPUTE, 1)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@jit
def rounded_bits(values: tl.tensor) -> tl.tensor:
    """float32 -> the bits of the nearest bfloat16, ties to even, as int16; by integers, so that subnormals stay wherever it runs."""
    bits = values.to(tl.int32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, nearest).to(tl.int16)


@jit
def decoded(
    codes: tl.tensor,
    scale: tl.tensor,
    r: tl.tensor,
    column: int,
    stride_row: int,
    stride_column: int,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
    KIND: tl.constexpr,
    COMPUTE: tl.constexpr,
) -> tl.tensor:
    """A tile of an expert's stored matrix: rows r [TALL], WIDE columns from `column` on -> numbers [TALL, WIDE]; zeros outside. FP8 without its scales."""
    whole: tl.constexpr = HEIGHT % TALL == 0 and WIDTH % WIDE == 0
    if KIND == "mxfp4":
        w = column // 8 + tl.arange(0, WIDE // 8)
        at = codes + r[:, None] * (WIDTH // 32 * 4) + w[None, :]
        if whole:
            word = tl.load(at)
        else:
            word = tl.load(at, mask=(r[:, None] < HEIGHT) & (w[None, :] < WIDTH // 32 * 4), other=0)
        found = eight(word, factor_of(scale, COMPUTE))
    elif KIND == "fp8":
        w = column // 4 + tl.arange(0, WIDE // 4)
        at = codes + r[:, None] * (WIDTH // 4) + w[None, :]
        word = tl.load(at) if whole else tl.load(at, mask=(r[:, None] < HEIGHT) & (w[None, :] < WIDTH // 4), other=0)
        found = four(word, COMPUTE)
    else:
        c = column + tl.arange(0, WIDE)
        at = codes + r[:, None] * stride_row + c[None, :] * stride_column
        found = tl.load(at) if whole else tl.load(at, mask=(r[:, None] < HEIGHT) & (c[None, :] < WIDTH), other=0)
    return found


@jit
def scales_of(scales: tl.tensor, r: tl.tensor, column: int, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr) -> tl.tensor:
    """The scale of each word of a tile of MXFP4; zeros outside. Bytes are too small for an asynchronous copy: they are read a step ahead of their use."""
    w = column // 8 + tl.arange(0, WIDE // 8)
    here = (r[:, None] < HEIGHT) & (w[None, :] < WIDTH // 32 * 4)
    return tl.load(scales + r[:, None] * (WIDTH // 32) + w[None, :] // 4, mask=here, other=0)
