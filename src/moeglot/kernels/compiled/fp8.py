"""FP8 E4M3 compiled: float32 bits are built from a code's, multiplied by the scale, and rounded once."""

from __future__ import annotations

import torch
from numpy import float32, int32, uint8, uint32

from moeglot.kernels.backend import in_rows
from moeglot.kernels.compiled.jit import FLOATS, Array, checked, jit, memory, rows_together, singles
from moeglot.kernels.compiled.numbers import e4m3_code, stored, wide
from moeglot.kernels.grid import shape_of


def decode(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], out: torch.Tensor) -> None:
    """weight F8_E4M3 [rows, columns], scale float32 [tiles, tiles] -> out, bfloat16 or float32 of any strides. NaN codes stay NaN."""
    rows, columns = weight.shape
    weight, tile = rows_together(weight), (block[0] or rows, block[1] or columns)
    factors = singles(checked(scale, shape_of((rows, columns), block), torch.float32).contiguous())
    checked(out, (rows, columns), *FLOATS)
    if not weight.numel():
        return
    for some, to in in_rows(out):
        _decode(memory(weight[some]), weight.stride(0), *to.shape, some.start, factors, scale.shape[1], *tile, memory(to), to.stride(0))


@jit
def _decode(
    weight: Array, weight_row: int, rows: int, columns: int, first: int, scale: Array, tiles: int, height: int, width: int, out: Array, out_row: int
) -> None:
    for r in range(rows):
        for tile in range(tiles):
            at, factor = tile * width, scale[(first + r) // height * tiles + tile]
            codes, to, count = weight[r * weight_row + at :], out[r * out_row + at :], min(width, columns - at)
            for k in range(count):
                code = uint32(codes[k])
                m = uint32(code & uint32(0x7F))
                normal = uint32(uint32(m << uint32(20)) + uint32(0x3C000000)).view(float32)
                small = float32(float32(int32(m)) * float32(0.001953125))
                bits = float32(float32(normal if m >= uint32(8) else small) * factor).view(uint32)
                bits = bits if m != uint32(0x7F) else uint32(0x7FC00000)
                to[k] = stored(uint32(bits ^ uint32(uint32(code & uint32(0x80)) << uint32(24))), to)


def encode(values: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], out: torch.Tensor) -> None:
    """values [rows, columns], bfloat16 or float32, contiguous, scale float32 [tiles, tiles] -> out F8_E4M3 of the same shape, contiguous."""
    rows, columns = shape = tuple(checked(values, tuple(values.shape), *FLOATS).shape)
    if values.numel():
        tile, to = (block[0] or rows, block[1] or columns), memory(checked(out, shape, torch.float8_e4m3fn))
        factors = singles(checked(scale, shape_of(shape, block), torch.float32).contiguous())
        _encode(memory(values), rows, columns, factors, scale.shape[1], *tile, to)


@jit
def _encode(values: Array, rows: int, columns: int, scale: Array, tiles: int, height: int, width: int, out: Array) -> None:
    for r in range(rows):
        for tile in range(tiles):
            at, factor = tile * width, scale[r // height * tiles + tile]
            given, to, count = values[r * columns + at :], out[r * columns + at :], min(width, columns - at)
            for k in range(count):
                bits = uint32(wide(given[k]))
                quotient = float32(uint32(bits & uint32(0x7FFFFFFF)).view(float32) / factor)
                quotient = quotient if quotient < float32(448.0) else float32(448.0)
                to[k] = uint8(e4m3_code(quotient) | uint32(uint32(bits >> uint32(24)) & uint32(0x80)))
