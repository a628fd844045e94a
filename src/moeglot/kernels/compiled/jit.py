"""How our kernels are compiled, and how a tensor is handed to one: its memory as one run of unsigned integers, and the strides in them.

A kernel holds no GIL, starts no thread and takes no memory, so that ours can run it side by side. numba is imported when one is compiled; after that its code
lies in a file (`linked`), or where that cannot be, in numba's own cache.
numba makes uint32 + uint32 a uint64: each intermediate is cast, or the loop is computed in lanes of twice the width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cached_property
from threading import Lock
from types import FunctionType
from typing import Any, cast

import numpy
import torch

from moeglot.kernels.compiled import linked

Array = numpy.ndarray[Any, Any]
Function = Callable[..., Any]

_UNSIGNED = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}
_BYTES = {name: numpy.dtype(name).itemsize for name in ("uint8", "uint16", "uint32", "uint64", "int16", "int32", "int64", "float32", "float64")}
_ARRAYS = {name: f"array {name}" for name in _BYTES}
_COMPILING = Lock()


class Run:
    """Memory as one run of numbers of a type, as a kernel takes it: `address`, how many, and numpy's name of the type."""

    __slots__ = ("address", "dtype", "owner", "size")

    def __init__(self, address: int, size: int, dtype: str, owner: torch.Tensor) -> None:
        self.address, self.size, self.dtype, self.owner = address, size, dtype, owner

    def view(self, dtype: str) -> Run:
        """The same memory as numbers of another type."""
        return Run(self.address, self.size * _BYTES[self.dtype] // _BYTES[dtype], dtype, self.owner)

    def since(self, first: int) -> Run:
        """All but the first numbers."""
        return Run(self.address + first * _BYTES[self.dtype], self.size - first, self.dtype, self.owner)

    @property
    def kind(self) -> str:
        """The type of the argument; "between": it begins between two places for such a number."""
        return _ARRAYS[self.dtype] if self.address % _BYTES[self.dtype] == 0 else f"{_ARRAYS[self.dtype]} between"

    def array(self) -> Array:
        """The same memory for numba itself."""
        held: Any = (ctypes.c_uint8 * (self.size * _BYTES[self.dtype])).from_address(self.address)
        return cast(Array, numpy.frombuffer(held, self.dtype))


def _by_numba(*_: Any) -> Any:
    """In place of a kernel whose code is not in a file."""


class _Part:
    """A function in numba's Python, of which kernels are made."""

    def __init__(self, function: Function, **options: Any) -> None:
        self.function, self.options = cast(FunctionType, function), options

    @cached_property
    def compiled(self) -> Any:
        """What numba makes of it."""
        import numba

        return numba.njit(nogil=True, error_model="numpy", _nrt=False, **self.options)(self.for_numba(self.function))

    @staticmethod
    def for_numba(function: FunctionType) -> FunctionType:
        """The function with the parts that it names as numba knows them."""
        known = {name: value.compiled if isinstance(value, _Part) else value for name, value in _named(function).items()}
        return FunctionType(function.__code__, function.__globals__ | known, function.__name__, function.__defaults__, function.__closure__)

    def __call__(self, *_: Any) -> Any:
        raise TypeError(f"{self.function.__name__} is a part of compiled kernels; Python has no such function")


def _named(function: FunctionType) -> dict[str, Any]:
    """What a function and those in it name outside of them."""
    codes, names = [function.__code__], set[str]()
    for code in codes:
        names.update(code.co_names)
        codes += [constant for constant in code.co_consts if hasattr(constant, "co_names")]
    return {name: function.__globals__[name] for name in names if name in function.__globals__}


class _ByType(_Part):
    @cached_property
    def compiled(self) -> Any:
        import numba

        def part(*_: Any) -> Any: ...

        numba.extending.overload(part, jit_options={"error_model": "numpy"}, strict=False)(self.for_numba(self.function))
        return part


class _Kernel(_Part):
    """A part that Python calls, with arrays of one axis without gaps, and numbers."""

    def __init__(self, function: Function, **options: Any) -> None:
        super().__init__(function, **options)
        self.entries: dict[tuple[str, ...], Function] = {}

    def __call__(self, *given: Any) -> Any:
        takes, numbers = list[str](), list[Any]()
        for value in given:
            if isinstance(value, Run):
                takes.append(value.kind)
                numbers += (value.address, value.size)
            else:
                takes.append("bool" if value is True or value is False else "int64" if isinstance(value, int) else value.dtype.name)
                numbers.append(value)
        kind = tuple(takes)
        entry = self.entries.get(kind) or self._entry(kind)
        return entry(*numbers) if entry is not _by_numba else self.compiled(*(value.array() if isinstance(value, Run) else value for value in given))

    def _entry(self, takes: tuple[str, ...]) -> Function:
        """Called where a kernel meets these types for the first time in a process."""
        name = f"{self.function.__module__.rpartition('.')[2]}.{self.function.__name__}"
        with _COMPILING:
            if takes not in self.entries:
                self.entries[takes] = linked.kept(name, takes) or self._made(name, takes)
            return self.entries[takes]

    def _made(self, name: str, takes: tuple[str, ...]) -> Function:
        if not linked.here():
            self.compiled.enable_caching()
            return _by_numba
        import numba

        types = tuple(_type(numba, one) for one in takes)
        self.compiled.compile(types)
        try:
            returns = str(self.compiled.overloads[types].signature.return_type)
            linked.keep(name, takes, linked.linked(self.compiled.inspect_llvm(types), returns, takes))
        except linked.NotLinked:
            return _by_numba
        return linked.kept(name, takes) or _by_numba


def _type(numba: Any, kind: str) -> Any:
    if kind.startswith("array "):
        _, of, *between = kind.split()
        return numba.types.Array(_type(numba, of), 1, "C", aligned=not between)
    return numba.types.boolean if kind == "bool" else getattr(numba.types, kind)


def jit(kernel: Function) -> Function:
    """Compiled when it is first called; divides as numpy does, without looking for zeros."""
    return _Kernel(kernel)


def jit_sums(kernel: Function) -> Function:
    """As `jit`, of a kernel whose sums may be taken in lanes: in another order than they are written in, and the same one each time."""
    return _Kernel(kernel, fastmath={"reassoc", "nsz", "contract"})


def inline(part: Function) -> Function:
    """A part of kernels."""
    return _Part(part, inline="always")


def by_type(choose: Function) -> Function:
    """A part of kernels whose types choose it: `choose` takes its arguments' numba types, and returns what is compiled for these.

    What a type says is known to the compiler. A flag is not, and for a shift by 16 or by 0 it computes in lanes of twice the width.
    """
    return _ByType(choose)


FLOATS = (torch.bfloat16, torch.float32)
"""What a kernel takes as numbers, and gives; it tells them apart by their size."""


def checked(tensor: torch.Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> torch.Tensor:
    """The tensor, which must have this shape and one of these dtypes: in any other memory a kernel would write past the end."""
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        raise ValueError(f"a kernel takes {' or '.join(map(str, dtypes))} {list(shape)} here, and was given {tensor.dtype} {list(tensor.shape)}")
    return tensor


def memory(tensor: torch.Tensor) -> Run:
    """The memory that a tensor spans, as unsigned integers of its item size [n]; strides of the tensor count in these."""
    if tensor.device.type != "cpu":
        raise ValueError(f"a kernel computes in this machine's memory, and was given a tensor on {tensor.device}")
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    return Run(tensor.data_ptr(), span, _UNSIGNED[tensor.element_size()], tensor)


def singles(tensor: torch.Tensor) -> Run:
    """As `memory`, of float32 and as such."""
    if tensor.dtype != torch.float32:
        raise ValueError(f"a kernel takes float32 here, and was given {tensor.dtype}")
    return memory(tensor).view("float32")


def rows_together(tensor: torch.Tensor, axes: int = 1) -> torch.Tensor:
    """The tensor, or a copy, so that its last `axes` axes lie without gaps."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape[-axes:]), reversed(tensor.stride()[-axes:]), strict=True):
        if size > 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


def space(count: int, dtype: str) -> Run:
    """Memory for a kernel to work in [count]; torch's begins at a line of the cache, numpy's need not."""
    return memory(torch.empty(count * _BYTES[dtype], dtype=torch.uint8, device="cpu")).view(dtype)
