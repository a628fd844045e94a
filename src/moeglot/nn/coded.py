"""Products with a stored line on a GPU: which lines the Triton kernels multiply in their codes, and how the others, or very many rows, are decoded first."""

from __future__ import annotations

from math import prod

import torch
from torch.nn import functional

from moeglot.encodings.fp8 import FP8
from moeglot.encodings.mxfp4 import MXFP4
from moeglot.encodings.plain import Plain
from moeglot.kernels import fp8
from moeglot.kernels.triton import dequant, gemm
from moeglot.kernels.triton.gemm import Change, Matrices, Rows
from moeglot.nn.grouped import aligned, is_native
from moeglot.nn.held import Held

CROSSOVER = 1024
"""Rows an expert from which decoding all matrices and torch's grouped GEMM are cheaper than decoding tiles again for each run of rows, where that GEMM is one
kernel. Reckoned, not measured: decoding a layer takes about as long as its products with 600 rows.
"""
LARGEST_SCALE = 128
"""Of MXFP4: 2^(scale - 1) is the largest power of two that bfloat16 has, and the kernels multiply by that once."""
BLOCK = (128, 128)
"""Of FP8: what tiles of the kernels divide."""
BUFFER = 1 << 31
"""Bytes that all matrices of a line may take once decoded, for torch's grouped GEMM."""
CHUNK = 1 << 28
"""Bytes of decoded matrices at a time where a line's codes have no kernel; at least one expert."""


def matrices(line: Held, dtype: torch.dtype) -> Matrices | None:
    """The codes of a line as they lie, for the kernels; None where they have none for its encoding, its scales or this type."""
    encoding, shape = line.encoding, (line.experts, line.shape[0], line.shape[1])
    if isinstance(encoding, Plain):
        codes = line.get_buffer("part_value")
        return Matrices(gemm.PLAIN, codes.view(shape), None, shape) if codes.dtype == dtype else None
    if line.alone:
        return None
    if isinstance(encoding, MXFP4) and line.largest_scale <= LARGEST_SCALE:
        return Matrices(gemm.MXFP4, line.get_buffer("part_packed").view(torch.uint8), line.get_buffer("part_scale").view(torch.uint8), shape)
    if isinstance(encoding, FP8) and encoding.block == BLOCK and line.shape[1] % 4 == 0:
        return Matrices(gemm.FP8, line.get_buffer("part_weight"), fp8.scale_values(line.get_buffer("part_scale")), shape, BLOCK)
    return None


def product(
    line: Held,
    x: torch.Tensor,
    rows: Rows,
    back: bool,
    *,
    gather: bool = False,
    scatter: bool = False,
    bias: torch.Tensor | None = None,
    change: Change | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [n, in] times the matrices of a line -> [n, out]; `back`: [n, out] -> [n, in]. The rest as in `moeglot.kernels.triton.gemm.product`."""
    along, coded = line.line.upright != back, matrices(line, x.dtype)
    whole = line.experts * prod(line.shape) * x.element_size()
    if is_native(x.device, x.dtype) and len(rows.order) > CROSSOVER * line.experts and whole <= BUFFER:
        found = _decoded_first(line, coded, x[rows.order // rows.ranks] if gather else x, rows, along)
        return _finished(found, rows, bias, change, weights, scatter)
    if coded is not None:
        return gemm.product(x, coded, rows, along, gather=gather, scatter=scatter, bias=bias, change=change, weights=weights)
    out = x.new_zeros(len(rows.order), line.shape[0] if along else line.shape[1])
    step = max(1, CHUNK // (prod(line.shape) * x.element_size()))
    for first in range(0, line.experts, step):
        some = range(first, min(first + step, line.experts))
        dense = line.dense(some, x.dtype)
        mine = slice(some.start, some.stop)
        gemm.product(
            x,
            Matrices(gemm.PLAIN, dense, None, (len(some), line.shape[0], line.shape[1])),
            rows.some(some),
            along,
            gather=gather,
            scatter=scatter,
            bias=None if bias is None else bias[mine],
            change=None if change is None else Change(change.low, change.side[mine]),
            weights=weights,
            out=out,
        )
    return out


def decode(coded: Matrices, out: torch.Tensor) -> torch.Tensor:
    """MXFP4 or FP8 as numbers in `out` [e, rows, columns], which is returned; nothing waits for the device."""
    assert coded.scale is not None
    if coded.kind == gemm.MXFP4:
        return dequant.mxfp4(coded.codes, coded.scale, out)
    return dequant.fp8(coded.codes, coded.scale, coded.block, out)


def _decoded_first(line: Held, coded: Matrices | None, x: torch.Tensor, rows: Rows, along: bool) -> torch.Tensor:
    """x [n, in] -> [n, out]: all matrices decoded, which memory is free again afterwards, and torch's grouped GEMM. Unassigned rows may hold anything."""
    if coded is None:
        dense = line.dense(range(line.experts), x.dtype)
    elif coded.scale is None:
        dense = coded.codes
    else:
        dense = decode(coded, torch.empty(coded.shape, dtype=x.dtype, device=x.device))
    return functional.grouped_mm(aligned(x), aligned(dense.mT if along else dense), offs=rows.ends)


def _finished(found: torch.Tensor, rows: Rows, bias: torch.Tensor | None, change: Change | None, weights: torch.Tensor | None, scatter: bool) -> torch.Tensor:
    """What the kernels do to a tile before it is written, of rows [n, out]."""
    places = torch.arange(len(found), device=found.device, dtype=torch.int32)
    if bias is not None:
        found = found + bias[torch.searchsorted(rows.ends, places, right=True).clamp_(max=len(bias) - 1)]
    if change is not None:
        side = Matrices(gemm.PLAIN, change.side, None, (change.side.shape[0], change.side.shape[1], change.side.shape[2]))
        found = found + gemm.product(change.low, side, rows, False)
    if weights is not None:
        found = found * weights[rows.order].unsqueeze(-1).to(found.dtype)
    found = torch.where((places < rows.ends[-1]).unsqueeze(-1), found, 0)
    return torch.empty_like(found).index_copy_(0, rows.order, found) if scatter else found
