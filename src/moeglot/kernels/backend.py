"""Which code computes on a CPU: numba's where it is installed, torch's tables where it is not or where they are asked for. Both give the same bits."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch

from moeglot import scratch
from moeglot.errors import UsageError

VARIABLE = "MOEGLOT_KERNELS"
NAMES = ("numba", "torch")

WORTH = 1 << 18
"""Numbers, or bytes of codes, from which compiled kernels are used of themselves."""

_asked: str | None = None


@cache
def installed() -> bool:
    """numba can be imported."""
    return importlib.util.find_spec("numba") is not None


def current() -> str:
    """`"numba"` or `"torch"`: what `using` says, else the environment variable MOEGLOT_KERNELS, else what is installed. Raises `UsageError`."""
    asked = _asked or os.environ.get(VARIABLE) or ("numba" if installed() else "torch")
    if asked not in NAMES or (asked == "numba" and not installed()):
        known = "numba is not installed here" if asked == "numba" else f"known are {' and '.join(NAMES)}"
        raise UsageError(f"there are no {asked} kernels", known, f"pip install 'moeglot[fast]', or unset {VARIABLE}")
    return asked


@contextmanager
def using(name: str) -> Iterator[None]:
    """All threads compute with these kernels while it lasts."""
    global _asked
    before, _asked = _asked, name
    try:
        current()
        yield
    finally:
        _asked = before


def compiled(name: str, *tensors: torch.Tensor) -> ModuleType | None:
    """The module of compiled kernels of that name, or None where torch's tables are to compute.

    Compiled ones are for tensors in this machine's memory. Unless asked for, they wait for a tensor that is worth the second which numba takes to start.
    """
    if any(tensor.device.type != "cpu" for tensor in tensors) or current() == "torch":
        return None
    if not (_asked or os.environ.get(VARIABLE)) and all(tensor.numel() < WORTH for tensor in tensors):
        return None
    return importlib.import_module(f"moeglot.kernels.compiled.{name}")


def place(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, out: torch.Tensor | None) -> torch.Tensor:
    """Where a kernel writes: `out`, which must have this shape and dtype, or new memory."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    assert (tuple(out.shape), out.dtype) == (shape, dtype), f"out is {out.dtype} {list(out.shape)}, the values are {dtype} {list(shape)}"
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


def in_rows(out: torch.Tensor, numbers: int = 1 << 19) -> Iterator[tuple[slice, torch.Tensor]]:
    """[rows, columns] of any strides, some rows at a time, as rows without gaps; what is written there gets in place when the next are asked for."""
    if out.stride(1) == 1:
        yield slice(0, len(out)), out
        return
    step = max(1, numbers // max(1, out.shape[1]))
    for at in range(0, len(out), step):
        some = out[at : at + step]
        found = scratch.empty(tuple(some.shape), out.dtype) if out.device.type == "cpu" else torch.empty(some.shape, dtype=out.dtype, device=out.device)
        yield slice(at, at + step), found
        some.copy_(found)
