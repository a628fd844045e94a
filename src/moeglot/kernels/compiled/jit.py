"""How our kernels are compiled, and how a tensor is handed to one: its memory as one run of unsigned integers, and the strides in them.

A kernel holds no GIL and starts no thread, so that ours can run it side by side. Compiled code is kept in __pycache__ beside its source.
numba makes uint32 + uint32 a uint64: each intermediate is cast, or the loop is computed in lanes of twice the width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numba
import numpy
import torch

Array = numpy.ndarray[Any, Any]
Kernel = Callable[..., Any]

_UNSIGNED = {1: numpy.uint8, 2: numpy.uint16, 4: numpy.uint32, 8: numpy.uint64}
_SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def jit(kernel: Kernel) -> Kernel:
    """Compiled when it is first called; divides as numpy does, without looking for zeros."""
    return cast(Kernel, numba.njit(nogil=True, cache=True, error_model="numpy")(kernel))


def jit_sums(kernel: Kernel) -> Kernel:
    """As `jit`, of a kernel whose sums may be taken in lanes: in another order than they are written in, and the same one each time."""
    return cast(Kernel, numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})(kernel))


def inline(kernel: Kernel) -> Kernel:
    """A part of kernels."""
    return cast(Kernel, numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")(kernel))


def by_type(choose: Kernel) -> Kernel:
    """A part of kernels whose types choose it: `choose` takes its arguments' numba types, and returns what is compiled for these.

    What a type says is known to the compiler. A flag is not, and for a shift by 16 or by 0 it computes in lanes of twice the width.
    """

    def part(*_: Any) -> Any:
        raise TypeError(f"{choose.__name__} is a part of compiled kernels; Python has no such function")

    numba.extending.overload(part, jit_options={"error_model": "numpy"}, strict=False)(choose)
    return part


def memory(tensor: torch.Tensor) -> Array:
    """The memory that a tensor spans, as unsigned integers of its item size [n]; strides of the tensor count in these."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    flat = tensor.as_strided((span,), (1,), tensor.storage_offset())
    return cast(Array, flat.view(_SIGNED[tensor.element_size()]).numpy().view(_UNSIGNED[tensor.element_size()]))


def rows_together(tensor: torch.Tensor, axes: int = 1) -> torch.Tensor:
    """The tensor, or a copy, so that its last `axes` axes lie without gaps."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape[-axes:]), reversed(tensor.stride()[-axes:]), strict=True):
        if size > 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor
