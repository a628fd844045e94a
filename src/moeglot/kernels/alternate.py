"""bfloat16 numbers that lie two apart, as float32: each is half of a word, which is shifted or masked as a whole."""

from __future__ import annotations

import torch

HIGH = -0x10000
"""The bits of a word that are a float32's as well, where the bfloat16 is its second half."""


def widen(values: torch.Tensor, out: torch.Tensor) -> bool:
    """values bfloat16 [rows, columns] -> out float32, where the numbers of one axis lie two apart and those of `out` side by side; False for any others."""
    if values.dim() != 2 or (values.dtype, out.dtype) != (torch.bfloat16, torch.float32) or not values.numel() or values.device.type != "cpu":
        return False
    if out.stride(0) == 1:
        values, out = values.mT, out.mT
    second = values.data_ptr() % 4 // 2
    first, end = values.storage_offset() - second, values.storage_offset() - second + (len(values) - 1) * values.stride(0) + 2 * values.shape[1]
    if (values.stride(1), out.stride(1)) != (2, 1) or first < 0 or first % 2 or values.stride(0) % 2 or 2 * end > values.untyped_storage().nbytes():
        return False
    words = values.as_strided((len(values), 2 * values.shape[1]), (values.stride(0), 1), first).view(torch.int32)
    if second:
        torch.bitwise_and(words, HIGH, out=out.view(torch.int32))
    else:
        torch.bitwise_left_shift(words, 16, out=out.view(torch.int32))
    return True
