"""bitsandbytes' 4-bit codes compiled: codebook × absmax, and the nearest of sixteen values."""

from __future__ import annotations

from typing import Any

import torch
from numpy import float32, int32, uint8, uint32

from moeglot.kernels.compiled.jit import FLOATS, Array, checked, inline, jit, memory, singles, space
from moeglot.kernels.compiled.numbers import stored, wide

SMALLEST = float32(1e-38)


def decode(packed: torch.Tensor, absmax: torch.Tensor, codebook: torch.Tensor, blocksize: int, out: torch.Tensor) -> None:
    """packed u8 [⌈n/2⌉], high nibble first, absmax float32 [⌈n/blocksize⌉], codebook float32 [16] -> out [n], bfloat16 or float32."""
    if out.numel():
        count, to = out.numel(), memory(checked(out, tuple(out.shape), *FLOATS))
        codes = memory(checked(packed, (-(-count // 2),), torch.uint8).contiguous())
        by = singles(checked(absmax, (-(-count // blocksize),), torch.float32).contiguous())
        _decode(codes, by, singles(checked(codebook, (16,), torch.float32)), blocksize, count, to, space(16, to.dtype))


@jit
def _decode(packed: Array, absmax: Array, codebook: Array, blocksize: int, count: int, out: Array, values: Array) -> None:
    for b in range((count + blocksize - 1) // blocksize):
        by = absmax[b]
        for code in range(16):
            values[code] = stored(float32(codebook[code] * by).view(uint32), out)
        first, last = b * blocksize, min(count, (b + 1) * blocksize)
        codes, to = packed[first // 2 :], out[first:]
        for j in range((last - first) // 2):
            to[2 * j], to[2 * j + 1] = values[codes[j] >> 4], values[codes[j] & 15]
        if (last - first) % 2:
            to[last - first - 1] = values[codes[(last - first) // 2] >> 4]


def nearest(block: torch.Tensor, midpoints: torch.Tensor, codes: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor) -> None:
    """block [b, s], bfloat16 or float32, s even -> packed u8 [b × s / 2, 1], absmax float32 [b]; values × (1 / absmax), at a midpoint the lower value."""
    pairs = codes[:0] if bool((codes == torch.arange(16, dtype=torch.int64, device="cpu")).all()) else (codes.unsqueeze(-1) << 4 | codes).flatten()
    rows, size = checked(block, tuple(block.shape), *FLOATS).shape
    into = memory(checked(packed, (rows * size // 2, 1), torch.uint8)), singles(checked(absmax, (rows,), torch.float32))
    # of bytes, the compiler would pack each of fifteen comparisons
    room = space(size // 2, "int32")
    _nearest(memory(block.contiguous()), rows, size, SMALLEST, singles(checked(midpoints, (15,), torch.float32)), memory(pairs), *into, room)


@inline
def _position(value: Any, m: Any) -> Any:
    """How many of fifteen numbers are less than the value."""
    low = int32(int32(value <= m[0]) + int32(value <= m[1]) + int32(value <= m[2]) + int32(value <= m[3]) + int32(value <= m[4]))
    middle = int32(int32(value <= m[5]) + int32(value <= m[6]) + int32(value <= m[7]) + int32(value <= m[8]) + int32(value <= m[9]))
    high = int32(int32(value <= m[10]) + int32(value <= m[11]) + int32(value <= m[12]) + int32(value <= m[13]) + int32(value <= m[14]))
    return int32(int32(15) - int32(int32(low + middle) + high))


@jit
def _nearest(values: Array, blocks: int, size: int, smallest: float, midpoints: Array, codes: Array, packed: Array, absmax: Array, pairs: Array) -> None:
    m = (
        *(midpoints[0], midpoints[1], midpoints[2], midpoints[3], midpoints[4], midpoints[5], midpoints[6], midpoints[7]),
        *(midpoints[8], midpoints[9], midpoints[10], midpoints[11], midpoints[12], midpoints[13], midpoints[14]),
    )
    for b in range(blocks):
        given, to = values[b * size :], packed[b * size // 2 :]
        largest = int32(0)
        for k in range(size):
            bits = int32(wide(given[k]) & uint32(0x7FFFFFFF))
            largest = bits if bits > largest else largest
        most = uint32(largest).view(float32)
        absmax[b] = most
        inverse = float32(float32(1.0) / (most if most > smallest else smallest))
        for k in range(size // 2):
            first = _position(float32(uint32(wide(given[2 * k])).view(float32) * inverse), m)
            second = _position(float32(uint32(wide(given[2 * k + 1])).view(float32) * inverse), m)
            pairs[k] = int32(int32(first << int32(4)) | second)
        for k in range(size // 2):
            to[k] = uint8(pairs[k])
        if len(codes):
            for k in range(size // 2):
                to[k] = codes[to[k]]
