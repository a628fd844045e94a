"""GPTQ's and AWQ's words: codes of 4 or 8 bits in an int32, along a row of the matrix or down its columns in AWQ's order; with a zero point for each group."""

from __future__ import annotations

from functools import cache

import torch

from moeglot.kernels import backend, int4
from moeglot.kernels.grid import Block, largest, plus, runs, shape_of, times
from moeglot.kernels.lattice import Levels

AWQ = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of a word each of eight numbers is in, the lowest being 0."""
WORD = 32


def middle(bits: int) -> int:
    """The code that stands for zero in a symmetric group."""
    return 1 << (bits - 1)


@cache
def levels(bits: int) -> Levels:
    """Every code, the first standing for the most negative number."""
    half = middle(bits)

    def rounded(quotients: torch.Tensor) -> torch.Tensor:
        return (quotients.round().clamp(-half, half - 1) + half).to(torch.uint8)

    return Levels(torch.arange(-half, half, dtype=torch.float32, device="cpu"), rounded)


def codes(packed: torch.Tensor, bits: int, down: bool) -> torch.Tensor:
    """i32 [out, in × bits / 32], or of AWQ `down` the columns [out / 8, in] -> u8 [out, in]."""
    if down:
        nibbles = int4.nibbles(packed.mT).view(packed.shape[1], packed.shape[0], len(AWQ))
        return nibbles[..., AWQ].flatten(1).mT
    return int4.nibbles(packed) if bits == 4 else packed.contiguous().view(torch.uint8)


def packed(codes: torch.Tensor, bits: int, down: bool) -> torch.Tensor:
    """The inverse of `codes`."""
    if down:
        order = sorted(range(len(AWQ)), key=AWQ.__getitem__)
        return int4.packed(codes.mT.reshape(codes.shape[1], -1, len(AWQ))[..., order].flatten(1)).mT
    return int4.packed(codes) if bits == 4 else codes.contiguous().view(torch.int32)


def zero_codes(zero: torch.Tensor, bits: int, awq: bool) -> torch.Tensor:
    """i32 [..., out × bits / 32, groups] -> u8 [..., out, groups], as they are stored."""
    found = torch.stack([codes(one, 4, True) if awq else codes(one.mT, bits, False).mT for one in backend.matrices(zero)])
    return found.view(*zero.shape[:-2], *found.shape[1:])


def zeros_packed(zero: torch.Tensor, bits: int, awq: bool) -> torch.Tensor:
    """The inverse of `zero_codes`, of one matrix."""
    return packed(zero, 4, True) if awq else packed(zero.mT, bits, False).mT


def decode(
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    down: bool,
    block: Block,
    dtype: torch.dtype,
    out: torch.Tensor,
) -> None:
    """words as in `codes` with axes before, scale and zero [..., out, groups] -> out [..., out, in]: (code - zero) × scale in float32.

    `zero`: how far the zero point is from the middle; None for not at all.
    """
    places = backend.places(out)
    for n, (some, factor) in enumerate(zip(backend.matrices(words), backend.matrices(scale), strict=True)):
        found, offset = codes(some, bits, down), None if zero is None else -backend.matrices(zero)[n]
        for rows in runs(*found.shape):
            values = found[rows].to(torch.float32) - middle(bits)
            if offset is not None:
                values = plus(values, rows, offset, block)
            places[n][rows] = times(values, rows, factor.to(torch.float32), block)


def away(codes: torch.Tensor, zero: torch.Tensor, bits: int, block: Block) -> torch.Tensor:
    """codes u8 [out, in], zero as in `decode` -> float32 [out, groups]: how far the farthest code of each group is from its zero point."""
    found = torch.empty(shape_of(tuple(codes.shape), block), dtype=torch.float32, device=codes.device)
    for rows in runs(*codes.shape):
        found[rows] = largest(plus(codes[rows].to(torch.float32) - middle(bits), rows, -zero, block), block)
    return found
