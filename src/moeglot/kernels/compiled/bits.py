"""Two matrices of 2- or 4-byte numbers compared, of which one may be turned: a tile of it is turned back first, in the nearest cache."""

from __future__ import annotations

import numpy
import torch
from numpy import uint32

from moeglot.kernels.compiled.jit import Array, jit, memory

COLUMNS, ROWS = 32, 128


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """a [rows, columns] of any strides, b with rows without gaps."""
    return bool(_same(memory(a), a.stride(0), a.stride(1), memory(b), b.stride(0), *a.shape))


@jit
def _same(a: Array, a_row: int, a_column: int, b: Array, b_row: int, rows: int, columns: int) -> bool:
    tile = numpy.empty(COLUMNS * ROWS, a.dtype)
    for first in range(0, rows, ROWS):
        height, differ = min(ROWS, rows - first), uint32(0)
        for left in range(0, columns, COLUMNS):
            width = min(COLUMNS, columns - left)
            for c in range(width):
                column = a[first * a_row + (left + c) * a_column :]
                for r in range(height):
                    tile[r * COLUMNS + c] = column[r * a_row]
            for r in range(height):
                row = b[(first + r) * b_row + left :]
                some = uint32(0)
                for c in range(width):
                    some |= uint32(uint32(tile[r * COLUMNS + c]) ^ uint32(row[c]))
                differ |= some
        if differ:
            return False
    return True
