"""Products of groups of rows with a matrix each: the grouped GEMM of torch where it is one, else a loop; and the strides that it refuses, padded."""

from __future__ import annotations

import torch
from torch.nn import functional

ALIGNED = 16
"""Bytes that a row's stride must be a multiple of for `torch.nn.functional.grouped_mm`."""


def is_native(device: torch.device) -> bool:
    """grouped_mm is one kernel there; elsewhere it is a loop, and not the better one."""
    return device.type == "cuda" and hasattr(functional, "grouped_mm") and torch.cuda.get_device_capability(device) >= (8, 0)


def rows(x: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor, native: bool | None = None) -> torch.Tensor:
    """x [n, in], matrices [b, in, out] (any strides), ends int32 [b] -> [n, out]: each run of rows times its matrix."""
    if len(matrices) == 1:
        return x @ matrices[0]
    if is_native(x.device) if native is None else native:
        return functional.grouped_mm(aligned(x), aligned(matrices), offs=ends)
    out = x.new_empty(len(x), matrices.shape[-1])
    for matrix, start, end in zip(matrices, [0, *ends.tolist()], ends.tolist(), strict=False):
        torch.mm(x[start:end], matrix, out=out[start:end])
    return out


def outer(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor, native: bool | None = None) -> torch.Tensor:
    """a [n, p], b [n, q], ends int32 [g] -> [g, p, q]: for each run of rows, aᵀ b."""
    if len(ends) == 1:
        return (a.mT @ b).unsqueeze(0)
    if is_native(a.device) if native is None else native:
        return functional.grouped_mm(aligned(a).mT, aligned(b), offs=ends)
    out = a.new_empty(len(ends), a.shape[1], b.shape[1])
    for found, start, end in zip(out, [0, *ends.tolist()], ends.tolist(), strict=False):
        torch.mm(a[start:end].mT, b[start:end], out=found)
    return out


def aligned(x: torch.Tensor) -> torch.Tensor:
    """The same numbers [..., r, c]; a copy with longer rows (or columns, if they are what is contiguous) where a stride is no multiple of 16 bytes."""
    step = ALIGNED // x.element_size()
    if x.stride(-1) != 1 and x.stride(-2) == 1:
        return aligned(x.mT).mT
    strides = x.stride()[:-1]
    if x.stride(-1) == 1 and all(stride % step == 0 for stride in strides) and x.data_ptr() % ALIGNED == 0:
        return x
    columns = x.shape[-1]
    padded = x.new_empty(*x.shape[:-1], -(-columns // step) * step)[..., :columns]
    return padded.copy_(x)
