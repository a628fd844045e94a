"""bitsandbytes' quant_state: the JSON beside 4-bit codes that declares their kind, block size, shape and dtype.

https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/functional.py (QuantState)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

from moeglot.dtypes import DTYPES
from moeglot.encoding import ANY
from moeglot.errors import BadNumbers

if TYPE_CHECKING:
    import torch

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # what the library takes
NESTED_BLOCK = 256
STATE_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class QuantState:
    """What the JSON declares. `shape` is that of the whole stored tensor; `dtype` is what a decoded number is rounded to."""

    kind: str
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    offset: float | None = None

    @classmethod
    def read(cls, text: torch.Tensor) -> QuantState:
        """u8 [n] -> QuantState; raises `BadNumbers` for what is no such JSON."""
        try:
            told = json.loads(bytes(text.tolist()))
            dtype = next(name for name in STATE_DTYPES if DTYPES[name].torch_name == told["dtype"])
            offset = float(told["nested_offset"]) if "nested_offset" in told else None
            state = cls(str(told["quant_type"]), int(told["blocksize"]), dtype, tuple(int(size) for size in told["shape"]), offset)
        except (ValueError, TypeError, KeyError, StopIteration) as error:
            raise refuse(f"a quant_state that cannot be read: {type(error).__name__} {error}") from error
        if state.blocksize not in BLOCKSIZES or told.get("nested_blocksize", NESTED_BLOCK) != NESTED_BLOCK or not isfinite(offset or 0):
            raise refuse(f"a quant_state with blocks of {told['blocksize']} and {told.get('nested_blocksize')}, offset {offset}")
        return state

    def write(self, length: int) -> torch.Tensor:
        """u8 [length], blanks at the end; `ANY` is as long as the text."""
        import torch

        told: dict[str, Any] = {"quant_type": self.kind, "blocksize": self.blocksize, "dtype": DTYPES[self.dtype].torch_name, "shape": list(self.shape)}
        if self.offset is not None:
            told |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": self.offset}
        text = json.dumps(told).encode().ljust(max(length, 0))
        if length not in (ANY, len(text)):
            raise ValueError(f"{len(text)} bytes of quant_state do not fit in {length}")
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def slice_shape(self, packed: torch.Tensor) -> tuple[int, ...] | None:
        """Shape of the values that these codes are: the declared one, or that of one expert of it; None if neither fits."""
        for first in range(max(0, len(self.shape) - 2), -1, -1):
            if -(-prod(self.shape[first:]) // 2) == packed.numel():
                return self.shape[first:]
        return None


def refuse(what: str) -> BadNumbers:
    return BadNumbers(
        f"a 4-bit tensor has {what}",
        "bitsandbytes writes quant_type, blocksize, dtype and shape there (functional.py, QuantState.as_dict)",
        "fetch the file again from its producer",
    )
