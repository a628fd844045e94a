"""Whole numbers of so many bits under a scale, with or without a zero point: which scale a group gets, and the one of numbers that lie on its grid already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import inf

import torch

from moeglot.dtypes import DTYPES
from moeglot.errors import BadNumbers
from moeglot.kernels.grid import INT4, INT8, Block, Grid, first_numbers, largest, possible, refuted, settle, tiled

LEAST = 2.0**-126
"""The smallest magnitude of a scale whose products are normal float32; float16 has none below it."""
KINDS = {4: INT4, 8: INT8}


def middle(bits: int) -> int:
    """Codes go from minus this to one less; what is stored in offset binary is so much more than its number."""
    return 1 << (bits - 1)


def nearest(quotients: torch.Tensor, bits: int) -> torch.Tensor:
    """float32, in place."""
    return quotients.round_().clamp_(-middle(bits), middle(bits) - 1)


@cache
def _grid(dtype: str, bits: int) -> Grid:
    """The most negative or the most positive code × scale is the largest number of every producer's group; others only where groups were cut."""
    torch_dtype, half = DTYPES[dtype].torch, middle(bits)
    return Grid(
        (half - 1, half, *range(half - 2, 0, -1)),
        lambda quotients: nearest(quotients, bits),
        lambda scale: scale.to(torch_dtype).float() == scale,
        ulps=1 if dtype == "F32" else 0,
        kind=KINDS[bits],
    )


@cache
def _wide_grid(dtype: str, bits: int) -> Grid:
    """With a zero point: codes less their zero go as far to both sides as there are codes. The fewest steps that fit are within that of any other."""
    torch_dtype, most = DTYPES[dtype].torch, 2 * middle(bits) - 1
    steps = tuple(range(1, most + 1))
    return Grid(steps, lambda q: q.round_().clamp_(-most, most), lambda scale: scale.to(torch_dtype).float() == scale, ulps=1 if dtype == "F32" else 0)


def scales(values: torch.Tensor, block: Block, dtype: str, bits: int, divisor: float) -> torch.Tensor:
    """values [rows, columns] -> the scale of each tile, its largest magnitude / `divisor`, in `dtype`. Raises `BadNumbers`."""
    amax = largest(values, block)
    scale = (amax / divisor).clamp_(min=LEAST).to(DTYPES[dtype].torch)
    if not bool(scale.isfinite().all()):
        raise _no_scale(amax, dtype, bits, divisor)
    empty = torch.finfo(scale.dtype).eps  # what compressed-tensors writes for a group of zeros, and what keeps a float16 scale from being one
    scale = torch.where((amax == 0) | (scale == 0), torch.tensor(empty, dtype=scale.dtype, device="cpu"), scale)
    settled = settle(values, scale.to(torch.float32), block, _grid(dtype, bits), LEAST, amax)
    return (_signed(values, settled, block, dtype, bits, amax) if block[0] == 1 else settled).to(scale.dtype)


def _signed(values: torch.Tensor, scale: torch.Tensor, block: Block, dtype: str, bits: int, amax: torch.Tensor) -> torch.Tensor:
    """The scale, negative in groups that lie on a grid under no other: their largest number is one of the lowest code, which has no opposite. AutoRound
    writes such.
    """
    grid = replace(_grid(dtype, bits), largest=(middle(bits),))
    numbers = torch.stack([*first_numbers(values, 1, block[1] or values.shape[1])]).neg_()
    rows = possible(amax, numbers, grid, LEAST).any(-1).nonzero().squeeze(1)
    if not len(rows):
        return scale
    some, mine = values[rows].to(torch.float32), scale[rows]
    wrong = refuted(some, mine, block, grid)[1] > -inf
    mirrored = settle(some.neg_(), mine, block, grid, LEAST, amax[rows])
    better = wrong & (refuted(some, mirrored, block, grid)[1] == -inf)
    return scale.index_copy(0, rows, torch.where(better, -mirrored, mine))


def spans(values: torch.Tensor, block: Block, dtype: str, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [rows, in] -> scale in `dtype` and zero point (float32, a code), both [rows, groups]: codes span the smallest to the largest number, and zero
    is among them.
    """
    half = middle(bits)
    low = torch.cat([part.amin(-1) for part, _ in tiled(values, block[1])], -1).clamp_(max=0)
    high = torch.cat([part.amax(-1) for part, _ in tiled(values, block[1])], -1).clamp_(min=0)
    spread = (high - low) / (2 * half - 1)
    scale = spread.clamp(min=LEAST).to(DTYPES[dtype].torch)
    if not bool(scale.isfinite().all()):
        raise _no_scale(high.abs().maximum(low.abs()), dtype, bits, 2 * half - 1)
    empty = (spread == 0) | (scale == 0)
    scale = torch.where(empty, torch.tensor(torch.finfo(scale.dtype).eps, dtype=scale.dtype, device="cpu"), scale)
    settled = settle(values, scale.to(torch.float32), block, _wide_grid(dtype, bits), LEAST)
    divisor = torch.where(settled == scale.to(torch.float32), torch.where(empty, 1.0, spread), settled)  # the quotient before the scale was rounded
    zero = torch.where(empty, 0.0, (-half - low / divisor).clamp_(-half, half - 1).round_())
    return settled.to(scale.dtype), zero


def _no_scale(largest: torch.Tensor, dtype: str, bits: int, divisor: float) -> BadNumbers:
    return BadNumbers(
        f"a weight of {largest.nan_to_num(nan=float('inf')).max().item():g} has no finite INT{bits} scale in {DTYPES[dtype].torch_name}",
        f"the scale of a group is its largest magnitude / {divisor:g}",
        "find where the source lost its numbers; moeglot verify PATH names the tensor",
    )


def infinite(bits: int) -> BadNumbers:
    return BadNumbers(
        f"an INT{bits} scale is NaN or infinite",
        "a value is code × scale, and zero times infinity is no number",
        "the file is damaged; compare its hash with its producer's",
    )


def problem(scale: torch.Tensor, most: int, largest_codes: Callable[[], torch.Tensor]) -> str | None:
    """What is wrong with the scales of codes of up to `most`; `largest_codes`: those under each, which are looked at where that matters."""
    if not bool(scale.isfinite().all()):
        return "has scales that are NaN or infinite"
    wide = scale.float().abs()  # AutoRound has negative ones
    small = wide < LEAST
    if bool((wide * most).isfinite().all()) and not bool(small.any()):
        return None
    codes = largest_codes()
    if bool((small & (codes > 0)).any()):
        return f"has scales of {scale[small & (codes > 0)][0].item():g} beside codes that are not zero, as in a file that was never filled"
    if not bool((wide * codes).isfinite().all()):
        return f"has scales of {scale[~(wide * codes).isfinite()][0].item():g}, under which codes are infinite"
    return None


def reciprocal(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale in its own type, and the largest number of that where it has none so large."""
    most = torch.finfo(scale.dtype).max
    return (1 / scale.to(torch.float32)).clamp(-most, most).to(scale.dtype)
