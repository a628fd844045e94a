"""Two matrices of 2- or 4-byte numbers compared, of which one may be turned: a tile of it is turned back first, in the nearest cache."""

from __future__ import annotations

import torch
from numpy import uint32, uint64

from moeglot.kernels.compiled.jit import Array, jit, memory, space

COLUMNS, ROWS = 32, 256
FOUR = 4
"""Columns of 2-byte numbers that are turned at a time, as one number of 8 bytes in each row."""


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """a [rows, columns] of any strides, b with rows without gaps."""
    given, other = (memory(a), a.stride(0), a.stride(1)), memory(b)
    if a.element_size() == 2 and a.shape[1] % FOUR == b.stride(0) % FOUR == other.size % FOUR == b.data_ptr() % 8 == 0:
        return bool(_same_fours(*given, other.view("uint64"), b.stride(0) // FOUR, a.shape[0], a.shape[1] // FOUR, space(COLUMNS // FOUR * ROWS, "uint64")))
    return bool(_same(*given, other, b.stride(0), *a.shape, space(COLUMNS * ROWS, other.dtype)))


@jit
def _same_fours(a: Array, a_row: int, a_column: int, b: Array, b_row: int, rows: int, columns: int, tile: Array) -> bool:
    """b u64: four numbers each; so are `columns`."""
    wide = COLUMNS // FOUR
    for first in range(0, rows, ROWS):
        height, differ = min(ROWS, rows - first), uint64(0)
        for left in range(0, columns, wide):
            width = min(wide, columns - left)
            for c in range(width):
                at = first * a_row + (left + c) * FOUR * a_column
                i, j, k, m = a[at:], a[at + a_column :], a[at + 2 * a_column :], a[at + 3 * a_column :]
                for r in range(height):
                    low = uint64(uint64(i[r * a_row]) | uint64(uint64(j[r * a_row]) << uint64(16)))
                    high = uint64(uint64(k[r * a_row]) | uint64(uint64(m[r * a_row]) << uint64(16)))
                    tile[r * wide + c] = uint64(low | uint64(high << uint64(32)))
            for r in range(height):
                row = b[(first + r) * b_row + left :]
                for c in range(width):
                    differ |= uint64(tile[r * wide + c] ^ row[c])
        if differ:
            return False
    return True


@jit
def _same(a: Array, a_row: int, a_column: int, b: Array, b_row: int, rows: int, columns: int, tile: Array) -> bool:
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
