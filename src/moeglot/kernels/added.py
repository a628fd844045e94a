"""A change of low rank added to MXFP4, some rows at a time: the nearest codes under the scales that are there, and what of the change is left in them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from moeglot import scratch
from moeglot.kernels import backend, e2m1
from moeglot.kernels.mxfp4 import BIAS, GROUP, LAST_FINITE, exponents, powers
from moeglot.survival import Survival

NUMBERS = 1 << 18
"""At a time: enough that what torch does for each call is little, and few enough that numbers, the change and the sums stay near each other."""
Added = tuple[torch.Tensor, torch.Tensor, Survival]
ONES = 0x1111111111111111
"""The lowest bit of each code in eight bytes."""
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
    total, runs = Survival(), _runs(*scale.shape) if scale.numel() else []
    room = _Room.of(runs[0].stop, scale.shape[1]) if runs else None
    for some in runs:
        assert room
        torch.mm(left[some], right, out=(here := room.cut(some.stop - some.start)).change)
        codes = packed[some].clone(memory_format=torch.contiguous_format)  # they may lie at any byte, and are taken eight at a time
        block = _block(codes, scale[some].contiguous(), here, ties)
        if block is None:
            return None
        to[some], to_scale[some] = block[:2]
        total += block[2]
    return to, to_scale, total


class _Room(NamedTuple):
    """Memory for a run of rows, used again for each: new memory costs as much as what is done in it. float32 [rows, 32 n], int32 [rows, 16 n]."""

    weight: torch.Tensor
    change: torch.Tensor
    total: torch.Tensor
    words: torch.Tensor

    @classmethod
    def of(cls, rows: int, groups: int) -> _Room:
        weight, change, total = torch.empty(3, rows, groups * GROUP, dtype=torch.float32, device="cpu")
        return cls(weight, change, total, torch.empty(rows, groups * GROUP // 2, dtype=torch.int32, device="cpu"))

    def cut(self, rows: int) -> _Room:
        return _Room(self.weight[:rows], self.change[:rows], self.total[:rows], self.words[:rows])


def _runs(rows: int, groups: int) -> list[slice]:
    step = max(1, NUMBERS // max(1, groups * GROUP))
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def _block(packed: torch.Tensor, scale: torch.Tensor, room: _Room, ties: str) -> Added | None:
    """As `added`, of a few rows and their change."""
    weight, change, total = (one.view(*scale.shape, GROUP) for one in room[:3])
    by, clipped, fresh = powers(scale).unsqueeze(-1), 0, None
    _numbers(packed, by, room.words, weight)
    low, high = torch.add(weight, change, out=total).mul_(_reciprocal(scale)).aminmax()
    if not -REACH <= float(low) <= float(high) <= REACH:
        exact = weight + change
        amax = torch.maximum(exact.amax(-1), -exact.amin(-1))
        if not bool((amax < torch.inf).all()):
            return None
        beyond, clipped = amax.unsqueeze(-1) > REACH * by, int((exact.abs() > REACH * by).sum())
        scale, fresh = torch.where(beyond.squeeze(-1), exponents(amax, "ceil").add_(BIAS).to(torch.uint8), scale), beyond
        by = powers(scale).unsqueeze(-1)
        torch.mul(exact, _reciprocal(scale), out=total)
    found = e2m1.packed(e2m1.nearest(total, ties))
    _numbers(found, by, room.words, total)
    return _signs_kept(found, packed, fresh), scale, Survival.of(weight, change, total, clipped)


def _reciprocal(scale: torch.Tensor) -> torch.Tensor:
    """scale u8 [rows, n] -> what a group's numbers are multiplied by to be in units of it, [rows, n, 1]."""
    return powers(2 * BIAS - scale.int()).unsqueeze(-1)


def _numbers(packed: torch.Tensor, by: torch.Tensor, words: torch.Tensor, out: torch.Tensor) -> None:
    """Codes u8 [rows, n, 16], two a byte, and what multiplies each group [rows, n, 1] -> out [rows, n, 32]; `words` has room for a word a byte."""
    e2m1.look_up(words.copy_(packed.view(words.shape)), out).mul_(by)


def _signs_kept(found: torch.Tensor, before: torch.Tensor, fresh: torch.Tensor | None) -> torch.Tensor:
    """Codes u8 [rows, n, 16], two a byte: what was zero and is zero keeps its sign, but for groups [rows, n, 1] under a `fresh` scale."""
    now, was = found.view(torch.int64), before.view(torch.int64)
    low = (now | was).bitwise_and_(0x7777777777777777)
    other = (low >> 1).bitwise_or_(low).bitwise_or_(low >> 2).bitwise_and_(ONES)  # one bit for each code that is no zero, before or now
    keep = other.bitwise_xor_(ONES).bitwise_left_shift_(3)
    keep = keep if fresh is None else keep.masked_fill_(fresh, 0)
    return keep.bitwise_and_(now ^ was).bitwise_xor_(now).view(torch.uint8)
