"""INT4 compiled: nibbles that are 8 more than their numbers, times the scale of their group."""

from __future__ import annotations

import torch
from numpy import float32, int16, int32, uint8, uint32

from moeglot.kernels.backend import in_rows
from moeglot.kernels.compiled.jit import FLOATS, Array, checked, jit, memory, rows_together, singles
from moeglot.kernels.compiled.numbers import int4, stored, wide


def decode(packed: torch.Tensor, scale: torch.Tensor, group: int, out: torch.Tensor) -> None:
    """packed i32 [rows, words], scale float32 [rows, groups] -> out [rows, columns], bfloat16 or float32 of any strides."""
    rows, columns = checked(out, tuple(out.shape), *FLOATS).shape
    packed = rows_together(checked(packed, (rows, -(-columns // 8)), torch.int32))
    factors = singles(checked(scale, (rows, -(-columns // group)), torch.float32).contiguous())
    for some, to in in_rows(out):
        if to.numel():
            codes = memory(packed[some]).view("uint8")
            _decode(codes, 4 * packed.stride(0), *to.shape, factors.since(some.start * scale.shape[1]), scale.shape[1], group, memory(to), to.stride(0))


@jit
def _decode(packed: Array, packed_row: int, rows: int, columns: int, scale: Array, groups: int, group: int, out: Array, out_row: int) -> None:
    for r in range(rows):
        codes, to = packed[r * packed_row :], out[r * out_row :]
        for g in range(groups):
            factor = scale[r * groups + g]
            first, last = g * group, min(columns, (g + 1) * group)
            if first % 2 == 0:
                some, numbers = codes[first // 2 :], to[first:]
                for j in range((last - first) // 2):
                    nibble = int32(int32(some[j]) & int32(15))
                    numbers[2 * j] = stored(float32(float32(nibble - int32(8)) * factor).view(uint32), to)
                    nibble = int32(int32(some[j]) >> int32(4))
                    numbers[2 * j + 1] = stored(float32(float32(nibble - int32(8)) * factor).view(uint32), to)
                first = last - (last - first) % 2
            for k in range(first, last):
                nibble = int32(int32(codes[k >> 1] >> ((k & 1) << 2)) & int32(15))
                to[k] = stored(float32(float32(nibble - int32(8)) * factor).view(uint32), to)


def encode(values: torch.Tensor, scale: torch.Tensor, group: int, packed: torch.Tensor) -> None:
    """values [rows, columns], bfloat16 or float32, contiguous, scale float32 [rows, groups] -> packed i32 [rows, words], contiguous."""
    rows, columns = checked(values, tuple(values.shape), *FLOATS).shape
    if values.numel():
        codes = memory(torch.zeros((columns + 7) // 8 * 8, dtype=torch.int16, device="cpu"))  # those behind the last number stay 0
        factors, room = singles(checked(scale, (rows, -(-columns // group)), torch.float32).contiguous()), (codes.view("int16"), codes.view("int32"))
        to = memory(checked(packed, (rows, -(-columns // 8)), torch.int32)).view("uint8")
        _encode(memory(values), rows, columns, factors, scale.shape[1], group, to, *room)


@jit
def _encode(values: Array, rows: int, columns: int, scale: Array, groups: int, group: int, packed: Array, codes: Array, pairs: Array) -> None:
    """A row's codes are made before they are packed; `pairs` are the same memory."""
    width = (columns + 7) // 8 * 4
    for r in range(rows):
        for g in range(groups):
            factor, given, to = scale[r * groups + g], values[r * columns + g * group :], codes[g * group :]
            for k in range(min(group, columns - g * group)):
                to[k] = int16(int32(int4(float32(uint32(wide(given[k])).view(float32) / factor))) + int32(8))
        into = packed[r * width :]
        for i in range(width):
            both = pairs[i]
            into[i] = uint8(int32(both | int32(both >> int32(12))))
