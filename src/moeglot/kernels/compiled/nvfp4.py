"""NVFP4 compiled: sixteen codes under a float32 factor that both levels of scales have been multiplied into."""

from __future__ import annotations

from functools import cache

import torch
from numpy import float32, int32, uint8, uint32

from moeglot.kernels.backend import in_rows
from moeglot.kernels.compiled.jit import FLOATS, Array, Run, checked, jit, memory, rows_together, singles, space
from moeglot.kernels.compiled.numbers import e2m1, stored
from moeglot.kernels.e2m1 import thresholds


@cache
def _limits() -> Run:
    return singles(thresholds("even", torch.device("cpu")))


def decode(packed: torch.Tensor, factor: torch.Tensor, out: torch.Tensor) -> None:
    """packed u8 [rows, 8 n], factor float32 [rows, n] -> out [rows, 16 n], bfloat16 or float32 of any strides."""
    rows, groups = factor.shape
    packed, factors = rows_together(checked(packed, (rows, 8 * groups), torch.uint8)), singles(factor.contiguous())
    checked(out, (rows, 16 * groups), *FLOATS)
    for some, to in in_rows(out):
        if to.numel():
            given = (memory(packed[some]), packed.stride(0), len(to), factors.since(some.start * groups), groups)
            numbers = memory(to)
            _decode(*given, numbers, to.stride(0), space(16, numbers.dtype))


@jit
def _decode(packed: Array, packed_row: int, rows: int, factor: Array, groups: int, out: Array, out_row: int, values: Array) -> None:
    for r in range(rows):
        codes, to = packed[r * packed_row :], out[r * out_row :]
        for g in range(groups):
            by = factor[r * groups + g]
            for code in range(16):
                values[code] = stored(float32(e2m1(uint32(code)) * by).view(uint32), out)
            for j in range(8):
                code = codes[g * 8 + j]
                to[g * 16 + 2 * j] = values[code & 15]
                to[g * 16 + 2 * j + 1] = values[code >> 4]


def encode(values: torch.Tensor, factor: torch.Tensor, packed: torch.Tensor) -> None:
    """values float32 [n, 16], factor float32 [n] -> packed u8 [n, 8]; quotients to the nearest code, ties to even."""
    count = len(values)
    given, by = singles(checked(values, (count, 16), torch.float32).contiguous()), singles(checked(factor, (count,), torch.float32).contiguous())
    _encode(given, by, count, _limits(), memory(checked(packed, (count, 8), torch.uint8)))


@jit
def _encode(values: Array, factor: Array, groups: int, limits: Array, packed: Array) -> None:
    a, b, c, d, e, f, g = limits[0], limits[1], limits[2], limits[3], limits[4], limits[5], limits[6]
    for n in range(groups):
        by = factor[n]
        for j in range(8):
            byte = int32(0)
            for half in range(2):
                value = values[n * 16 + 2 * j + half]
                q = abs(float32(value / by))
                code = int32(int32(q >= a) + int32(q >= b) + int32(q >= c) + int32(q >= d) + int32(q >= e) + int32(q >= f) + int32(q >= g))
                sign = int32(int32(float32(value).view(uint32) >> uint32(28)) & int32(8))
                byte |= int32(code | sign) << int32(4 * half)
            packed[n * 8 + j] = uint8(byte)
