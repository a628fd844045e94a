"""Products of groups of rows with a matrix each: the grouped GEMM of torch where it is one, else a loop; and what to do where that is refused or slow."""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional

ALIGNED = 16
"""Bytes that a row's stride must be a multiple of for `torch.nn.functional.grouped_mm`."""
FEW_ROWS = 8
"""Rows from which on converting a matrix to float32 costs less than torch's loop over 16 bits saves, where each column is contiguous."""


def is_native(device: torch.device) -> bool:
    """grouped_mm is one kernel there; elsewhere it is a loop, and not the better one."""
    return device.type == "cuda" and hasattr(functional, "grouped_mm") and torch.cuda.get_device_capability(device) >= (8, 0)


def rows(x: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor, native: bool | None = None) -> torch.Tensor:
    """x [n, in], matrices [b, in, out] (any strides), ends int32 [b] -> [n, out]: each run of rows times its matrix."""
    if len(matrices) == 1:
        return product(x, matrices[0])
    if is_native(x.device) if native is None else native:
        return functional.grouped_mm(aligned(x), aligned(matrices), offs=ends)
    out = x.new_empty(len(x), matrices.shape[-1])
    for matrix, start, end in zip(matrices, [0, *ends.tolist()], ends.tolist(), strict=False):
        out[start:end] = product(x[start:end], matrix)
    return out


def outer(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor, native: bool | None = None) -> torch.Tensor:
    """a [n, p], b [n, q], ends int32 [g] -> [g, p, q]: for each run of rows, aᵀ b."""
    if len(ends) == 1:
        return product(a.mT, b).unsqueeze(0)
    if is_native(a.device) if native is None else native:
        return functional.grouped_mm(aligned(a).mT, aligned(b), offs=ends)
    out = a.new_empty(len(ends), a.shape[1], b.shape[1])
    for found, start, end in zip(out, [0, *ends.tolist()], ends.tolist(), strict=False):
        found[:] = product(a[start:end].mT, b[start:end])
    return out


def product(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """x [n, in], matrix [in, out] -> [n, out] in their dtype; by way of float32 where this machine multiplies 16 bits slowly."""
    slow = x.device.type == "cpu" and not has_kernels(x.dtype) and (len(x) >= FEW_ROWS or matrix.stride(0) != 1)
    return (x.float() @ matrix.float()).to(x.dtype) if slow else x @ matrix


@cache
def has_kernels(dtype: torch.dtype) -> bool:
    """The CPU has products of this type, as oneDNN says. Elsewhere torch has a plain loop over 16 bits: measured, 5 to 130 times as long as float32."""
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return asked is None or not hasattr(torch.ops.mkldnn, asked) or bool(getattr(torch.ops.mkldnn, asked)())


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
