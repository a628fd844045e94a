"""Whether two tensors hold the same bits, the sign of zero and the payload of NaN included, however they lie in memory."""

from __future__ import annotations

import torch

from moeglot.kernels import backend

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Of one dtype, one shape, one content."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    x, y = a.view(INTEGERS[a.element_size()]), b.view(INTEGERS[b.element_size()])
    if x.dim() == 2 and x.numel() and x.element_size() in (2, 4) and not (x.is_contiguous() and y.is_contiguous()):
        if y.stride(1) != 1:
            x, y = y, x
        if y.stride(1) == 1 and (fast := backend.compiled("bits", x, y)):
            return bool(fast.same(x, y))
    return torch.equal(x.contiguous(), y.contiguous())
