"""Bytes of rows turned into runs of bytes of columns, eight by eight in words, in the nearest cache."""

from __future__ import annotations

from typing import Any

from numpy import uint64

from moeglot.kernels.compiled.jit import Array, inline, jit

TILE = 2048
"""Rows that are turned at a time: of bfloat16, four kilobytes of each row of the output."""
STEP = TILE + 64
"""From one run of turned bytes to the next: a power of two would put them all in the same few lines of the cache."""
WORDS = STEP // 8


@inline
def _exchange(x: Any, y: Any, by: Any) -> Any:
    """Two words with the upper bits of the first, in fields of twice `by` bits, exchanged for the lower bits of the second."""
    lower = uint64(uint64(0xFFFFFFFFFFFFFFFF) // uint64((uint64(1) << uint64(by)) + uint64(1)))
    differ = uint64(uint64(uint64(x >> uint64(by)) ^ y) & lower)
    return uint64(x ^ uint64(differ << uint64(by))), uint64(y ^ differ)


@jit
def turn(words: Array, row: int, count: int, into: Array) -> None:
    """Eight bytes of each of `count` rows -> eight runs in `into`, of a byte of each row; eight rows at a time, the last one again where there are no more."""
    for k in range((count + 7) // 8):
        most = count - 1 - 8 * k
        at, n = 8 * k * row, (min(1, most), min(2, most), min(3, most), min(4, most), min(5, most), min(6, most), min(7, most))
        a, b, c, d = words[at], words[at + n[0] * row], words[at + n[1] * row], words[at + n[2] * row]
        e, f, g, h = words[at + n[3] * row], words[at + n[4] * row], words[at + n[5] * row], words[at + n[6] * row]
        (a, e), (b, f), (c, g), (d, h) = _exchange(a, e, 32), _exchange(b, f, 32), _exchange(c, g, 32), _exchange(d, h, 32)
        (a, c), (b, d), (e, g), (f, h) = _exchange(a, c, 16), _exchange(b, d, 16), _exchange(e, g, 16), _exchange(f, h, 16)
        (a, b), (c, d), (e, f), (g, h) = _exchange(a, b, 8), _exchange(c, d, 8), _exchange(e, f, 8), _exchange(g, h, 8)
        into[k], into[k + WORDS], into[k + 2 * WORDS], into[k + 3 * WORDS] = a, b, c, d
        into[k + 4 * WORDS], into[k + 5 * WORDS], into[k + 6 * WORDS], into[k + 7 * WORDS] = e, f, g, h
