"""Two devices where a machine has none: tensors on "elsewhere:0" and "elsewhere:1" compute as a CPU does, and meet no tensor of another device.

torch itself says where a tensor is; an operation that mixes devices raises, as it does on GPUs. So a model that is spread over both computes here only if
everything has been brought to where it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "elsewhere"
ASKED: list[str] = []
"""Operations for which the host had to wait: numbers that it wanted to see."""
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
WAITED_FOR = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class There(torch.Tensor):
    """A tensor on a device of its own; `here` holds its numbers."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor, device: torch.device) -> There:
        return torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=device, requires_grad=False
        )

    def __init__(self, here: torch.Tensor, device: torch.device) -> None:
        self.here = here

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch reads memory, which a subclass does not have

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(operation, args, kwargs or {})


def computed(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
    places = {one.device for one in tensors if isinstance(one, There) or one.dim()}
    if len(places) > 1 and operation not in MOVES:
        raise RuntimeError(f"Expected all tensors to be on the same device: {operation} of {sorted(map(str, places))}")
    asked = kwargs.get("device")
    device = torch.device(asked) if asked is not None else next((one.device for one in tensors if isinstance(one, There)), torch.device("cpu"))
    if device.type == NAME:
        device = torch.device(NAME, device.index or 0)
        kwargs = {**kwargs, "device": torch.device("cpu")} if asked is not None else kwargs
    if any(isinstance(one, There) for one in tensors) and (device.type == "cpu" or operation in WAITED_FOR):
        ASKED.append(str(operation))
    known = {id(one.here): one for one in tensors if isinstance(one, There)}
    args, kwargs = tree_map_only(There, lambda one: one.here, (args, kwargs))
    found = operation(*args, **kwargs)

    def wrapped(one: torch.Tensor) -> torch.Tensor:
        return known[id(one)] if id(one) in known else There(one, device) if device.type == NAME else one

    if operation is torch.ops.aten.copy_.default:  # into whatever device the first is on
        return known.get(id(found), found)
    return tree_map_only(torch.Tensor, wrapped, found)


class _Everywhere(TorchDispatchMode):
    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(operation, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """torch.tensor asks no dispatcher where it writes."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if function is torch.tensor else None
        found = function(*args, **kwargs)
        return found.to(device) if device is not None else found


class _Module(_DummyBackendModule):
    there = False
    """Torch registers a backend for the rest of the process; other tests must not find a device."""

    def is_available(self) -> bool:
        return self.there

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_ready: list[bool] = []


@contextmanager
def two_devices() -> Iterator[tuple[str, str]]:
    """The names of two devices, which exist while this lasts."""
    if not _ready:
        _setup_privateuseone_for_python_backend(NAME, _Module())
        _ready.append(True)
    _Module.there = True
    try:
        with _Literals(), _Everywhere():
            yield f"{NAME}:0", f"{NAME}:1"
    finally:
        _Module.there = False
