"""Which code computes: on a CPU numba's where it is installed, on a GPU Triton's, and torch's tables elsewhere or where they are asked for.

All give the same bits.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch

from moeglot import scratch
from moeglot.errors import UsageError

VARIABLE = "MOEGLOT_KERNELS"
NAMES = ("numba", "torch")
"""On a CPU. "triton" is the third: asked for by name, it computes on a CPU too, in Triton's interpreter."""

WORTH = 1 << 18
"""Numbers, or bytes of codes, from which compiled kernels are used of themselves."""

_asked: str | None = None
_device: torch.device | None = None


@cache
def installed() -> bool:
    """numba can be imported."""
    return importlib.util.find_spec("numba") is not None


@cache
def has_triton() -> bool:
    """triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def current() -> str:
    """`"numba"`, `"torch"` or `"triton"`: what `using` says, else the environment variable MOEGLOT_KERNELS, else what is installed. Raises `UsageError`."""
    asked = _asked or os.environ.get(VARIABLE) or ("numba" if installed() else "torch")
    missing = {"numba": not installed(), "triton": not has_triton(), "torch": False}
    if missing.get(asked, True):
        known = f"{asked} is not installed here" if asked in missing else f"known are {', '.join(missing)}"
        extra = "triton" if asked == "triton" else "fast"
        raise UsageError(f"there are no {asked} kernels", known, f"pip install 'moeglot[{extra}]', or unset {VARIABLE}")
    return asked


@contextmanager
def using(name: str) -> Iterator[None]:
    """All threads compute with these kernels while it lasts. For tests: who uses moeglot sets MOEGLOT_KERNELS."""
    global _asked
    before, _asked = _asked, name
    try:
        current()
        yield
    finally:
        _asked = before


@contextmanager
def on(device: str | None) -> Iterator[None]:
    """All threads decode on this device while it lasts, whatever device the codes come from and the numbers go to; None or "cpu" changes nothing.

    Raises `UsageError` where there is no such GPU, or nothing to decode with.
    """
    global _device
    before = _device
    if device not in (None, "cpu"):
        _device = _gpu(str(device))
    try:
        yield
    finally:
        _device = before


def _gpu(name: str) -> torch.device:
    count = torch.cuda.device_count()
    known = ["cuda", *(f"cuda:{n}" for n in range(count))]
    if name not in known or not count:
        here = f"torch {torch.__version__} sees {count or 'no'} CUDA device{'s' if count != 1 else ''}"
        raise UsageError(f"nothing can be decoded on {name!r}", here, f"choose {' or '.join(known)}" if count else "leave --device out: the CPU decodes")
    if not has_triton():
        raise UsageError(f"nothing can be decoded on {name!r}", "triton is not installed", "pip install 'moeglot[triton]', or leave --device out")
    return torch.device(name)


def compiled(name: str, *tensors: torch.Tensor) -> ModuleType | None:
    """The module of compiled kernels of that name, or None where torch's tables are to compute.

    Compiled ones are for tensors in this machine's memory. Unless asked for, they wait for a tensor that is worth the seconds
    which the first process takes to compile them, and from then on take all.
    """
    if any(tensor.device.type != "cpu" for tensor in tensors) or current() != "numba":
        return None
    module = f"moeglot.kernels.compiled.{name}"
    if not (_asked or os.environ.get(VARIABLE) or module in sys.modules) and all(tensor.numel() < WORTH for tensor in tensors):
        return None
    return importlib.import_module(module)


def on_gpu(*tensors: torch.Tensor) -> ModuleType | None:
    """The module of Triton's kernels that decode, or None where others are to compute. Tensors of a CPU get it if it is asked for by name or device."""
    asked = _asked or os.environ.get(VARIABLE)
    if _device or asked == "triton" or (asked is None and has_triton() and all(tensor.device.type == "cuda" for tensor in tensors)):
        current()
        return importlib.import_module("moeglot.kernels.triton.dequant")
    return None


def there(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the device that decodes."""
    return tensor if _device is None else tensor.to(_device)


def room(out: torch.Tensor) -> torch.Tensor:
    """`out`, or memory like it on the device that decodes."""
    return out if _device is None else torch.empty_like(out, device=_device)


def place(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, out: torch.Tensor | None) -> torch.Tensor:
    """Where a kernel writes: `out`, which must have this shape and dtype, or new memory."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if (tuple(out.shape), out.dtype) != (shape, dtype):
        raise ValueError(f"out is {out.dtype} {list(out.shape)}, the values are {dtype} {list(shape)}")
    return out


def matrices(tensor: torch.Tensor) -> torch.Tensor:
    """[..., rows, columns] -> [n, rows, columns], as a view where strides allow it; a vector is one row."""
    if tensor.dim() < 3:
        return tensor.reshape(1, -1, tensor.shape[-1]) if tensor.dim() < 2 else tensor.unsqueeze(0)
    return tensor if tensor.dim() == 3 else tensor.flatten(0, -3)


def places(out: torch.Tensor) -> torch.Tensor:
    """As `matrices`, and always a view."""
    return out.view(1, -1, out.shape[-1]) if out.dim() < 2 else out.unsqueeze(0) if out.dim() == 2 else out.view(-1, *out.shape[-2:])


def in_half_or_single(values: torch.Tensor) -> torch.Tensor:
    """Contiguous values in bfloat16 if they are, else in float32: what compiled encoders take."""
    return (values if values.dtype == torch.bfloat16 else values.to(torch.float32)).contiguous()


def working(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for what is soon forgotten, which has been used before where that costs less."""
    return scratch.empty(shape, dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)


def in_rows(out: torch.Tensor, numbers: int = 1 << 19) -> Iterator[tuple[slice, torch.Tensor]]:
    """[rows, columns] of any strides, some rows at a time, as rows without gaps; what is written there gets in place when the next are asked for."""
    if out.stride(1) == 1:
        yield slice(0, len(out)), out
        return
    step = max(1, numbers // max(1, out.shape[1]))
    for at in range(0, len(out), step):
        some = out[at : at + step]
        found = working(tuple(some.shape), out.dtype, out.device)
        yield slice(at, at + step), found
        some.copy_(found)
