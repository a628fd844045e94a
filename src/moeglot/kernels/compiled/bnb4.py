"""bitsandbytes' 4-bit codes compiled: codebook × absmax, and the nearest of sixteen values."""

from __future__ import annotations

import numpy
import torch
from numpy import float32, int32, uint8, uint32

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
    for b in range((count + blocksize - 1) // blocksize):
        by = absmax[b]
        for k in range(b * blocksize, min(count, (b + 1) * blocksize)):
            out[k] = half_bits(float32(codebook[(packed[k >> 1] >> (4 - ((k & 1) << 2))) & 15] * by).view(uint32))


@jit
def _decode_single(packed: Array, absmax: Array, codebook: Array, blocksize: int, count: int, out: Array) -> None:
    for b in range((count + blocksize - 1) // blocksize):
        by = absmax[b]
        for k in range(b * blocksize, min(count, (b + 1) * blocksize)):
            out[k] = float32(codebook[(packed[k >> 1] >> (4 - ((k & 1) << 2))) & 15] * by).view(uint32)


def nearest(block: torch.Tensor, midpoints: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """block [b, s], bfloat16 or float32 -> codes u8 [b, s], absmax float32 [b]; values × (1 / absmax), at a midpoint the lower value."""
    block = block.contiguous()
    found, absmax = torch.empty(block.shape, dtype=torch.uint8), torch.empty(len(block))
    shift = uint32(16 if block.dtype == torch.bfloat16 else 0)
    where = (memory(midpoints).view(float32), memory(codes.contiguous()), memory(found), memory(absmax).view(float32))
    _nearest(memory(block), shift, *block.shape, SMALLEST, *where)
    return found, absmax


@jit
def _nearest(values: Array, shift: int, blocks: int, size: int, smallest: float, midpoints: Array, codes: Array, found: Array, absmax: Array) -> None:
    index = numpy.empty(size, uint8)
    m = midpoints
    for b in range(blocks):
        given, to = values[b * size :], found[b * size :]
        largest = int32(0)
        for k in range(size):
            bits = int32(uint32(uint32(given[k]) << shift) & uint32(0x7FFFFFFF))
            largest = bits if bits > largest else largest
        most = uint32(largest).view(float32)
        absmax[b] = most
        inverse = float32(float32(1.0) / (most if most > smallest else smallest))
        for k in range(size):
            v = float32(single(given[k], shift) * inverse)
            low = int32(v > m[0]) + int32(v > m[1]) + int32(v > m[2]) + int32(v > m[3]) + int32(v > m[4])
            middle = int32(v > m[5]) + int32(v > m[6]) + int32(v > m[7]) + int32(v > m[8]) + int32(v > m[9])
            high = int32(v > m[10]) + int32(v > m[11]) + int32(v > m[12]) + int32(v > m[13]) + int32(v > m[14])
            index[k] = uint8(low + middle + high)
        for k in range(size):
            to[k] = codes[index[k]]
