"""Blocks that share a scale, compiled: their largest numbers, and those that codes × a scale do not reproduce."""

from __future__ import annotations

import torch
from numpy import float32, int32, uint8, uint32

from moeglot.kernels.compiled.jit import FLOATS, Array, checked, inline, jit, memory, singles, space
from moeglot.kernels.compiled.numbers import KINDS, in_order, made, magnitude, single, wide
from moeglot.kernels.grid import shape_of

CHUNK = 1 << 19


def largest(values: torch.Tensor, block: tuple[int, int], into: torch.Tensor) -> None:
    """values [rows, columns], bfloat16 or float32 -> into float32 [tiles, tiles], zeros before: the largest magnitude of each; NaN is larger than infinity."""
    tile, to = _tile(values, block), memory(checked(into, shape_of(tuple(values.shape), block), torch.float32)).view("int32")
    bits = "int16" if values.dtype == torch.bfloat16 else "int32"
    room = space(values.shape[1], bits)
    for some, given in _rows(values):
        _largest(memory(given).view(bits), given.stride(0), *given.shape, some.start, into.shape[1], *tile, to, room)


def _tile(values: torch.Tensor, block: tuple[int, int]) -> tuple[int, int]:
    rows, columns = checked(values, tuple(values.shape), *FLOATS).shape
    return block[0] or rows, block[1] or columns


