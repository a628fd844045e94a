"""Products of groups of rows with a matrix each, which is decoded tile by tile on the way to the tensor cores: one kernel, forward and backward.

Which expert a tile of rows belongs to is found inside the kernel from the routing's ends, so that the host never waits. Rows are gathered where they are read
and scattered where they are written; the bias, an adapter's change and the routing weight are added to a tile that is still in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moeglot.kernels.triton.codes import decoded, scales_of
from moeglot.kernels.triton.launch import beside, check, check_dtype, jit
from moeglot.kernels.triton.tiles import Tiles, tiles_for

PLAIN, MXFP4, FP8 = "plain", "mxfp4", "fp8"
TOGETHER = 8
"""Tiles of rows whose programs follow each other, for all parts of their matrices."""
RANK_AT_ONCE = 64
"""Of an adapter's rank: more of it beside a tile takes more shared memory than there is, and more registers."""


@dataclass(frozen=True, eq=False)
class Matrices:
    """One stored matrix [rows, columns] an expert, in its codes. `shape`: (experts, rows, columns).

    plain   codes [e, rows, columns] of any strides, in the type that is computed in
    mxfp4   codes u8 [e, rows, columns / 32, 16], scale u8 [e, rows, columns / 32], all at most 128
    fp8     codes F8_E4M3 [e, rows, columns], columns a multiple of 4, scale float32 [e, ⌈rows / block⌉, ⌈columns / block⌉]
    """

    kind: str
    codes: torch.Tensor
    scale: torch.Tensor | None
    shape: tuple[int, int, int]
    block: tuple[int, int] = (1, 1)


@dataclass(frozen=True, eq=False)
class Rows:
    """Which rows belong to which expert: `starts` and `ends` int32 [e] of each run, without gaps; rows after the last are nobody's.

    `order` int64 [n]: the slot (token × rank) of each row.
    """

    starts: torch.Tensor
    ends: torch.Tensor
    order: torch.Tensor
    ranks: int

    @classmethod
    def of(cls, ends: torch.Tensor, order: torch.Tensor, ranks: int) -> Rows:
        return cls(torch.nn.functional.pad(ends[:-1], (1, 0)), ends, order, ranks)

    def some(self, experts: range) -> Rows:
        """Of experts that follow each other; the rows keep their places."""
        return Rows(self.starts[experts.start : experts.stop], self.ends[experts.start : experts.stop], self.order, self.ranks)

    def tiles(self, height: int) -> int:
        """The most tiles of so many rows that the runs can have, that of nobody's rows too, whatever the routing."""
        return min(len(self.order), len(self.ends) + 1) + len(self.order) // height


@dataclass(frozen=True, eq=False)
class Change:
    """What is added to each row: low [n, r] times side [e, r, out]ᵀ of its expert; `side` of any strides, both in the type that is computed in."""

    low: torch.Tensor
    side: torch.Tensor


