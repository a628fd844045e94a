"""Routing: which tokens go to which expert, sorted by expert without asking the host, and how the experts' answers are summed in one fixed order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from moeglot.nn.grouped import SAME


@dataclass(frozen=True, eq=False)
class Routing:
    """`order` int64 [t k]: the slots (token × rank) of the tokens' experts, sorted by expert, in the tokens' order within one. `ends` int32 [e]: where each
    expert's run ends in it. Slots of other ids (`e` and above, or below 0: experts that live elsewhere) come after the last end and belong to nobody.
    """

    order: torch.Tensor
    ends: torch.Tensor
    ranks: int
    tokens: int

    @classmethod
    def of(cls, index: torch.Tensor, experts: int) -> Routing:
        """index int [t, k], local ids -> Routing."""
        narrow = torch.int16 if experts < 1 << 15 else torch.int32
        flat = index.reshape(-1).clamp(-1, experts) if index.dtype.is_signed else index.reshape(-1).clamp(max=experts)
        ids, order = torch.sort(torch.where(flat < 0, experts, flat).to(narrow), stable=True)
        every = torch.arange(experts, device=index.device, dtype=narrow)
        return cls(order, torch.searchsorted(ids, every, right=True, out_int32=True), index.shape[-1], index.shape[0])

    @property
    def is_busy(self) -> bool:
        """There are slots enough for every expert."""
        return self.order.shape[0] >= self.ends.shape[0]

    @cached_property
    def places(self) -> torch.Tensor:
        """int64 [t k]: the token of each slot in `order`."""
        return self.order // self.ranks

    def taken(self, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
        """(slots, their tokens) of a block's rows, int64 [m] each; of one expert on a CPU, if they are many, the last one again up to a multiple of SAME."""
        slots, places = self.order[block.rows], self.places[block.rows]
        missing = -block.count % SAME if block.count > SAME and len(block.experts) == 1 and slots.device.type == "cpu" else 0
        if not missing:
            return slots, places
        return torch.cat([slots, slots[-1:].expand(missing)]), torch.cat([places, places[-1:].expand(missing)])

    @cached_property
    def counted(self) -> list[int]:
        """`ends` on the host: the one place where it waits for the device."""
        found: list[int] = self.ends.tolist()
        return found

    def blocks(self, size: int) -> Iterator[Block]:
        """Runs of up to `size` experts that have tokens, each with its rows of `order`."""
        at = 0
        run = [(expert, start, end) for expert, (start, end) in enumerate(zip([0, *self.counted], self.counted, strict=False)) if end > start]
        while at < len(run):
            some = [one for one in run[at:] if one[0] < run[at][0] + size]
            at += len(some)
            first, start, last, end = some[0][0], some[0][1], some[-1][0], some[-1][2]
            yield Block(range(first, last + 1), slice(start, end), self.ends[first : last + 1] - start)


@dataclass(frozen=True, eq=False)
class Block:
    """Some experts that follow each other. `rows`: their rows of a routing's order; `ends` int32 [b]: where each one's end, counted from the first."""

    experts: range
    rows: slice
    ends: torch.Tensor

    @property
    def count(self) -> int:
        """How many rows it has."""
        return int(self.rows.stop - self.rows.start)


def adds_in_order(device: torch.device) -> bool:
    """index_add_ goes through its rows in their order there; elsewhere each slot gets a place of its own, and the sum comes after."""
    return device.type == "cpu"


class Total:
    """The sum over each token's experts, [t, width] in at least float32, without atomics: one order, whatever the machine does first."""

    def __init__(self, routing: Routing, width: int, like: torch.Tensor) -> None:
        self.routing, self.dtype = routing, like.dtype
        wide = torch.promote_types(like.dtype, torch.float32)
        self.here = adds_in_order(like.device)
        rows = routing.tokens if self.here else routing.tokens * routing.ranks
        self.values = torch.zeros(rows, width, dtype=wide if self.here else like.dtype, device=like.device)

    def add(self, rows: slice, values: torch.Tensor) -> None:
        """values [n, width] for these rows of the routing's order; more of them are ignored."""
        values = values[: rows.stop - rows.start]
        if self.here:
            self.values.index_add_(0, self.routing.places[rows], values.to(self.values.dtype))
        else:
            self.values[self.routing.order[rows]] = values  # each slot once

    def sum(self) -> torch.Tensor:
        """[t, width]."""
        if self.here:
            return self.values.to(self.dtype)
        each = self.values.view(self.routing.tokens, self.routing.ranks, -1)
        return each.sum(1, dtype=torch.promote_types(self.dtype, torch.float32)).to(self.dtype)
