"""Where Triton's kernels can run: on a GPU, or in Triton's interpreter on a CPU; and the one way to declare a kernel."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import triton

from moeglot.errors import UsageError


def jit(kernel: Callable[..., Any]) -> Any:
    """Compiled for the device of its tensors when it is first called with their types; interpreted if TRITON_INTERPRET=1 was set at import."""
    return cast(Any, triton.jit(kernel))


def interpreted() -> bool:
    """Kernels are run by Triton's interpreter, tensor by tensor in numpy."""
    return bool(triton.knobs.runtime.interpret)


def runs_on(device: torch.device) -> bool:
    """Kernels can run on tensors of this device."""
    return interpreted() if device.type == "cpu" else device.type == "cuda"


def beside(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the device of this tensor, whichever is the current one."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def compiles_on(device: torch.device) -> bool:
    """All kernels compile for this GPU: before 3.7, Triton fails in its own passes over the product with MXFP4 for sm_100 and 110."""
    major, minor = triton.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (3, 7) or torch.cuda.get_device_capability(device)[0] not in (10, 11)


def check(device: torch.device) -> None:
    """Raises `UsageError` where no kernel can run."""
    if not runs_on(device):
        raise UsageError(
            f"the triton kernels do not run on a tensor of the device {device.type!r}",
            "they are compiled for CUDA; on a CPU they run in Triton's interpreter alone, which is slow and meant for tests",
            "move it to a GPU, choose another backend, or set TRITON_INTERPRET=1 before Python starts",
        )


def check_dtype(dtype: torch.dtype) -> None:
    """Raises `UsageError` for a type that the kernels do not compute in."""
    if dtype not in (torch.bfloat16, torch.float32):
        raise UsageError(f"the triton kernels do not multiply in {dtype}", "they compute in bfloat16 or float32", "use bfloat16, or another backend")
    if interpreted() and dtype != torch.float32:
        raise UsageError(
            f"the triton kernels do not multiply in {dtype} here",
            "Triton's interpreter is at work (TRITON_INTERPRET=1), whose products of bfloat16 are wrong",
            "use float32, or unset TRITON_INTERPRET",
        )


def check_compiler(device: torch.device) -> None:
    """Raises `UsageError` for a GPU that this Triton does not compile all kernels for."""
    if device.type == "cuda" and not compiles_on(device):
        major, minor = torch.cuda.get_device_capability(device)
        wrong = f"the triton kernels do not compile for this GPU (sm_{major}{minor})"
        raise UsageError(wrong, f"triton {triton.__version__} is installed, whose compiler fails there", "pip install 'triton>=3.7', or choose another backend")
