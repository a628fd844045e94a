"""bitsandbytes' 4-bit codes compiled: codebook × absmax, and the nearest of sixteen values."""

from __future__ import annotations

import numpy
import torch
from numpy import float32, int32, uint8, uint16, uint32

from moeglot.kernels.compiled.jit import Array, jit, memory
from moeglot.kernels.compiled.numbers import half_bits, single

SMALLEST = float32(1e-38)


def decode(packed: torch.Tensor, absmax: torch.Tensor, codebook: torch.Tensor, blocksize: int, out: torch.Tensor) -> None:
    """packed u8 [⌈n/2⌉], high nibble first, absmax float32 [⌈n/blocksize⌉], codebook float32 [16] -> out [n], bfloat16 or float32."""
    if out.numel():
        kernel = _decode_half if out.dtype == torch.bfloat16 else _decode_single
        single_scale, values = memory(absmax.contiguous()).view(float32), memory(codebook).view(float32)
        kernel(memory(packed.contiguous()), single_scale, values, blocksize, out.numel(), memory(out))


@jit
def _decode_half(packed: Array, absmax: Array, codebook: Array, blocksize: int, count: int, out: Array) -> None:
    values = numpy.empty(16, uint16)
    for b in range((count + blocksize - 1) // blocksize):
        by = absmax[b]
        for code in range(16):
            values[code] = half_bits(float32(codebook[code] * by).view(uint32))
        first, last = b * blocksize, min(count, (b + 1) * blocksize)
        codes, to = packed[first // 2 :], out[first:]
        for j in range((last - first) // 2):
            to[2 * j], to[2 * j + 1] = values[codes[j] >> 4], values[codes[j] & 15]
        if (last - first) % 2:
            to[last - first - 1] = values[codes[(last - first) // 2] >> 4]


@jit
def _decode_single(packed: Array, absmax: Array, codebook: Array, blocksize: int, count: int, out: Array) -> None:
    values = numpy.empty(16, uint32)
    for b in range((count + blocksize - 1) // blocksize):
        by = absmax[b]
        for code in range(16):
            values[code] = float32(codebook[code] * by).view(uint32)
        first, last = b * blocksize, min(count, (b + 1) * blocksize)
        codes, to = packed[first // 2 :], out[first:]
        for j in range((last - first) // 2):
            to[2 * j], to[2 * j + 1] = values[codes[j] >> 4], values[codes[j] & 15]
        if (last - first) % 2:
            to[last - first - 1] = values[codes[(last - first) // 2] >> 4]


def nearest(block: torch.Tensor, midpoints: torch.Tensor, codes: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor) -> None:
    """block [b, s], bfloat16 or float32, s even -> packed u8 [b × s / 2, 1], absmax float32 [b]; values × (1 / absmax), at a midpoint the lower value."""
    shift = uint32(16 if block.dtype == torch.bfloat16 else 0)
    where = (memory(midpoints).view(float32), memory(codes.contiguous()), memory(packed), memory(absmax).view(float32))
    _nearest(memory(block.contiguous()), shift, *block.shape, SMALLEST, bool((codes == torch.arange(16)).all()), *where)


@jit
def _nearest(
    values: Array, shift: int, blocks: int, size: int, smallest: float, sorted_: bool, midpoints: Array, codes: Array, packed: Array, absmax: Array
) -> None:
    index = numpy.empty(size, uint8)
    a, b0, c, d, e, f, g, h = midpoints[0], midpoints[1], midpoints[2], midpoints[3], midpoints[4], midpoints[5], midpoints[6], midpoints[7]
    i, j, k0, m, n, o, p = midpoints[8], midpoints[9], midpoints[10], midpoints[11], midpoints[12], midpoints[13], midpoints[14]
    for b in range(blocks):
        given, to = values[b * size :], packed[b * size // 2 :]
        largest = int32(0)
        for k in range(size):
            bits = int32(uint32(uint32(given[k]) << shift) & uint32(0x7FFFFFFF))
            largest = bits if bits > largest else largest
        most = uint32(largest).view(float32)
        absmax[b] = most
        inverse = float32(float32(1.0) / (most if most > smallest else smallest))
        for k in range(size):
            v = float32(single(given[k], shift) * inverse)
            low = int32(int32(v > a) + int32(v > b0) + int32(v > c) + int32(v > d) + int32(v > e))
            middle = int32(int32(v > f) + int32(v > g) + int32(v > h) + int32(v > i) + int32(v > j))
            high = int32(int32(v > k0) + int32(v > m) + int32(v > n) + int32(v > o) + int32(v > p))
            index[k] = uint8(int32(low + middle) + high)
        if not sorted_:
            for k in range(size):
                index[k] = codes[index[k]]
        for k in range(size // 2):
            to[k] = uint8(uint8(index[2 * k] << uint8(4)) | index[2 * k + 1])