def _rows(values: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
    if values.stride(1) == 1:
        return [(slice(0, len(values)), values)] if values.numel() else []
    step = max(1, CHUNK // max(1, values.shape[1]))
    return [(slice(at, at + step), values[at : at + step].contiguous()) for at in range(0, len(values), step)]


@jit
def _largest(values: Array, row: int, rows: int, columns: int, first: int, tiles: int, height: int, width: int, into: Array, room: Array) -> None:
    """`room`: the largest of each column in a row of tiles; the magnitudes of floats are ordered as their bits."""
    r = 0
    while r < rows:
        count, place, given = min(rows - r, height - (first + r) % height), (first + r) // height * tiles, values[r * row :]
        if count > 1:
            _downwards(given, row, count, columns, room)
            given = room
        for tile in range(tiles):
            some = given[tile * width :]
            most = magnitude(some[0])
            for k in range(min(width, columns - tile * width)):
                number = magnitude(some[k])
                most = number if number > most else most
            found = int32(single(most))
            into[place + tile] = found if found > into[place + tile] else into[place + tile]
        r += count


@inline
def _downwards(values: Array, row: int, count: int, columns: int, room: Array) -> None:
    for k in range(columns):
        room[k] = magnitude(values[k])
    for r in range(1, count, 4):
        second, third, fourth = min(r + 1, count - 1), min(r + 2, count - 1), min(r + 3, count - 1)
        a, b, c, d = values[r * row :], values[second * row :], values[third * row :], values[fourth * row :]
        for k in range(columns):
            one, two, three, four = magnitude(a[k]), magnitude(b[k]), magnitude(c[k]), magnitude(d[k])
            one = one if one > two else two
            three = three if three > four else four
            one = one if one > three else three
            room[k] = one if one > room[k] else room[k]


def refuted(values: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], kind: str, low: torch.Tensor, high: torch.Tensor) -> None:
    """The smallest and the largest number of each tile that codes × scale do not reproduce -> low, high, float32 [tiles, tiles], inf and -inf before."""
    tile, shape = _tile(values, block), shape_of(tuple(values.shape), block)
    low_to, high_to = (singles(checked(one, shape, torch.float32)) for one in (low, high))
    factors = singles(checked(scale, shape, torch.float32).contiguous())
    for some, given in _rows(values):
        _refuted(memory(given), given.stride(0), *given.shape, some.start, factors, scale.shape[1], *tile, KINDS[kind], low_to, high_to)


LAST, FIRST = 0x7F800000, -0x7F800001
"""inf and -inf, in that order."""


@jit
def _refuted(
    values: Array, row: int, rows: int, columns: int, first: int, scale: Array, tiles: int, height: int, width: int, kind: int, low: Array, high: Array
) -> None:
    for r in range(rows):
        for tile in range(tiles):
            place, at = (first + r) // height * tiles + tile, tile * width
            given, factor, count = values[r * row + at :], scale[place], min(width, columns - at)
            least, most = int32(LAST), int32(FIRST)
            for k in range(count):
                bits = uint32(wide(given[k]))
                key, right = in_order(int32(bits)), made(bits.view(float32), factor, kind)
                below, above = int32(LAST) if right else key, int32(FIRST) if right else key
                least = below if below < least else least
                most = above if above > most else most
            _note(least, most, place, low, high)


@jit
def _note(least: int, most: int, place: int, low: Array, high: Array) -> None:
    if most > int32(FIRST):
        below, above = uint32(in_order(int32(least))).view(float32), uint32(in_order(int32(most))).view(float32)
        low[place] = below if below < low[place] else low[place]
        high[place] = above if above > high[place] else high[place]


def fits(guesses: torch.Tensor, witness: torch.Tensor, kind: str) -> torch.Tensor:
    """guesses float32 [k, n], a number for each row [k] -> bool [k, n]: a code × the guess is that number."""
    found = torch.empty(guesses.shape, dtype=torch.bool, device="cpu")
    if guesses.numel():
        given = (singles(tensor.contiguous()) for tensor in (guesses, checked(witness, tuple(guesses.shape[:1]), torch.float32)))
        _fits(*given, *guesses.shape, KINDS[kind], memory(found.view(torch.uint8)))
    return found


@jit
def _fits(guesses: Array, witness: Array, rows: int, columns: int, kind: int, found: Array) -> None:
    for r in range(rows):
        some, to = guesses[r * columns :], found[r * columns :]
        for k in range(columns):
            to[k] = uint8(made(witness[r], some[k], kind))


def possible(amax: torch.Tensor, numbers: torch.Tensor, largest: torch.Tensor, ulps: int, least: float, kind: str) -> torch.Tensor:
    """Largest magnitude of each tile [...] and some of its numbers [n, ...] -> bool [...]: whether a scale (≥ `least`) may have codes for them all."""
    found = torch.empty(amax.shape, dtype=torch.bool, device="cpu")
    if amax.numel():
        given = (singles(tensor.contiguous()) for tensor in (amax, checked(numbers, (len(numbers), *amax.shape), torch.float32), largest))
        count = len(largest) * (2 * ulps + 1)
        room = (space(count, "float32"), space(count, "int32"), space(count, "float32"), space(count, "uint8"))
        _possible(*given, ulps, float32(least), KINDS[kind], memory(found.view(torch.uint8)), *room)
    return found


@jit
def _possible(
    amax: Array,
    numbers: Array,
    largest: Array,
    ulps: int,
    least: float,
    kind: int,
    found: Array,
    codes: Array,
    steps: Array,
    scales: Array,
    left: Array,
) -> None:
    """A guess is the quotient of the largest magnitude and that of a code, or a float32 beside it. The first number rules out nearly all."""
    each = 2 * ulps + 1
    count = len(largest) * each
    for guess in range(count):
        codes[guess], steps[guess] = largest[guess // each], guess % each - ulps
    for tile in range(len(amax)):
        most, number, some = amax[tile], numbers[tile], uint8(0)
        for guess in range(count):
            bits = int32(float32(most / codes[guess]).view(uint32))
            scale = uint32(int32(bits + steps[guess])).view(float32)
            held = uint8(uint8(made(number, scale, kind)) & uint8(scale >= least))
            scales[guess], left[guess] = scale, held
            some |= held
        found[tile] = uint8(0)
        for guess in range(count if some else 0):
            held = left[guess]
            for at in range(tile + len(amax), len(numbers) if held else 0, len(amax)):
                held = held and made(numbers[at], scales[guess], kind)
            if held:
                found[tile] = uint8(1)
                break
