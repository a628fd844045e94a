"""Products of groups of rows with a matrix each: torch's grouped GEMM where it is one, else a loop; and what to do where torch's way is refused or slow."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
from torch.nn import functional

ALIGNED = 16
"""Bytes that a row's stride must be a multiple of for `torch.nn.functional.grouped_mm`."""
FEW_ROWS = 8
"""Rows from which on converting a matrix to float32 costs less than torch's loop over 16 bits saves, where each column is contiguous."""
NARROW = 32
"""Rows or columns of a matrix below which MKL multiplies float32 as fast as oneDNN does: those of an adapter."""
WIDE = 2048
"""Columns of a matrix, contiguous each, from which on an AMD without AVX-512 oneDNN multiplies few rows of float32 faster than MKL does."""
SAME = 16
"""oneDNN compiles a kernel for each number of rows (.7 ms, as long as the product takes) and keeps the last thousand: it gets multiples of this."""


def is_native(device: torch.device, dtype: torch.dtype) -> bool:
    """grouped_mm is one kernel there: bfloat16 on sm_90 and sm_100. Elsewhere it is a loop that waits for the device, and not the better one.

    https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/cuda/GroupedBlas.cpp, `_grouped_mm_cuda`
    """
    if device.type != "cuda" or dtype != torch.bfloat16 or not hasattr(functional, "grouped_mm"):
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def rows(x: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor, native: bool | None = None) -> torch.Tensor:
    """x [n, in], matrices [b, in, out] (any strides), ends int32 [b] -> [n, out]: each run of rows times its matrix."""
    if matrices.shape[0] == 1:  # `len` of a tensor costs a microsecond or two, and a step asks thousands of times
        return product(x, matrices[0])
    if is_native(x.device, x.dtype) if native is None else native:
        return functional.grouped_mm(aligned(x), aligned(matrices), offs=ends)
    out = x.new_empty(len(x), matrices.shape[-1])
    start = 0
    for n, end in enumerate(ends.tolist()):
        if end > start:  # one without rows costs nothing
            out[start:end] = product(x[start:end], matrices[n])
        start = end
    return out


def outer(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor, native: bool | None = None) -> torch.Tensor:
    """a [n, p], b [n, q], ends int32 [g] -> [g, p, q]: for each run of rows, aᵀ b."""
    if ends.shape[0] == 1:
        return _across(a, b).unsqueeze(0)
    if is_native(a.device, a.dtype) if native is None else native:
        return functional.grouped_mm(aligned(a).mT, aligned(b), offs=ends)
    out = a.new_empty(len(ends), a.shape[1], b.shape[1])
    for found, start, end in zip(out, [0, *ends.tolist()], ends.tolist(), strict=False):
        found[:] = _across(a[start:end], b[start:end])
    return out


def _across(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [n, p], b [n, q] -> aᵀ b; the one with fewer columns is turned, the other would take four times as long."""
    if b.shape[1] < a.shape[1]:
        return _across(b, a).mT
    if _by_onednn(a, b) and (a.itemsize == 2 or a.shape[1] >= NARROW):
        a, b = _padded(a), _padded(b)
    return product(a.mT, b)


def product(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """x [n, in], matrix [in, out] -> [n, out] in their dtype, outside of autograd; by way of float32 where this machine multiplies 16 bits slowly."""
    if x.device.type == "cpu" and x.itemsize == 2 and not has_kernels(x.dtype) and (x.shape[0] >= FEW_ROWS or matrix.stride(0) != 1):
        return product(x.float(), matrix.float()).to(x.dtype)
    if not _by_onednn(x, matrix):
        return x @ matrix
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(_padded(x), matrix.mT, None, "none", [], "")
    return found[: x.shape[0]]


def _by_onednn(x: torch.Tensor, matrix: torch.Tensor) -> bool:
    """16 bits go there in any case, float32 with `@` to MKL. As measured, that is half as fast on an AMD with AVX-512, up to twice as fast on an Intel with it,
    and on an AMD without takes 1.3 to 2 times as long for WIDE matrices that lie [out, in], .7 to 1 times for others.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float32) or not has_onednn() or not has_kernels(x.dtype):
        return False
    if x.itemsize == 2:
        return min(matrix.shape) >= 1
    wanted = has_avx512() or (matrix.stride(0) == 1 and matrix.shape[1] >= WIDE)
    return wanted and min(matrix.shape) >= NARROW and not is_intel()


def _padded(x: torch.Tensor) -> torch.Tensor:
    """Rows of zeros after the rows of x."""
    missing = -x.shape[0] % SAME if x.shape[0] > SAME else 0
    return torch.constant_pad_nd(x, (0, 0, 0, missing)) if missing else x


@cache
def is_intel() -> bool:
    """Of the processor; systems without /proc/cpuinfo say it in a line of their own."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "GenuineIntel" in platform.processor()


@cache
def has_avx512() -> bool:
    """torch computes with vectors of 512 bits."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@cache
def has_onednn() -> bool:
    """torch has oneDNN's products, also for float32."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX") and hasattr(torch.ops.mkldnn, "_linear_pointwise")


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
