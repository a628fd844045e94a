"""Blocks that share a scale, compiled: their largest numbers, and those that codes × a scale do not reproduce."""

from __future__ import annotations

from typing import Any

import torch
from numpy import float32, int32, uint8, uint32

from moeglot.kernels.compiled.jit import Array, jit, memory
from moeglot.kernels.compiled.numbers import e4m3, int4, single

CHUNK = 1 << 19


def largest(values: torch.Tensor, block: tuple[int, int], into: torch.Tensor) -> None:
    """values [rows, columns], bfloat16 or float32 -> into float32 [tiles, tiles], zeros before: the largest magnitude of each; NaN is larger than infinity."""
    shift = uint32(16 if values.dtype == torch.bfloat16 else 0)
    tile = (block[0] or values.shape[0], block[1] or values.shape[1])
    for some, given in _rows(values):
        _largest(memory(given), given.stride(0), shift, *given.shape, some.start, into.shape[1], *tile, memory(into))


def _rows(values: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
    if values.stride(1) == 1:
        return [(slice(0, len(values)), values)] if values.numel() else []
    step = max(1, CHUNK // max(1, values.shape[1]))
    return [(slice(at, at + step), values[at : at + step].contiguous()) for at in range(0, len(values), step)]


@jit
def _largest(values: Array, row: int, shift: int, rows: int, columns: int, first: int, tiles: int, height: int, width: int, into: Array) -> None:
    for r in range(rows):
        for tile in range(tiles):
            at = tile * width
            given, count = values[r * row + at :], min(width, columns - at)
            most = int32(0)
            for k in range(count):
                bits = int32(uint32(uint32(given[k]) << shift) & uint32(0x7FFFFFFF))
                most = bits if bits > most else most
            place = (first + r) // height * tiles + tile
            into[place] = most if most > into[place] else into[place]


def refuted(values: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], kind: str, low: torch.Tensor, high: torch.Tensor) -> None:
    """The smallest and the largest number of each tile that codes × scale do not reproduce -> low, high, float32 [tiles, tiles], inf and -inf before."""
    shift = uint32(16 if values.dtype == torch.bfloat16 else 0)
    tile = (block[0] or values.shape[0], block[1] or values.shape[1])
    kernel = _refuted_e4m3 if kind == "e4m3" else _refuted_int4
    into = (memory(low).view(float32), memory(high).view(float32))
    factors = memory(scale.contiguous()).view(float32)
    for some, given in _rows(values):
        kernel(memory(given), given.stride(0), shift, *given.shape, some.start, factors, scale.shape[1], *tile, *into)


@jit
def _in_order(bits: Any) -> Any:
    """int32 that are ordered as the float32 of these bits; its own inverse."""
    return int32(bits ^ int32(int32(bits >> int32(31)) & int32(0x7FFFFFFF)))


LAST, FIRST = 0x7F800000, -0x7F800001
"""inf and -inf, in that order."""


@jit
def _refuted_e4m3(
    values: Array, row: int, shift: int, rows: int, columns: int, first: int, scale: Array, tiles: int, height: int, width: int, low: Array, high: Array
) -> None:
    for r in range(rows):
        for tile in range(tiles):
            place, at = (first + r) // height * tiles + tile, tile * width
            given, factor, count = values[r * row + at :], scale[place], min(width, columns - at)
            least, most = int32(LAST), int32(FIRST)
            for k in range(count):
                value = single(given[k], shift)
                magnitude = abs(value)
                quotient = float32(magnitude / factor)
                quotient = quotient if quotient < float32(448.0) else float32(448.0)
                wrong = float32(e4m3(quotient) * factor) != magnitude
                key = _in_order(int32(float32(value).view(uint32)))
                below, above = key if wrong else int32(LAST), key if wrong else int32(FIRST)
                least = below if below < least else least
                most = above if above > most else most
            _note(least, most, place, low, high)


@jit
def _refuted_int4(
    values: Array, row: int, shift: int, rows: int, columns: int, first: int, scale: Array, tiles: int, height: int, width: int, low: Array, high: Array
) -> None:
    for r in range(rows):
        for tile in range(tiles):
            place, at = (first + r) // height * tiles + tile, tile * width
            given, factor, count = values[r * row + at :], scale[place], min(width, columns - at)
            least, most = int32(LAST), int32(FIRST)
            for k in range(count):
                value = single(given[k], shift)
                wrong = float32(int4(float32(value / factor)) * factor) != value
                key = _in_order(int32(float32(value).view(uint32)))
                below, above = key if wrong else int32(LAST), key if wrong else int32(FIRST)
                least = below if below < least else least
                most = above if above > most else most
            _note(least, most, place, low, high)


@jit
def _note(least: int, most: int, place: int, low: Array, high: Array) -> None:
    if most > int32(FIRST):
        below, above = uint32(_in_order(int32(least))).view(float32), uint32(_in_order(int32(most))).view(float32)
        low[place] = below if below < low[place] else low[place]
        high[place] = above if above > high[place] else high[place]


def fits(guesses: torch.Tensor, witness: torch.Tensor, kind: str) -> torch.Tensor:
    """guesses float32 [k, n], a number for each row [k] -> bool [k, n]: a code × the guess is that number."""
    found = torch.empty(guesses.shape, dtype=torch.bool)
    if guesses.numel():
        kernel = _fits_e4m3 if kind == "e4m3" else _fits_int4
        kernel(memory(guesses.contiguous()).view(float32), memory(witness.contiguous()).view(float32), *guesses.shape, memory(found.view(torch.uint8)))
    return found


@jit
def _fits_e4m3(guesses: Array, witness: Array, rows: int, columns: int, found: Array) -> None:
    for r in range(rows):
        magnitude, some, to = abs(witness[r]), guesses[r * columns :], found[r * columns :]
        for k in range(columns):
            quotient = float32(magnitude / some[k])
            quotient = quotient if quotient < float32(448.0) else float32(448.0)
            to[k] = uint8(float32(e4m3(quotient) * some[k]) == magnitude)


@jit
def _fits_int4(guesses: Array, witness: Array, rows: int, columns: int, found: Array) -> None:
    for r in range(rows):
        value, some, to = witness[r], guesses[r * columns :], found[r * columns :]
        for k in range(columns):
            to[k] = uint8(float32(int4(float32(value / some[k])) * some[k]) == value)


def possible(amax: torch.Tensor, numbers: torch.Tensor, largest: torch.Tensor, ulps: int, least: float, kind: str) -> torch.Tensor:
    """Largest magnitude of each tile [...] and some of its numbers [n, ...] -> bool [...]: whether a scale (≥ `least`) may have codes for them all."""
    found = torch.empty(amax.shape, dtype=torch.bool)
    if amax.numel():
        given = (memory(tensor.contiguous()).view(float32) for tensor in (amax, numbers, largest))
        (_possible_e4m3 if kind == "e4m3" else _possible_int4)(*given, ulps, float32(least), memory(found.view(torch.uint8)))
    return found


@jit
def _possible_e4m3(amax: Array, numbers: Array, largest: Array, ulps: int, least: float, found: Array) -> None:
    for tile in range(len(amax)):
        found[tile] = uint8(0)
        for guess in range(len(largest) * (2 * ulps + 1)):
            scale = _guess(amax[tile], largest, guess, ulps)
            held = scale >= least
            for at in range(tile, len(numbers), len(amax)):
                magnitude = abs(numbers[at])
                held = held and float32(e4m3(min(float32(magnitude / scale), float32(448.0))) * scale) == magnitude
                if not held:
                    break
            if held:
                found[tile] = uint8(1)
                break


@jit
def _possible_int4(amax: Array, numbers: Array, largest: Array, ulps: int, least: float, found: Array) -> None:
    for tile in range(len(amax)):
        found[tile] = uint8(0)
        for guess in range(len(largest) * (2 * ulps + 1)):
            scale = _guess(amax[tile], largest, guess, ulps)
            held = scale >= least
            for at in range(tile, len(numbers), len(amax)):
                held = held and float32(int4(float32(numbers[at] / scale)) * scale) == numbers[at]
                if not held:
                    break
            if held:
                found[tile] = uint8(1)
                break


@jit
def _guess(amax: float, largest: Array, guess: int, ulps: int) -> Any:
    """The quotient of the largest magnitude and that of a code, or a float32 beside it."""
    each = 2 * ulps + 1
    bits = int32(float32(amax / largest[guess // each]).view(uint32))
    return uint32(int32(bits + int32(guess % each - ulps))).view(float32)
