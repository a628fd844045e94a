"""INT4 in offset binary: eight nibbles to an int32, the lowest first, each 8 more than its number, or than its number and a zero point."""

from __future__ import annotations

from functools import cache

import torch

from moeglot.dtypes import DTYPES
from moeglot.errors import TensorMismatch
from moeglot.kernels import backend, integers
from moeglot.kernels.grid import Block, in_singles, largest, matrices, over, plus, runs, shape_of, times
from moeglot.kernels.lattice import Levels

WORD = 8  # numbers in an int32
OFFSET = 8
WIDEST = 15
"""The largest magnitude of a code less its zero point."""


@cache
def _pairs(device: torch.device) -> torch.Tensor:
    """int64 [256]: the two float32 of each byte."""
    byte = torch.arange(256, device=device, dtype=torch.int64)
    return torch.stack([(byte & 15) - OFFSET, (byte >> 4) - OFFSET], -1).to(torch.float32).view(torch.int64).flatten()


@cache
def levels() -> Levels:
    """The sixteen nibbles: 0 is -8."""

    def rounded(quotients: torch.Tensor) -> torch.Tensor:
        return (quotients.round().clamp(-OFFSET, OFFSET - 1) + OFFSET).to(torch.uint8)

    return Levels(torch.arange(-OFFSET, OFFSET, dtype=torch.float32, device="cpu"), rounded)


def columns_of(shape: torch.Tensor) -> int:
    """`shape` [..., 2] holds [out, in] of each matrix -> in, which is one number."""
    columns = torch.unique(shape[..., 1]).tolist()
    if len(columns) != 1:
        raise TensorMismatch(f"the shapes beside packed numbers name {columns} columns", "matrices stored as one tensor have one size", "fetch the file again")
    return int(columns[0])


