"""A change of low rank added to MXFP4, some rows at a time: the nearest codes under the scales that are there, and what of the change is left in them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moeglot import scratch
from moeglot.kernels import backend, e2m1
from moeglot.kernels.mxfp4 import BIAS, GROUP, LAST_FINITE, exponents, powers
from moeglot.survival import Survival

NUMBERS = 1 << 18
"""At a time: enough that what torch does for each call is little, and few enough that numbers, the change and the sums stay near each other."""
Added = tuple[torch.Tensor, torch.Tensor, Survival]
REACH = 7.0
"""In units of a scale: above, a next level that the codes lack would be nearer."""


def added(packed: torch.Tensor, scale: torch.Tensor, left: torch.Tensor, right: torch.Tensor, ties: str) -> Added | None:
    """packed u8 [rows, n, 16], scale u8 [rows, n], left float32 [rows, r], right float32 [r, 32 n] -> packed and scale of the sum, and what is left of it.

    A group with a sum beyond its scale gets the smallest that nothing overflows. Numbers that stay keep their codes. None where some number is not finite.
    """
    if scale.numel() and int(scale.max()) > LAST_FINITE:
        return None
    left, right = left.contiguous(), right.contiguous()
    to, to_scale = scratch.empty(tuple(packed.shape), torch.uint8), torch.empty(scale.shape, dtype=torch.uint8, device="cpu")
    if fast := backend.compiled("added", packed):
        found = fast.added(packed, scale, left, right, ties, to, to_scale)
        return None if found is None else (to, to_scale, Survival(*found))
    total = Survival()
    for some in _runs(*scale.shape):
        block = _block(packed[some].contiguous(), scale[some].contiguous(), left[some] @ right, ties)
        if block is None:
            return None
        to[some], to_scale[some] = block[:2]
        total += block[2]
    return to, to_scale, total


def _runs(rows: int, groups: int) -> Iterator[slice]:
    step = max(1, NUMBERS // max(1, groups * GROUP))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _block(packed: torch.Tensor, scale: torch.Tensor, change: torch.Tensor, ties: str) -> Added | None:
    """As `added`, of a few rows and their change [rows, 32 n]."""
    by, grouped = powers(scale).unsqueeze(-1), (*scale.shape, GROUP)
    weight = e2m1.unpack(packed.view(-1, GROUP // 2), torch.empty(scale.numel(), GROUP, dtype=torch.float32, device="cpu")).view(grouped).mul_(by)
    total = weight + change.view(grouped)
    amax = torch.maximum(total.amax(-1), -total.amin(-1))
    beyond, clipped, fresh = amax > REACH * by.squeeze(-1), 0, None
    if not bool((amax < torch.inf).all()):
        return None
    if bool(beyond.any()):
        clipped = int((total.abs() > REACH * by).sum())
        scale, fresh = torch.where(beyond, exponents(amax, "ceil").add_(BIAS).to(torch.uint8), scale), beyond.unsqueeze(-1)
        by = powers(scale).unsqueeze(-1)
    found = e2m1.packed(e2m1.nearest(total.mul_(powers(2 * BIAS - scale.int()).unsqueeze(-1)), ties))
    after = e2m1.unpack(found.view(-1, GROUP // 2), total.view(-1, GROUP)).view(grouped).mul_(by)
    return _signs_kept(found, packed, fresh), scale, Survival.of(weight, change.view(grouped), after, clipped)


def _signs_kept(found: torch.Tensor, before: torch.Tensor, fresh: torch.Tensor | None) -> torch.Tensor:
    """Codes u8 [rows, n, 16], two a byte: what was zero and is zero keeps its sign, but for groups [rows, n, 1] under a `fresh` scale."""
    low = (found | before).bitwise_and_(0x77)
    other = (low | low >> 1 | low >> 2).bitwise_and_(0x11)  # one bit for each code that is no zero, before or now
    keep = other.bitwise_xor_(0x11) << 3
    keep = keep if fresh is None else keep.masked_fill_(fresh, 0)
    return found ^ (keep & (found ^ before))
