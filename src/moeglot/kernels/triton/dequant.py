"""MXFP4 and FP8 matrices as dense numbers on a GPU, rows as they are stored or turned: a tile is decoded in registers and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moeglot.kernels.backend import places
from moeglot.kernels.triton.codes import e4m3, eight, power_of, rounded_bits
from moeglot.kernels.triton.launch import beside, check, jit

ROWS = 32
"""Of a tile: as many as a turned row has numbers in a sector of memory, twice."""
WORDS = 32
"""Of a tile's row, each eight codes of MXFP4."""
COLUMNS = 128
"""Of a tile's row of FP8."""


def mxfp4(packed: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """packed u8 [..., rows, n, 16], scale u8 [..., rows, n] -> out [..., rows, 32 n], bfloat16, float16 or float32 of any strides, which is returned.

    Exact in bfloat16 and float32. A scale of 255 gives NaN, and a number that is too large gives infinity: nothing waits for the device to refuse them.
    """
    check(out.device)
    to, codes = _matrices(out), packed.contiguous().view(torch.int32)
    matrices, rows, columns = to.shape
    grid = (matrices * triton.cdiv(rows, ROWS) * triton.cdiv(columns // 8, WORDS),)
    if to.numel():
        with beside(out):
            _mxfp4[grid](
                codes, scale.contiguous(), to, rows, columns // 32, *to.stride(), HALF=out.dtype == torch.bfloat16, ROWS=ROWS, WORDS=WORDS, num_warps=4
            )
    return out


def fp8(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], out: torch.Tensor) -> torch.Tensor:
    """weight F8_E4M3 [..., rows, columns], scale float32 [..., tiles, tiles] -> out, as in `mxfp4`; code × scale in float32, rounded once.

    `block`: numbers that share a scale, 0 for a whole axis. Codes of NaN stay NaN.
    """
    check(out.device)
    to, codes = _matrices(out), weight.contiguous().view(torch.uint8)
    matrices, rows, columns = to.shape
    grid = (matrices * triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS),)
    if to.numel():
        with beside(out):
            _fp8[grid](
                codes,
                scale.contiguous(),
                to,
                rows,
                columns,
                *to.stride(),
                HEIGHT=block[0],
                WIDTH=block[1],
                HALF=out.dtype == torch.bfloat16,
                ROWS=ROWS,
                COLUMNS=COLUMNS,
                num_warps=4,
            )
    return out


def _matrices(out: torch.Tensor) -> torch.Tensor:
    """As a view [matrices, rows, columns]; bfloat16 as its bits."""
    whole = places(out)
    return whole.view(torch.int16) if out.dtype == torch.bfloat16 else whole


@jit
def _as_stored(values: tl.tensor, like: tl.tensor, HALF: tl.constexpr) -> tl.tensor:
    return rounded_bits(values) if HALF else values.to(like.dtype.element_ty)


@jit
def _mxfp4(
    words: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    rows: int,
    groups: int,
    out_matrix: int,
    out_row: int,
    out_column: int,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    pid = tl.program_id(0)
    width = groups * 4
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(width, WORDS)
    matrix = (pid // (down * across)).to(tl.int64)
    r = pid // across % down * ROWS + tl.arange(0, ROWS)
    w = pid % across * WORDS + tl.arange(0, WORDS)
    here = (r[:, None] < rows) & (w[None, :] < width)
    line = matrix * rows + r
    word = tl.load(words + line[:, None] * width + w[None, :], mask=here, other=0)
    scale = tl.load(scales + line[:, None] * groups + w[None, :] // 4, mask=here, other=0)
    values = eight(word, tl.full([1, 1], 2.0**126, tl.float32), power_of(scale))
    c = pid % across * WORDS * 8 + tl.arange(0, WORDS * 8)
    place = out + matrix * out_matrix + r[:, None] * out_row + c[None, :] * out_column
    tl.store(place, _as_stored(values, out, HALF), mask=(r[:, None] < rows) & (c[None, :] < width * 8))


@jit
def _fp8(
    codes: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    rows: int,
    columns: int,
    out_matrix: int,
    out_row: int,
    out_column: int,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    pid = tl.program_id(0)
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    matrix = (pid // (down * across)).to(tl.int64)
    r = pid // across % down * ROWS + tl.arange(0, ROWS)
    c = pid % across * COLUMNS + tl.arange(0, COLUMNS)
    here = (r[:, None] < rows) & (c[None, :] < columns)
    code = tl.load(codes + (matrix * rows + r)[:, None] * columns + c[None, :], mask=here, other=0).to(tl.int32)
    tile_row = r // HEIGHT if HEIGHT else r * 0
    tile_column = c // WIDTH if WIDTH else c * 0
    high, wide = tl.cdiv(rows, HEIGHT) if HEIGHT else 1, tl.cdiv(columns, WIDTH) if WIDTH else 1
    scale = tl.load(scales + (matrix * high + tile_row)[:, None] * wide + tile_column[None, :], mask=here, other=0.0)
    values, _ = e4m3(code, tl.float32, 0)
    values = values * scale
    nan = (0x7FC00000 | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)
    values = tl.where((code & 0x7F) == 0x7F, nan, values)
    place = out + matrix * out_matrix + r[:, None] * out_row + c[None, :] * out_column
    tl.store(place, _as_stored(values, out, HALF), mask=here)