def decode(
    packed: torch.Tensor,
    scale: torch.Tensor,
    columns: int,
    block: Block,
    dtype: torch.dtype,
    zero: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """packed i32 [..., out, ⌈in / 8⌉], scale [..., out, in / group] -> [..., out, in], code × scale in float32.

    `zero` i32 [..., ⌈out / 8⌉, in / group]: the zero points, packed along the rows; (code - zero) × scale. Raises `TensorMismatch` and `BadNumbers`.
    """
    shape = (*packed.shape[:-1], columns)
    if tuple(scale.shape) != shape_of(shape, block) or packed.shape[-1] != -(-columns // WORD):
        raise TensorMismatch(
            f"packed numbers {list(packed.shape)} and scales {list(scale.shape)} are not those of a matrix with {columns} columns",
            f"eight numbers are packed in an int32, and {block[1] or 'all'} of a row share a scale",
            "check group_size in config.json",
        )
    if not bool(scale.isfinite().all()):
        raise integers.infinite(4)
    values = backend.place(shape, dtype, packed.device, out)
    zeros = None if zero is None else matrices(zero_points(zero, shape[-2]))
    fast = backend.compiled("int4", packed, values) if zero is None and dtype in (torch.bfloat16, torch.float32) else None
    for n, (words, factor, to) in enumerate(zip(matrices(packed), matrices(scale), backend.places(values), strict=True)):
        if fast:
            fast.decode(words, factor.to(torch.float32), block[1] or columns, to)
            continue
        for rows in runs(*to.shape):
            codes = _unpack(words[rows])[:, :columns]
            if zeros is not None:
                codes = plus(codes, rows, -zeros[n], block)
            to[rows] = times(codes, rows, factor.to(torch.float32), block)
    return values


def zero_points(zero: torch.Tensor, rows: int) -> torch.Tensor:
    """i32 [..., ⌈out / 8⌉, groups], the lowest nibble first -> float32 [..., out, groups], from -8 to 7."""
    shifts = torch.arange(0, 4 * WORD, 4, dtype=torch.int32, device=zero.device).view(WORD, 1)
    nibbles = (zero.unsqueeze(-2) >> shifts) & 15
    return (nibbles - OFFSET).flatten(-3, -2)[..., :rows, :].to(torch.float32)


def pack_zero(zero: torch.Tensor) -> torch.Tensor:
    """float32 [out, groups] from -8 to 7 -> i32 [⌈out / 8⌉, groups]."""
    return packed((zero.mT + OFFSET).to(torch.uint8)).mT.contiguous()


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """i32 [n, k] -> float32 [n, 8 k]."""
    index = packed.contiguous().view(torch.uint8).int()
    return torch.index_select(_pairs(index.device), 0, index.view(-1)).view(torch.float32).view(len(packed), -1)


def encode(values: torch.Tensor, block: Block, dtype: str, divisor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """values [..., out, in] of a float type -> packed i32 [..., out, ⌈in / 8⌉], scale [..., out, in / group] in `dtype`. Zero has no sign."""
    found = torch.empty((*values.shape[:-1], -(-values.shape[-1] // WORD)), dtype=torch.int32, device="cpu")
    scale = torch.empty(shape_of(tuple(values.shape), block), dtype=DTYPES[dtype].torch, device="cpu")
    fast = backend.compiled("int4", values)
    for given, words, factor in zip(matrices(values), matrices(found), matrices(scale), strict=True):
        for rows, some in in_singles(given):
            factor[rows] = integers.scales(given[rows], block, dtype, 4, divisor)
            if fast:
                fast.encode(backend.in_half_or_single(given[rows]), factor[rows].to(torch.float32), block[1] or given.shape[1], words[rows])
                continue
            quotients = over(some.copy_(given[rows]), slice(0, len(some)), factor[rows].to(torch.float32), block)
            words[rows] = packed((integers.nearest(quotients, 4) + OFFSET).to(torch.uint8))
    return found, scale


def encode_with_zero(values: torch.Tensor, block: Block, dtype: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `encode`, with a zero point for each group [..., ⌈out / 8⌉, in / group]: codes span the smallest to the largest number, and zero is among them."""
    shape = shape_of(tuple(values.shape), block)
    found = torch.empty((*values.shape[:-1], -(-values.shape[-1] // WORD)), dtype=torch.int32, device="cpu")
    scale = torch.empty(shape, dtype=DTYPES[dtype].torch, device="cpu")
    zero = torch.empty((*shape[:-2], -(-shape[-2] // WORD), shape[-1]), dtype=torch.int32, device="cpu")
    for given, words, factor, zeros in zip(*map(matrices, (values, found, scale, zero)), strict=True):
        points = torch.empty(factor.shape, dtype=torch.float32, device="cpu")
        for rows, some in in_singles(given):
            here = slice(0, len(some))
            factor[rows], points[rows] = integers.spans(some.copy_(given[rows]), block, dtype, 4)
            quotients = plus(over(some, here, factor[rows].to(torch.float32), block), here, points[rows], block)
            words[rows] = packed((integers.nearest(quotients, 4) + OFFSET).to(torch.uint8))
        zeros.copy_(pack_zero(points))
    return found, scale, zero


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """i32 [n, k] -> u8 [n, 8 k]."""
    byte = packed.contiguous().view(torch.uint8)
    return torch.stack([byte & 15, byte >> 4], -1).flatten(1)


def packed(nibbles: torch.Tensor) -> torch.Tensor:
    """u8 [n, in] -> i32 [n, ⌈in / 8⌉]; nibbles behind the last number are 0."""
    nibbles = torch.nn.functional.pad(nibbles, (0, -nibbles.shape[1] % WORD))
    words = (nibbles[:, ::2] | (nibbles[:, 1::2] << 4)).flatten().view(torch.int32)  # strides of an axis of one may be anything
    return words.view(len(nibbles), nibbles.shape[1] // WORD)


def largest_codes(packed: torch.Tensor, columns: int, block: Block, zero: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [..., out, groups]: the largest magnitude of a code, less its zero point, in each group."""
    shape = (*packed.shape[:-1], columns)
    codes = decode(packed, torch.ones(shape_of(shape, block), dtype=torch.float32, device="cpu"), columns, block, torch.float32, zero)
    return torch.stack([torch.cat([largest(one[rows], block) for rows in runs(*one.shape)]) for one in matrices(codes)]).view(shape_of(shape, block))


def changed(packed: torch.Tensor, scale: torch.Tensor, columns: int, block: Block, dtype: str, divisor: float, zero: torch.Tensor | None = None) -> int:
    """How many groups have another scale, or other codes, after decoding and encoding them."""
    values = decode(packed, scale, columns, block, torch.float32, zero)
    again, scale_again = encode(values, block, dtype, divisor) if zero is None else encode_with_zero(values, block, dtype)[:2]
    count = 0
    for words, other, factor, factor_again in zip(*map(matrices, (packed, again, scale, scale_again)), strict=True):
        for rows in runs(len(words), columns):
            differ = _unpack(words[rows])[:, :columns] != _unpack(other[rows])[:, :columns]
            count += int(((largest(differ, block) > 0) | (factor[rows] != factor_again[rows])).sum())
    return count