def product(
    x: torch.Tensor,
    matrices: Matrices,
    rows: Rows,
    along: bool,
    *,
    gather: bool = False,
    scatter: bool = False,
    bias: torch.Tensor | None = None,
    change: Change | None = None,
    weights: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """x [n, in] times each row's matrix -> [n, out] in the type of x; sums are float32.

    `along`: the sum runs along the stored matrix's columns (x Mᵀ), else along its rows (x M). `gather`: row m reads the token of slot `order[m]`, so that
    x is [t, in]. `scatter`: row m is written to place `order[m]`. `bias` [e, out]; `weights` [t k]: each row is multiplied by that of its slot, at last.
    Unassigned rows are zero, or stay what they are in `out` [n, out], if it is given. Raises `UsageError` where the kernels cannot run.
    """
    check(x.device)
    check_dtype(x.dtype)
    experts, height, width = matrices.shape
    inner, outer = (width, height) if along else (height, width)
    shape = tiles or tiles_for(x.device, len(rows.order) / experts, matrices.kind, x.dtype)
    found = x.new_empty(len(rows.order), outer) if out is None else out
    codes = matrices.codes if matrices.kind == PLAIN else matrices.codes.contiguous().view(torch.int32)
    strides = codes.stride() if matrices.kind == PLAIN else (0, 0, 0)
    side = change.side if change else None
    grid = (rows.tiles(shape.rows) * triton.cdiv(outer, shape.outer),)
    if not len(rows.order):
        return found
    with beside(x):
        _product[grid](
            x if x.stride(-1) == 1 else x.contiguous(),
            codes,
            _gapless(matrices.scale),
            rows.starts,
            rows.ends,
            rows.order,
            _gapless(bias),
            _gapless(change.low) if change else None,
            side,
            _gapless(weights),
            found,
            rows.tiles(shape.rows),
            experts,
            len(rows.order) if out is None else 0,
            x.stride(0) if x.stride(-1) == 1 else inner,
            *strides,
            *(side.stride() if side is not None else (0, 0, 0)),
            RANKS=rows.ranks,
            EXPERTS=triton.next_power_of_2(experts),
            HEIGHT=height,
            WIDTH=width,
            BLOCK_HEIGHT=matrices.block[0],
            BLOCK_WIDTH=matrices.block[1],
            KIND=matrices.kind,
            ALONG=along,
            GATHER=gather,
            SCATTER=scatter,
            RANK=side.shape[1] if side is not None else 0,
            LOW=ranks_at_once(side.shape[1]) if side is not None else 16,
            M=shape.rows,
            N=shape.outer,
            K=shape.inner,
            TOGETHER=TOGETHER,
            COMPUTE=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float32,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
    return found


def ranks_at_once(rank: int) -> int:
    """How much of a rank is multiplied at a time: a power of two."""
    return min(RANK_AT_ONCE, max(16, int(triton.next_power_of_2(rank))))


def _gapless(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """For the kernel, which is told no strides of it: a view, as of one column of routing weights, may have gaps."""
    return None if tensor is None else tensor.contiguous()


@jit
def _run(starts: tl.tensor, ends: tl.tensor, experts: int, rows: int, tile: int, M: tl.constexpr, EXPERTS: tl.constexpr) -> tl.tensor:
    """The expert of a tile of rows, its first row, and where the expert's rows end; expert = `experts` for nobody's rows, which end at `rows`."""
    each = tl.arange(0, EXPERTS)
    end = tl.load(ends + each, mask=each < experts, other=0)
    begin = tl.load(starts + each, mask=each < experts, other=0)
    tiles = tl.where(each < experts, (end - begin + M - 1) // M, 0)
    after = tl.cumsum(tiles, 0)
    expert = tl.sum(((after <= tile) & (each < experts)).to(tl.int32), 0)
    if expert >= experts:
        first, last = tl.max(end, 0) + (tile - tl.sum(tiles, 0)) * M, rows
    else:
        mine = each == expert
        first, last = tl.sum(tl.where(mine, begin + (tile - after + tiles) * M, 0), 0), tl.sum(tl.where(mine, end, 0), 0)
    return expert, first, last


@jit
def _product(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    starts: tl.tensor,
    ends: tl.tensor,
    order: tl.tensor,
    bias: tl.tensor,
    low: tl.tensor,
    side: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    tiles: int,
    experts: int,
    rows: int,
    x_row: int,
    codes_expert: int,
    codes_row: int,
    codes_column: int,
    side_expert: int,
    side_rank: int,
    side_out: int,
    RANKS: tl.constexpr,
    EXPERTS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_HEIGHT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    ALONG: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    RANK: tl.constexpr,
    LOW: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TOGETHER: tl.constexpr,
    COMPUTE: tl.constexpr,
) -> None:
    """Rows of one expert times N of its matrix' columns. Programs that run at the same time take TOGETHER tiles of rows and all parts of their matrices, so
    that both come from the cache."""
    pid = tl.program_id(0)
    across: tl.constexpr = ((HEIGHT if ALONG else WIDTH) + N - 1) // N
    group = pid // (TOGETHER * across)
    several = min(tiles - group * TOGETHER, TOGETHER)
    within = pid - group * (TOGETHER * across)
    expert, first, end = _run(starts, ends, experts, rows, group * TOGETHER + within % several, M, EXPERTS)
    OUT: tl.constexpr = HEIGHT if ALONG else WIDTH
    INNER: tl.constexpr = WIDTH if ALONG else HEIGHT
    n0 = within // several * N
    n = n0 + tl.arange(0, N)
    if expert >= experts:
        for nobody in range(first, min(first + M, end)):
            to = tl.load(order + nobody) if SCATTER else tl.cast(nobody, tl.int64)
            tl.store(out + to * OUT + n, tl.zeros([N], COMPUTE), mask=n < OUT)
        return
    m = first + tl.arange(0, M)
    mine = m < end
    slot = tl.load(order + m, mask=mine, other=0)
    row = (slot // RANKS if GATHER else m).to(tl.int64)
    matrix = expert.to(tl.int64)
    if KIND == "mxfp4":
        codes += matrix * (HEIGHT * (WIDTH // 32 * 4))
        scales += matrix * (HEIGHT * (WIDTH // 32))
    elif KIND == "fp8":
        codes += matrix * (HEIGHT * (WIDTH // 4))
        scales += matrix * (tl.cdiv(HEIGHT, BLOCK_HEIGHT) * tl.cdiv(WIDTH, BLOCK_WIDTH))
    else:
        codes += matrix * codes_expert
    total = tl.zeros([N, M], tl.float32)
    ahead = None
    if KIND == "mxfp4":
        ahead = scales_of(scales, n, 0, HEIGHT, WIDTH, K) if ALONG else scales_of(scales, tl.arange(0, K), n0, HEIGHT, WIDTH, N)
    for k0 in range(0, INNER, K):
        scale = ahead
        if KIND == "mxfp4":
            ahead = scales_of(scales, n, k0 + K, HEIGHT, WIDTH, K) if ALONG else scales_of(scales, k0 + K + tl.arange(0, K), n0, HEIGHT, WIDTH, N)
        k = k0 + tl.arange(0, K)
        near = mine[:, None] if INNER % K == 0 else mine[:, None] & (k[None, :] < INNER)
        some = tl.load(x + row[:, None] * x_row + k[None, :], mask=near, other=0.0)
        if ALONG:
            tile = decoded(codes, scale, n, k0, codes_row, codes_column, HEIGHT, WIDTH, N, K, KIND, COMPUTE)
        else:
            tile = tl.trans(decoded(codes, scale, k, n0, codes_row, codes_column, HEIGHT, WIDTH, K, N, KIND, COMPUTE))
        if KIND == "fp8":
            r0, c0 = n0 if ALONG else k0, k0 if ALONG else n0
            block = tl.load(scales + r0 // BLOCK_HEIGHT * tl.cdiv(WIDTH, BLOCK_WIDTH) + c0 // BLOCK_WIDTH)
            total += tl.dot(tile, tl.trans(some), input_precision="ieee") * block
        else:
            total = tl.dot(tile, tl.trans(some), total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + matrix * OUT + n, mask=n < OUT, other=0.0).to(tl.float32)[:, None]
    if RANK > 0:
        for j0 in tl.range(0, RANK, LOW, num_stages=1):
            j = j0 + tl.arange(0, LOW)
            narrow = tl.load(low + m.to(tl.int64)[:, None] * RANK + j[None, :], mask=mine[:, None] & (j[None, :] < RANK), other=0.0)
            at = side + matrix * side_expert + n[:, None] * side_out + j[None, :] * side_rank
            total = tl.dot(tl.load(at, mask=(n[:, None] < OUT) & (j[None, :] < RANK), other=0.0), tl.trans(narrow), total, input_precision="ieee")
    if weights is not None:
        total *= tl.load(weights + slot, mask=mine, other=0.0).to(tl.float32)[None, :]
    place = out + (slot if SCATTER else m).to(tl.int64)[None, :] * OUT + n[:, None]
    tl.store(place, total.to(COMPUTE), mask=(n[:, None] < OUT) & mine[None, :])
