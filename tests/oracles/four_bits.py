"""bitsandbytes' own decoding of 4-bit codes, on every processor: with AVX512, its kernel goes wrong where rows are no whole number of blocks."""

from __future__ import annotations

import copy
from typing import Any

import torch


def dequantize(codes: torch.Tensor, state: Any) -> torch.Tensor:
    """The same numbers as one row, filled up to whole blocks, which all of its kernels decode rightly; odd widths have a way of their own there."""
    from bitsandbytes.functional import dequantize_4bit

    shape, count = tuple(state.shape), state.shape.numel()
    if shape[-1] % 2:
        return dequantize_4bit(codes, state)
    whole = -(-count // state.blocksize) * state.blocksize
    as_row = copy.copy(state)
    as_row.shape = torch.Size((1, whole))
    filled = torch.nn.functional.pad(codes.view(torch.uint8).flatten(), (0, whole // 2 - codes.numel())).view(-1, 1)
    return dequantize_4bit(filled, as_row).flatten()[:count].view(shape)
