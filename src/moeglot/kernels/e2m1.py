"""E2M1: the sixteen numbers of four bits, two to a byte, low nibble first; MXFP4 and NVFP4 differ in their scales alone."""

from __future__ import annotations

from functools import cache

import torch

from moeglot.kernels import backend
from moeglot.kernels.lattice import Levels

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
TIES_UP = (False, True, False, True, False, True, False)  # to the code whose last bit is 0


@cache
def pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """int64 [65536]: for each pair of bytes, its four values as bfloat16 (two lookups of two values for float32)."""
    nibbles = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=dtype, device=device)
    byte = torch.arange(256, device=device, dtype=torch.int64)
    values = torch.stack([nibbles[byte & 15], nibbles[byte >> 4]], -1)  # [256, 2]
    if dtype == torch.float32:
        return values.view(torch.int64).flatten()  # one byte is one int64
    low = values.view(torch.int32).flatten().to(torch.int64) & 0xFFFFFFFF
    return (low[None, :] | (low[:, None] << 32)).flatten()  # little endian: the first byte is the low one


def unpack(packed: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """packed u8 [n, k], k even -> out [n, 2 k], bfloat16 or float32, contiguous."""
    words = packed if out.dtype == torch.float32 else packed.view(torch.uint16)
    return look_up(torch.empty(words.shape, dtype=torch.int32, device=words.device).copy_(words), out)


def look_up(words: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """i32, contiguous: pairs of bytes -> out, bfloat16, contiguous: the four values of each; or bytes -> float32, the two of each."""
    torch.index_select(pairs(out.dtype, words.device), 0, words.view(-1), out=out.view(torch.int64).view(-1))
    return out


def across(packed: torch.Tensor) -> torch.Tensor:
    """packed u8 [4 n, 8 k], each row aligned to 8 bytes -> u16 [4, 4 k, n]: the same nibbles turned, those of four rows in a word, the first the lowest.
    Nibble 4 c + d of a row is in [d, c].

    Rows exchange pairs of nibbles, then single ones; then words are turned, a quarter of what the numbers would be.
    """
    words = packed.view(torch.int64).view(len(packed) // 4, 4, packed.shape[1] // 8)
    found = backend.working(tuple(words.shape), torch.int64, packed.device)
    differ = backend.working((len(words), 2, words.shape[2]), torch.int64, packed.device)
    _exchange(words[:, :2], words[:, 2:], found[:, :2], found[:, 2:], 8, 0x00FF00FF00FF00FF, differ)
    _exchange(found[:, ::2], found[:, 1::2], found[:, ::2], found[:, 1::2], 4, 0x0F0F0F0F0F0F0F0F, differ)
    flat = found.view(torch.int16).flatten(1)
    turned = backend.working((flat.shape[1], len(flat)), torch.int16, packed.device).copy_(flat.mT)
    return turned.view(torch.uint16).view(4, packed.shape[1] // 2, len(packed) // 4)


def _exchange(x: torch.Tensor, y: torch.Tensor, to_x: torch.Tensor, to_y: torch.Tensor, by: int, mask: int, differ: torch.Tensor) -> None:
    """x and y with the upper bits of x, in fields of twice `by` bits, exchanged for the lower bits of y."""
    torch.bitwise_right_shift(x, by, out=differ).bitwise_xor_(y).bitwise_and_(mask)
    torch.bitwise_xor(y, differ, out=to_y)
    torch.bitwise_xor(x, differ.bitwise_left_shift_(by), out=to_x)


@cache
def thresholds(ties: str, device: torch.device) -> torch.Tensor:
    """float32 [7]: the smallest magnitude that gets each code but the first."""
    middle = torch.tensor(MIDPOINTS, device=device, dtype=torch.float32)
    if ties == "away":
        return middle
    after = torch.nextafter(middle, torch.full_like(middle, 10))
    return torch.where(torch.tensor(TIES_UP, device=device, dtype=torch.bool), middle, after)


KEPT = 21
"""Bits of a float32 behind those that every threshold, tie included, is told apart by."""
REST = (1 << KEPT) - 1


@cache
def _table(ties: str, device: torch.device) -> torch.Tensor:
    """u8 [4096]: the code of a float32 whose first bits, and whether any other is set, are the index; where ties go away from zero, u8 [2048] of the first."""
    index = torch.arange(1 << 12 if ties == "even" else 1 << 11, device=device, dtype=torch.int64)
    bits = (index >> 1 << KEPT) + (index & 1) if ties == "even" else index << KEPT
    values = bits.to(torch.uint32).view(torch.float32)
    code = torch.bucketize(values.abs(), thresholds(ties, device), right=True)  # more than 6 is 6
    return (code | torch.signbit(values) << 3).to(torch.uint8)


def nearest(values: torch.Tensor, ties: str) -> torch.Tensor:
    """float32 [...] of any size, which may be overwritten -> u8 codes; the last bit but three is the sign, of zero too. NaN gets whichever code."""
    return _found(values, ties, _table(ties, values.device))


def rounded(values: torch.Tensor, ties: str) -> torch.Tensor:
    """As `nearest` -> the numbers of the codes, float32."""
    return _found(values, ties, _numbers(ties, values.device))


def _found(values: torch.Tensor, ties: str, table: torch.Tensor) -> torch.Tensor:
    index = values.contiguous().view(torch.int32)
    more = (index + REST).bitwise_right_shift_(KEPT) if ties == "even" else None
    index.bitwise_right_shift_(KEPT)
    if more is not None:
        index += more  # the same again, or one more where any other bit is set
    return table.index_select(0, index.bitwise_and_(len(table) - 1).view(-1)).view(values.shape)


@cache
def _numbers(ties: str, device: torch.device) -> torch.Tensor:
    return _levels().to(device)[_table(ties, device).int()]


@cache
def _levels() -> torch.Tensor:
    return torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float32, device="cpu")


@cache
def levels(ties: str) -> Levels:
    """The sixteen codes."""
    return Levels(_levels(), lambda quotients: nearest(quotients, ties))


def codes(packed: torch.Tensor) -> torch.Tensor:
    """u8 [..., k] -> u8 [..., 2 k]: one code a byte."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def packed(codes: torch.Tensor) -> torch.Tensor:
    """u8 [..., 2 k], one code a byte -> u8 [..., k]."""
    pairs = codes.contiguous().view(torch.int16)
    return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)
