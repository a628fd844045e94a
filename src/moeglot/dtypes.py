"""The number types of safetensors, torch and config.json: their names, sizes and what fits into what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeglot.errors import UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DType:
    """`name` as in a safetensors header, `torch_name` as in torch and config.json; bits of exponent and mantissa for floats."""

    name: str
    torch_name: str
    size: int
    exponent: int = 0
    mantissa: int = 0

    @property
    def is_float(self) -> bool:
        return self.exponent > 0

    def fits_in(self, other: DType) -> bool:
        """Every value of this type is a value of the other."""
        return self.is_float and self.exponent <= other.exponent and self.mantissa <= other.mantissa

    @property
    def torch(self) -> torch.dtype:
        import torch

        dtype = getattr(torch, self.torch_name)
        assert isinstance(dtype, torch.dtype)
        return dtype


# https://github.com/huggingface/safetensors/blob/main/safetensors/src/tensor.rs (enum Dtype)
DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType("F64", "float64", 8, 11, 52),
        DType("F32", "float32", 4, 8, 23),
        DType("BF16", "bfloat16", 2, 8, 7),
        DType("F16", "float16", 2, 5, 10),
        DType("F8_E4M3", "float8_e4m3fn", 1, 4, 3),
        DType("F8_E5M2", "float8_e5m2", 1, 5, 2),
        DType("F8_E8M0", "float8_e8m0fnu", 1),
        DType("I64", "int64", 8),
        DType("I32", "int32", 4),
        DType("I16", "int16", 2),
        DType("I8", "int8", 1),
        DType("U64", "uint64", 8),
        DType("U32", "uint32", 4),
        DType("U16", "uint16", 2),
        DType("U8", "uint8", 1),
        DType("BOOL", "bool", 1),
    )
}
WEIGHT_DTYPES = ("F64", "F32", "BF16", "F16")
"""Float types that hold a weight as it is, without a scale beside it."""

_ALIASES = {"bf16": "BF16", "fp16": "F16", "half": "F16", "fp32": "F32", "fp64": "F64"}


def dtype_of(tensor: torch.Tensor) -> DType:
    """The entry of a live tensor's dtype."""
    return by_torch_name(str(tensor.dtype).removeprefix("torch."))


def by_torch_name(name: str) -> DType:
    """`"bfloat16"` -> BF16; raises `UsageError` for a name that torch or config.json would not use."""
    for dtype in DTYPES.values():
        if name in (dtype.torch_name, dtype.name) or _ALIASES.get(name.lower()) == dtype.name or name.upper() == dtype.name:
            return dtype
    known = ", ".join(DTYPES[name].torch_name for name in WEIGHT_DTYPES)
    raise UsageError(f"{name!r} is not a number type", f"weights are stored as {known}", "use one of these names")


def weight_dtype(asked: str | torch.dtype) -> torch.dtype:
    """`"float32"` or torch.float32, as it is in torch; raises `UsageError` for one not of `WEIGHT_DTYPES`, which a cast alone does not reach."""
    found = by_torch_name(asked).torch if isinstance(asked, str) else asked
    if not (found.is_floating_point and found.itemsize > 1):
        known = ", ".join(DTYPES[name].torch_name for name in WEIGHT_DTYPES)
        raise UsageError(f"values as {found}", "a number of that type needs a scale, and a cast has none", f"choose one of {known}")
    return found
