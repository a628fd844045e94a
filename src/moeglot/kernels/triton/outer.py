"""For each expert, the sum over its rows of the products of two vectors: the gradients of an adapter's factors, without waiting for the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moeglot.kernels.triton.gemm import Rows, ranks_at_once
from moeglot.kernels.triton.launch import beside, check, check_dtype, jit


def outer(narrow: torch.Tensor, wide: torch.Tensor, rows: Rows, gather: bool = False) -> torch.Tensor:
    """narrow [n, r], wide [n, c] of one type -> float32 [e, r, c]: for each run of rows, narrowᵀ wide. `gather`: wide is [t, c], as in `product`."""
    check(narrow.device)
    check_dtype(narrow.dtype)
    narrow, wide = narrow.contiguous(), wide.contiguous()
    rank, columns, experts = narrow.shape[1], wide.shape[1], len(rows.ends)
    out = torch.empty(experts, rank, columns, device=narrow.device, dtype=torch.float32)
    width = 32 if narrow.device.type == "cpu" else 128
    some = ranks_at_once(rank)
    grid = (experts, triton.cdiv(columns, width), triton.cdiv(rank, some))
    with beside(narrow):
        _outer[grid](
            narrow,
            wide,
            rows.starts,
            rows.ends,
            rows.order,
            out,
            RANKS=rows.ranks,
            GATHER=gather,
            RANK=rank,
            COLUMNS=columns,
            R=some,
            C=width,
            M=32,
            num_warps=4,
        )
    return out


@jit
def _outer(
    narrow: tl.tensor,
    wide: tl.tensor,
    starts: tl.tensor,
    ends: tl.tensor,
    order: tl.tensor,
    out: tl.tensor,
    RANKS: tl.constexpr,
    GATHER: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
) -> None:
    expert = tl.program_id(0)
    r, c = tl.program_id(2) * R + tl.arange(0, R), tl.program_id(1) * C + tl.arange(0, C)
    total = tl.zeros([R, C], tl.float32)
    end = tl.load(ends + expert)
    for m0 in range(tl.load(starts + expert), end, M):
        m = m0 + tl.arange(0, M)
        row = (tl.load(order + m, mask=m < end, other=0) // RANKS if GATHER else m).to(tl.int64)
        left = tl.load(narrow + m[:, None].to(tl.int64) * RANK + r[None, :], mask=(m[:, None] < end) & (r[None, :] < RANK), other=0.0)
        right = tl.load(wide + row[:, None] * COLUMNS + c[None, :], mask=(m[:, None] < end) & (c[None, :] < COLUMNS), other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
    place = out + expert.to(tl.int64) * (RANK * COLUMNS) + r[:, None] * COLUMNS + c[None, :]
    tl.store(place, total, mask=(r[:, None] < RANK) & (c[None, :] < COLUMNS))
