"""INT8: whole numbers of a byte each, in two's complement, or four to an int32 as 128 more than they are; times a scale, less a zero point before that."""

from __future__ import annotations

from functools import cache

import torch

from moeglot.dtypes import DTYPES
from moeglot.errors import TensorMismatch
from moeglot.kernels import backend, integers
from moeglot.kernels.grid import Block, in_singles, largest, matrices, over, plus, shape_of, slabs, times
from moeglot.kernels.lattice import Levels

WORD = 4  # numbers in an int32
FLIP = 0x80
"""Two's complement and offset binary differ in this bit alone."""
WIDEST = 255
"""The largest magnitude of a code less its zero point."""
DIVISOR = 127.5
"""The scale of a group is its largest magnitude over this, half of -128…127, as compressed-tensors has it."""
AT_ONCE = 1 << 24  # numbers whose scales are found together; scratch is far less


@cache
def levels() -> Levels:
    """The 256 bytes in two's complement."""

    def rounded(quotients: torch.Tensor) -> torch.Tensor:
        return integers.nearest(quotients.clone(), 8).to(torch.int8).view(torch.uint8)

    return Levels(torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.int8).to(torch.float32), rounded)


def of_words(packed: torch.Tensor, numbers: int) -> torch.Tensor:
    """i32 [..., n], the lowest byte first -> i8 [..., numbers]."""
    stored = packed.contiguous().flatten().view(torch.uint8).view(*packed.shape[:-1], packed.shape[-1] * WORD)  # strides of an axis of one may be anything
    return (stored[..., :numbers] ^ FLIP).view(torch.int8)


def words(numbers: torch.Tensor) -> torch.Tensor:
    """i8 [..., in] -> i32 [..., ⌈in / 4⌉]; bytes behind the last number are 0."""
    stored = torch.nn.functional.pad(numbers.contiguous().view(torch.uint8) ^ FLIP, (0, -numbers.shape[-1] % WORD))
    return stored.flatten().view(torch.int32).view(*stored.shape[:-1], stored.shape[-1] // WORD)


def decode(
    numbers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, block: Block, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """i8 [..., out, in], scale and i8 zero [..., tiles, tiles] -> [..., out, in], (code - zero) × scale in float32. Raises `TensorMismatch`, `BadNumbers`."""
    expected = shape_of(tuple(numbers.shape), block)
    if tuple(scale.shape) != expected or (zero is not None and tuple(zero.shape) != expected):
        raise TensorMismatch(
            f"scales of shape {list(scale.shape)} do not belong to INT8 numbers of shape {list(numbers.shape)}",
            f"{block[0] or 'all'} × {block[1] or 'all'} numbers share one, so that there are {list(expected)}",
            "check strategy and group_size in config.json",
        )
    if not bool(scale.isfinite().all()):
        raise integers.infinite(8)
    values = backend.place(tuple(numbers.shape), dtype, numbers.device, out)
    zeros = None if zero is None else -matrices(zero).to(torch.float32)
    for n, (codes, factor, to) in enumerate(zip(matrices(numbers), matrices(scale), backend.places(values), strict=True)):
        factor = factor.to(torch.float32)
        for rows, some in in_singles(codes):
            some.copy_(codes[rows])
            to[rows] = times(some if zeros is None else plus(some, rows, zeros[n], block), rows, factor, block)
    return values


def encode(values: torch.Tensor, block: Block, dtype: str, symmetric: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """values [..., out, in] of a float type -> i8 [..., out, in], scale in `dtype` and, unless `symmetric`, i8 zero [..., tiles, tiles]. Zero has no sign.

    With zero points, tiles are of one row.
    """
    assert symmetric or block[0] == 1
    shape = shape_of(tuple(values.shape), block)
    numbers = torch.empty(values.shape, dtype=torch.int8, device="cpu")
    scale = torch.empty(shape, dtype=DTYPES[dtype].torch, device="cpu")
    zero = None if symmetric else torch.empty(shape, dtype=torch.int8, device="cpu")
    for n, (given, codes, factor) in enumerate(zip(*map(matrices, (values, numbers, scale)), strict=True)):
        for slab, tiles in slabs(given, block, AT_ONCE):
            mine = given[slab]
            if symmetric:
                factor[tiles] = integers.scales(mine, block, dtype, 8, DIVISOR)
            for rows, some in in_singles(mine):
                some.copy_(mine[rows])
                if zero is None:
                    quotients = over(some, rows, factor[tiles].to(torch.float32), block)
                else:
                    here = slice(slab.start + rows.start, slab.start + rows.stop)
                    factor[here], points = integers.spans(some, block, dtype, 8)
                    matrices(zero)[n][here] = points
                    quotients = plus(over(some, within := slice(0, len(some)), factor[here].to(torch.float32), block), within, points, block)
                codes[slab][rows] = integers.nearest(quotients, 8)
    return numbers, scale, zero


def largest_codes(numbers: torch.Tensor, zero: torch.Tensor | None, block: Block) -> torch.Tensor:
    """float32 [..., tiles, tiles]: the largest magnitude of a code, less its zero point, in each block."""
    shape = shape_of(tuple(numbers.shape), block)
    codes = decode(numbers, torch.ones(shape, dtype=torch.float32, device="cpu"), zero, block, torch.float32)
    return torch.stack([largest(one, block) for one in matrices(codes)]).view(shape)


def changed(numbers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, block: Block, dtype: str, symmetric: bool) -> int:
    """How many blocks have another scale, or other codes, after decoding and encoding them."""
    count, zeros = 0, None if zero is None else matrices(zero)
    for n, (codes, factor) in enumerate(zip(matrices(numbers), matrices(scale), strict=True)):
        for rows, tiles in slabs(codes, block, 1 << 19):
            mine = None if zeros is None else zeros[n][tiles]
            again, factor_again, _ = encode(decode(codes[rows], factor[tiles], mine, block, torch.float32), block, dtype, symmetric)
            count += int(((largest(codes[rows] != again, block) > 0) | (factor[tiles] != factor_again)).sum())
    return count
