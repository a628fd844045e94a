"""E2M1: the sixteen numbers of four bits, two to a byte, low nibble first; MXFP4 and NVFP4 differ in their scales alone."""

from __future__ import annotations

from functools import cache

import torch

from moeglot.kernels.lattice import Levels

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
TIES_UP = (False, True, False, True, False, True, False)  # to the code whose last bit is 0


@cache
def pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """int64 [65536]: for each pair of bytes, its four values as bfloat16 (two lookups of two values for float32)."""
    nibbles = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=dtype, device=device)
    byte = torch.arange(256, device=device)
    values = torch.stack([nibbles[byte & 15], nibbles[byte >> 4]], -1)  # [256, 2]
    if dtype == torch.float32:
        return values.view(torch.int64).flatten()  # one byte is one int64
    low = values.view(torch.int32).flatten().to(torch.int64) & 0xFFFFFFFF
    return (low[None, :] | (low[:, None] << 32)).flatten()  # little endian: the first byte is the low one


def unpack(packed: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """packed u8 [n, k], k even -> out [n, 2 k], bfloat16 or float32."""
    words = packed.int() if out.dtype == torch.float32 else packed.view(torch.int16).int().bitwise_and_(0xFFFF)
    torch.index_select(pairs(out.dtype, packed.device), 0, words.view(-1), out=out.view(torch.int64).view(-1))
    return out


@cache
def thresholds(ties: str, device: torch.device) -> torch.Tensor:
    """float32 [7]: the smallest magnitude that gets each code but the first."""
    middle = torch.tensor(MIDPOINTS, device=device)
    if ties == "away":
        return middle
    after = torch.nextafter(middle, torch.full_like(middle, 10))
    return torch.where(torch.tensor(TIES_UP, device=device), middle, after)


@cache
def _table(ties: str, device: torch.device) -> torch.Tensor:
    """u8 [131072]: the code of a float32 whose first 16 bits, the next one or any after it make the index; no threshold but its successor has more bits."""
    values = (torch.arange(1 << 17, device=device) << 15).to(torch.uint32).view(torch.float32)
    index = torch.bucketize(values.abs(), thresholds(ties, device), right=True)  # more than 6 is 6
    return (index | torch.signbit(values) << 3).to(torch.uint8)


def nearest(values: torch.Tensor, ties: str) -> torch.Tensor:
    """float32 [...] of any size -> u8 codes; the last bit but three is the sign, of zero too."""
    bits = values.contiguous().view(torch.int32)
    index = (bits >> 15).bitwise_and_(0x1FFFF) | ((bits & 0x7FFF) + 0x7FFF >> 15)
    return _table(ties, values.device).index_select(0, index.view(-1)).view(values.shape)


@cache
def _levels() -> torch.Tensor:
    return torch.tensor([*E2M1, *(-v for v in E2M1)])


def values(codes: torch.Tensor) -> torch.Tensor:
    """u8 [...], one code a byte -> float32 [...]: what they stand for under a scale of 1."""
    return _levels().index_select(0, codes.view(-1).int()).view(codes.shape)


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
    return (pairs | pairs >> 4).to(torch.uint8)
