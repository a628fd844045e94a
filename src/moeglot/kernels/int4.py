"""INT4 in offset binary: eight nibbles to an int32, the lowest first, each 8 more than its number, or than its number and a zero point."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import inf

import torch

from moeglot.dtypes import DTYPES
from moeglot.errors import BadNumbers, TensorMismatch
from moeglot.kernels import backend
from moeglot.kernels.grid import (
    INT4,
    Block,
    Grid,
    first_numbers,
    in_singles,
    largest,
    matrices,
    over,
    plus,
    possible,
    refuted,
    runs,
    settle,
    shape_of,
    tiled,
    times,
)
from moeglot.kernels.lattice import Levels

WORD = 8  # numbers in an int32
OFFSET = 8
WIDEST = 15
"""The largest magnitude of a code less its zero point."""
LEAST = 2.0**-126
"""The smallest magnitude of a scale whose products are normal float32; float16 has none below it."""


@cache
def _pairs(device: torch.device) -> torch.Tensor:
    """int64 [256]: the two float32 of each byte."""
    byte = torch.arange(256, device=device, dtype=torch.int64)
    return torch.stack([(byte & 15) - OFFSET, (byte >> 4) - OFFSET], -1).to(torch.float32).view(torch.int64).flatten()


def _nearest(quotients: torch.Tensor) -> torch.Tensor:
    return quotients.round_().clamp_(-OFFSET, OFFSET - 1)


@cache
def _grid(dtype: str) -> Grid:
    """-8 × scale or 7 × scale is the largest number of every producer's group; others only where groups were cut."""
    torch_dtype = DTYPES[dtype].torch
    return Grid((7, 8, 6, 5, 4, 3, 2, 1), _nearest, lambda scale: scale.to(torch_dtype).float() == scale, ulps=1 if dtype == "F32" else 0, kind=INT4)


@cache
def levels() -> Levels:
    """The sixteen nibbles: 0 is -8."""

    def rounded(quotients: torch.Tensor) -> torch.Tensor:
        return (quotients.round().clamp(-OFFSET, OFFSET - 1) + OFFSET).to(torch.uint8)

    return Levels(torch.arange(-OFFSET, OFFSET, dtype=torch.float32, device="cpu"), rounded)


@cache
def _wide_grid(dtype: str) -> Grid:
    """With a zero point: codes less their zero go from -15 to 15, over a range of 15. The fewest steps that fit are within that of any other."""
    torch_dtype, most = DTYPES[dtype].torch, 2 * OFFSET - 1
    steps = tuple(range(1, most + 1))
    return Grid(steps, lambda q: q.round_().clamp_(-most, most), lambda scale: scale.to(torch_dtype).float() == scale, ulps=1 if dtype == "F32" else 0)


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
        raise BadNumbers(
            "an INT4 scale is NaN or infinite",
            "a value is code × scale, and zero times infinity is no number",
            "the file is damaged; compare its hash with its producer's",
        )
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


def reciprocal(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale in its own type, and the largest number of that where it has none so large."""
    most = torch.finfo(scale.dtype).max
    return (1 / scale.to(torch.float32)).clamp(-most, most).to(scale.dtype)


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
            factor[rows] = _scales(given[rows], block, dtype, divisor)
            if fast:
                fast.encode(backend.in_half_or_single(given[rows]), factor[rows].to(torch.float32), block[1] or given.shape[1], words[rows])
                continue
            quotients = over(some.copy_(given[rows]), slice(0, len(some)), factor[rows].to(torch.float32), block)
            words[rows] = packed((_nearest(quotients) + OFFSET).to(torch.uint8))
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
            factor[rows], points[rows] = _spans(some.copy_(given[rows]), block, dtype)
            quotients = plus(over(some, here, factor[rows].to(torch.float32), block), here, points[rows], block)
            words[rows] = packed((_nearest(quotients) + OFFSET).to(torch.uint8))
        zeros.copy_(pack_zero(points))
    return found, scale, zero


def _spans(values: torch.Tensor, block: Block, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [rows, in] -> scale in `dtype` and zero point (float32, -8 to 7), both [rows, groups]."""
    low = torch.cat([part.amin(-1) for part, _ in tiled(values, block[1])], -1).clamp_(max=0)
    high = torch.cat([part.amax(-1) for part, _ in tiled(values, block[1])], -1).clamp_(min=0)
    spread = (high - low) / (2 * OFFSET - 1)
    scale = spread.clamp(min=LEAST).to(DTYPES[dtype].torch)
    if not bool(scale.isfinite().all()):
        raise _no_scale(high.abs().maximum(low.abs()), dtype, 2 * OFFSET - 1)
    empty = (spread == 0) | (scale == 0)
    scale = torch.where(empty, torch.tensor(torch.finfo(scale.dtype).eps, dtype=scale.dtype, device="cpu"), scale)
    settled = settle(values, scale.to(torch.float32), block, _wide_grid(dtype), LEAST)
    divisor = torch.where(settled == scale.to(torch.float32), torch.where(empty, 1.0, spread), settled)  # the quotient before the scale was rounded
    zero = torch.where(empty, 0.0, (-OFFSET - low / divisor).clamp_(-OFFSET, OFFSET - 1).round_())
    return settled.to(scale.dtype), zero


def _no_scale(largest: torch.Tensor, dtype: str, divisor: float) -> BadNumbers:
    return BadNumbers(
        f"a weight of {largest.nan_to_num(nan=float('inf')).max().item():g} has no finite INT4 scale in {DTYPES[dtype].torch_name}",
        f"the scale of a group is its largest magnitude / {divisor:g}",
        "find where the source lost its numbers; moeglot verify PATH names the tensor",
    )


def _scales(values: torch.Tensor, block: Block, dtype: str, divisor: float) -> torch.Tensor:
    amax = largest(values, block)
    scale = (amax / divisor).clamp_(min=LEAST).to(DTYPES[dtype].torch)
    if not bool(scale.isfinite().all()):
        raise _no_scale(amax, dtype, divisor)
    empty = torch.finfo(scale.dtype).eps  # what compressed-tensors writes for a group of zeros, and what keeps a float16 scale from being one
    scale = torch.where((amax == 0) | (scale == 0), torch.tensor(empty, dtype=scale.dtype, device="cpu"), scale)
    settled = settle(values, scale.to(torch.float32), block, _grid(dtype), LEAST, amax)
    return _signed(values, settled, block, dtype, amax).to(scale.dtype)


def _signed(values: torch.Tensor, scale: torch.Tensor, block: Block, dtype: str, amax: torch.Tensor) -> torch.Tensor:
    """The scale, negative in groups that lie on a grid under no other: their largest number is one of code -8, which has no opposite. AutoRound writes such."""
    grid = replace(_grid(dtype), largest=(OFFSET,))
    numbers = torch.stack([*first_numbers(values, 1, block[1] or values.shape[1])]).neg_()
    rows = possible(amax, numbers, grid, LEAST).any(-1).nonzero().squeeze(1)
    if not len(rows):
        return scale
    some, mine = values[rows].to(torch.float32), scale[rows]
    wrong = refuted(some, mine, block, grid)[1] > -inf
    mirrored = settle(some.neg_(), mine, block, grid, LEAST, amax[rows])
    better = wrong & (refuted(some, mirrored, block, grid)[1] == -inf)
    return scale.index_copy(0, rows, torch.where(better, -mirrored, mine))


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
