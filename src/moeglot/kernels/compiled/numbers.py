"""Roundings of one number in compiled kernels, in bits: to bfloat16, to E4M3 and to E2M1, to nearest, ties to even, as torch rounds."""

from __future__ import annotations

from typing import Any

from numpy import float32, int8, int16, int32, int64, uint8, uint16, uint32

from moeglot.kernels.compiled.jit import by_type, inline


@inline
def half_bits(bits: Any) -> Any:
    """The bits of a finite float32 -> the bits of the nearest bfloat16."""
    return uint16(uint32(uint32(bits + uint32(0x7FFF)) + uint32(uint32(bits >> uint32(16)) & uint32(1))) >> uint32(16))


@by_type
def wide(bits: Any) -> Any:
    """The bits of a bfloat16 (uint16) or of a float32 (uint32) -> the bits of that number as a float32 (uint32)."""
    if str(bits) == "uint16":
        return lambda bits: uint32(uint32(bits) << uint32(16))
    return lambda bits: uint32(bits)


@by_type
def stored(bits: Any, out: Any) -> Any:
    """The bits of a finite float32 or of NaN -> those of the nearest number that `out` holds: bfloat16 in uint16, float32 in uint32."""
    if str(out.dtype) == "uint16":
        return lambda bits, out: half_bits(bits)
    return lambda bits, out: uint32(bits)


@inline
def in_order(bits: Any) -> Any:
    """int32 that are ordered as the float32 of these bits; its own inverse."""
    return int32(bits ^ int32(int32(bits >> int32(31)) & int32(0x7FFFFFFF)))


@inline
def e4m3(magnitude: Any) -> Any:
    """A float32 of 0 to 448 -> the nearest number of E4M3; below 2^-6 its steps are 2^-9, which those of float32 are above 2^14."""
    bits = float32(magnitude).view(uint32)
    kept = uint32(uint32(uint32(bits + uint32(0x7FFFF)) + uint32(uint32(bits >> uint32(20)) & uint32(1))) & uint32(0xFFF00000)).view(float32)
    small = float32(float32(magnitude + float32(16384.0)) - float32(16384.0))
    return kept if magnitude >= float32(0.015625) else small


@inline
def e4m3_code(magnitude: Any) -> Any:
    """A float32 of 0 to 448 -> the code (uint32) of the nearest number of E4M3; of the small ones, the last bits of a sum with 2^14 count the steps."""
    bits = float32(magnitude).view(uint32)
    normal = uint32(uint32(uint32(uint32(bits + uint32(0x7FFFF)) + uint32(uint32(bits >> uint32(20)) & uint32(1))) >> uint32(20)) - uint32(960))
    small = uint32(float32(magnitude + float32(16384.0)).view(uint32) & uint32(0xF))
    return normal if magnitude >= float32(0.015625) else small


@inline
def whole(quotient: Any, lowest: Any, highest: Any) -> Any:
    """A float32 -> the nearest whole number from `lowest` to `highest`, ties to even; they are so near to 0 that a sum with 1.5 * 2^23 keeps no fraction."""
    held = quotient if quotient < highest else highest
    held = held if held > lowest else lowest
    return float32(float32(held + float32(12582912.0)) - float32(12582912.0))


@inline
def int4(quotient: Any) -> Any:
    """A float32 -> the nearest whole number of 4 bits."""
    return whole(quotient, float32(-8.0), float32(7.0))


KINDS = {"e4m3": uint8(0), "int4": int8(0), "int8": uint32(0)}
"""What tells `made` the codes: the type, which is known when it is compiled."""


@by_type
def made(value: Any, scale: Any, kind: Any) -> Any:
    """Whether a code × a float32 scale, rounded to float32, is this float32 value."""

    def by_e4m3(value: Any, scale: Any, kind: Any) -> Any:
        magnitude = abs(value)
        quotient = float32(magnitude / scale)
        quotient = quotient if quotient < float32(448.0) else float32(448.0)
        return float32(e4m3(quotient) * scale) == magnitude

    def by_int4(value: Any, scale: Any, kind: Any) -> Any:
        return float32(int4(float32(value / scale)) * scale) == value

    def by_int8(value: Any, scale: Any, kind: Any) -> Any:
        return float32(whole(float32(value / scale), float32(-128.0), float32(127.0)) * scale) == value

    return {"uint8": by_e4m3, "int8": by_int4, "uint32": by_int8}[str(kind)]


@inline
def e2m1(nibble: Any) -> Any:
    """A nibble (uint32) -> its number in E2M1."""
    m = uint32(nibble & uint32(7))
    bits = uint32(uint32(m << uint32(22)) + uint32(0x3F000000)) if m > uint32(1) else uint32(0)
    bits = uint32(0x3F000000) if m == uint32(1) else bits
    return uint32(bits | uint32(uint32(nibble & uint32(8)) << uint32(28))).view(float32)


# --- bits of a bfloat16 in int16, and of a float32 in int32 ----------------------------------------------------------------------------


@by_type
def magnitude(bits: Any) -> Any:
    """Without the sign."""
    if str(bits) == "int16":
        return lambda bits: int16(bits & int16(0x7FFF))
    return lambda bits: int32(bits & int32(0x7FFFFFFF))


@by_type
def single(bits: Any) -> Any:
    """The bits of the same number as a float32, in an int64; of a magnitude."""
    if str(bits) == "int16":
        return lambda bits: int64(bits) << 16
    return lambda bits: int64(bits)


@by_type
def exponent(power: Any, like: Any) -> Any:
    """The bits of 2^(power - 127) in the type of `like`."""
    if str(like) == "int16":
        return lambda power, like: int16(power << 7)
    return lambda power, like: int32(power << 23)


@by_type
def e2m1_code(bits: Any, scale: Any, even: Any) -> Any:
    """A number and a power of two, in bits -> the code (int16) of the nearest number of E2M1, sign and all; normal, or less than half a step of normal scales.

    Bits less those of the scale are the quotient's: those of 1 become 0, and half a power of two is a step.
    """
    of, most, step, last = (int16, 0x7FFF, 6, 12) if str(bits) == "int16" else (int32, 0x7FFFFFFF, 22, 28)

    def code(bits: Any, scale: Any, even: Any) -> Any:
        at = of(of(bits & of(most)) - scale)
        up = of(of(of(at >> of(step)) & of(even)) + of((1 << (step - 1)) - even))
        normal = of(of(of(at + up) >> of(step)) + of(2))
        normal = normal if normal < of(7) else of(7)
        small = of(1) if at >= of((-4 << step) + even) else of(0)
        small = of(2) if at >= of(-1 << step) else small
        found = normal if at >= of(0) else small
        return int16(found | of(of(bits >> of(last)) & of(8)))

    return code
