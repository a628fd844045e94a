"""INT4 in offset binary: eight nibbles to an int32, the lowest first, each 8 more than its number."""

from __future__ import annotations

from functools import cache

import torch

from moeglot.dtypes import DTYPES
from moeglot.errors import BadNumbers, TensorMismatch
from moeglot.kernels import backend
from moeglot.kernels.grid import INT4, Block, Grid, largest, matrices, over, runs, settle, shape_of, times

WORD = 8  # numbers in an int32
OFFSET = 8
LEAST = 2.0**-126
"""The smallest scale whose products are normal float32; float16 has none below it."""


@cache
def _pairs() -> torch.Tensor:
    """int64 [256]: the two float32 of each byte."""
    byte = torch.arange(256)
    return torch.stack([(byte & 15) - OFFSET, (byte >> 4) - OFFSET], -1).to(torch.float32).view(torch.int64).flatten()


def _nearest(quotients: torch.Tensor) -> torch.Tensor:
    return quotients.round_().clamp_(-OFFSET, OFFSET - 1)


@cache
def _grid(dtype: str) -> Grid:
    """-8 × scale or 7 × scale is the largest number of every producer's group; others only where groups were cut."""
    torch_dtype = DTYPES[dtype].torch
    return Grid((7, 8, 6, 5, 4, 3, 2, 1), _nearest, lambda scale: scale.to(torch_dtype).float() == scale, ulps=1 if dtype == "F32" else 0, kind=INT4)


def columns_of(shape: torch.Tensor) -> int:
    """`shape` [..., 2] holds [out, in] of each matrix -> in, which is one number."""
    columns = torch.unique(shape[..., 1]).tolist()
    if len(columns) != 1:
        raise TensorMismatch(f"the shapes beside packed numbers name {columns} columns", "matrices stored as one tensor have one size", "fetch the file again")
    return int(columns[0])


def decode(packed: torch.Tensor, scale: torch.Tensor, columns: int, block: Block, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """packed i32 [..., out, ⌈in / 8⌉], scale [..., out, in / group] -> [..., out, in], code × scale in float32."""
    shape = (*packed.shape[:-1], columns)
    if tuple(scale.shape) != shape_of(shape, block) or packed.shape[-1] != -(-columns // WORD):
        raise TensorMismatch(
            f"packed numbers {list(packed.shape)} and scales {list(scale.shape)} are not those of a matrix with {columns} columns",
            f"eight numbers are packed in an int32, and {block[1] or 'all'} of a row share a scale",
            "check group_size in config.json",
        )
    values = backend.place(shape, dtype, packed.device, out)
    fast = backend.compiled("int4", packed, values) if dtype in (torch.bfloat16, torch.float32) else None
    for words, factor, to in zip(matrices(packed), matrices(scale), backend.places(values), strict=True):
        if fast:
            fast.decode(words, factor.to(torch.float32), block[1] or columns, to)
            continue
        for rows in runs(*to.shape):
            to[rows] = times(_unpack(words[rows])[:, :columns], rows, factor.to(torch.float32), block)
    return values


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """i32 [n, k] -> float32 [n, 8 k]."""
    index = packed.contiguous().view(torch.uint8).int()
    return torch.index_select(_pairs(), 0, index.view(-1)).view(torch.float32).view(len(packed), -1)


def encode(values: torch.Tensor, block: Block, dtype: str, divisor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """values [..., out, in] of a float type -> packed i32 [..., out, ⌈in / 8⌉], scale [..., out, in / group] in `dtype`. Zero has no sign."""
    packed = torch.empty((*values.shape[:-1], -(-values.shape[-1] // WORD)), dtype=torch.int32)
    scale = torch.empty(shape_of(tuple(values.shape), block), dtype=DTYPES[dtype].torch)
    fast = backend.compiled("int4", values)
    for given, words, factor in zip(matrices(values), matrices(packed), matrices(scale), strict=True):
        for rows in runs(*given.shape):
            factor[rows] = _scales(given[rows], block, dtype, divisor)
            if fast:
                fast.encode(backend.in_half_or_single(given[rows]), factor[rows].to(torch.float32), block[1] or given.shape[1], words[rows])
                continue
            quotients = over(given[rows].to(torch.float32, copy=True), slice(0, rows.stop - rows.start), factor[rows].to(torch.float32), block)
            words[rows] = _pack(_nearest(quotients))
    return packed, scale


def _scales(values: torch.Tensor, block: Block, dtype: str, divisor: float) -> torch.Tensor:
    amax = largest(values, block)
    scale = (amax / divisor).clamp_(min=LEAST).to(DTYPES[dtype].torch)
    if not bool(scale.isfinite().all()):
        raise BadNumbers(
            f"a weight of {amax.nan_to_num(nan=float('inf')).max().item():g} has no finite INT4 scale in {DTYPES[dtype].torch_name}",
            f"the scale of a group is its largest magnitude / {divisor:g}",
            "find where the source lost its numbers; moeglot verify PATH names the tensor",
        )
    empty = torch.finfo(scale.dtype).eps  # what compressed-tensors writes for a group of zeros, and what keeps a float16 scale from being one
    scale = torch.where((amax == 0) | (scale == 0), torch.tensor(empty, dtype=scale.dtype), scale)
    return settle(values, scale.to(torch.float32), block, _grid(dtype), LEAST).to(scale.dtype)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """float32 [n, in] from -8 to 7 -> i32 [n, ⌈in / 8⌉]; nibbles behind the last number are 0."""
    nibbles = (codes + OFFSET).to(torch.uint8)
    nibbles = torch.nn.functional.pad(nibbles, (0, -codes.shape[1] % WORD))
    return (nibbles[:, ::2] | (nibbles[:, 1::2] << 4)).contiguous().view(torch.int32)


def largest_codes(packed: torch.Tensor, columns: int, block: Block) -> torch.Tensor:
    """float32 [..., out, groups]: the largest magnitude of a code in each group."""
    found = [torch.cat([largest(_unpack(words[rows])[:, :columns], block) for rows in runs(len(words), columns)]) for words in matrices(packed)]
    return torch.stack(found).view(shape_of((*packed.shape[:-1], columns), block))


def changed(packed: torch.Tensor, scale: torch.Tensor, columns: int, block: Block, dtype: str, divisor: float) -> int:
    """How many groups have another scale, or other codes, after decoding and encoding them."""
    again, scale_again = encode(decode(packed, scale, columns, block, torch.float32), block, dtype, divisor)
    count = 0
    for words, other, factor, factor_again in zip(*map(matrices, (packed, again, scale, scale_again)), strict=True):
        for rows in runs(len(words), columns):
            differ = _unpack(words[rows])[:, :columns] != _unpack(other[rows])[:, :columns]
            count += int(((largest(differ, block) > 0) | (factor[rows] != factor_again[rows])).sum())
    return count
