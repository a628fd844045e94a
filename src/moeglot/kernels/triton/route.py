"""Which rows belong to which expert, for few tokens: one kernel where a sort takes a dozen, each as long as its launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moeglot.kernels.triton.launch import beside, check, jit

MOST = 1024
"""Slots up to which each is compared with every other."""
SLOTS, OTHERS = 64, 128
"""Of a program, or experts; and compared with them at a time."""


def route(index: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """index int [t, k], local ids -> order int64 [t k], starts and ends int32 [e]: what `moeglot.nn.routing.Routing.of` gives, and where each run starts."""
    check(index.device)
    ids = index.reshape(-1)
    order = torch.empty(len(ids), dtype=torch.int64, device=ids.device)
    starts, ends = torch.empty(2, experts, dtype=torch.int32, device=ids.device)
    grid = (triton.cdiv(len(ids), SLOTS) + triton.cdiv(experts, SLOTS),)
    with beside(ids):
        _route[grid](ids, order, starts, ends, len(ids), experts, SLOTS=SLOTS, OTHERS=OTHERS, num_warps=4)
    return order, starts, ends


@jit
def _locals(ids: tl.tensor, slots: tl.tensor, count: int, experts: int) -> tl.tensor:
    """The experts of some slots; `experts` for nobody's, and more for those that are not there."""
    found = tl.load(ids + slots, mask=slots < count, other=0)
    found = tl.where((found >= 0) & (found < experts), found, experts).to(tl.int32)
    return tl.where(slots < count, found, experts + 1)


@jit
def _route(ids: tl.tensor, order: tl.tensor, starts: tl.tensor, ends: tl.tensor, count: int, experts: int, SLOTS: tl.constexpr, OTHERS: tl.constexpr) -> None:
    """A slot's place is how many slots have a lower id, or the same and come before it; programs after those of the slots count for the experts."""
    first = tl.program_id(0) * SLOTS
    past = tl.cdiv(count, SLOTS) * SLOTS
    below, equal = tl.zeros([SLOTS], tl.int32), tl.zeros([SLOTS], tl.int32)
    if first < past:
        slots = first + tl.arange(0, SLOTS)
        mine = _locals(ids, slots, count, experts)
        for at in range(0, count, OTHERS):
            others = at + tl.arange(0, OTHERS)
            theirs = _locals(ids, others, count, experts)[None, :]
            before = (theirs < mine[:, None]) | ((theirs == mine[:, None]) & (others[None, :] < slots[:, None]))
            below += tl.sum(before.to(tl.int32), 1)
        tl.store(order + below, slots.to(tl.int64), mask=slots < count)
    else:
        mine = first - past + tl.arange(0, SLOTS)
        for at in range(0, count, OTHERS):
            theirs = _locals(ids, at + tl.arange(0, OTHERS), count, experts)[None, :]
            below += tl.sum((theirs < mine[:, None]).to(tl.int32), 1)
            equal += tl.sum((theirs == mine[:, None]).to(tl.int32), 1)
        tl.store(starts + mine, below, mask=mine < experts)
        tl.store(ends + mine, below + equal, mask=mine < experts)
