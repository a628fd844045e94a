"""What runs of tokens become under a block of experts, forward and backward: products with decoded slices and with the factors of adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from moeglot.nn.grouped import is_native, outer, product, rows
from moeglot.nn.held import Held
from moeglot.nn.routing import Block

if TYPE_CHECKING:
    from moeglot.experts import Expert
    from moeglot.nn.module import Experts

TOGETHER = 128
"""Rows of the factors of a block's experts, up to which one product with all of them takes less time than one with each."""
Roles = dict[str, torch.Tensor]
Sides = tuple[torch.Tensor, list[torch.Tensor]]
"""Of experts and their factors, a [e, r, in], and for each line its part of b, turned: [e, r, out], whose columns are those of the line. Or their gradients."""


@dataclass(frozen=True, eq=False)
class Factors:
    """LoRA of some roles with one input: a [e, r, in], b [e, p out, r] for the roles in turn; the change of expert e is scale × b a.

    `dropout`: share of the inputs of `a` that are zero in this step; `seed` says which. `targets`: the roles that train; others have zeros in b.
    """

    roles: tuple[str, ...]
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    targets: tuple[str, ...]
    dropout: float = 0.0
    seed: int = 0

    def sides(self, lines: tuple[Held, ...], experts: slice, dtype: torch.dtype) -> Sides:
        """What tokens are multiplied by: a, and b scaled, turned and along the columns of the lines, of some experts."""
        roles = self.roles_of((self.b[experts].to(dtype) * self.scale).mT)
        return self.a[experts].to(dtype), [line.line.together(roles) for line in lines]

    def mask(self, block: Block, x: torch.Tensor) -> torch.Tensor | None:
        """What the inputs x [n, in] are multiplied by: the same numbers whenever it is asked for the same block."""
        if not self.dropout:
            return None
        generator = torch.Generator(x.device).manual_seed(self.seed + block.experts.start)
        kept = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32) >= self.dropout
        return kept.to(x.dtype) / (1 - self.dropout)

    def of_targets(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of b [e, p out, r] with zeros for roles that do not train."""
        if self.targets == self.roles:
            return grad
        parts = zip(self.roles, grad.chunk(len(self.roles), 1), strict=True)
        return torch.cat([part if role in self.targets else torch.zeros_like(part) for role, part in parts], 1)

    def roles_of(self, given: torch.Tensor) -> Roles:
        """[n, p out] -> role -> [n, out]."""
        return dict(zip(self.roles, given.chunk(len(self.roles), -1), strict=True))


def masked(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return x if mask is None else x * mask


@dataclass(frozen=True, eq=False)
class Stage:
    """The matrices of one input: gate and up, or down; with their biases and factors."""

    lines: tuple[Held, ...]
    biases: tuple[Held, ...]
    factors: Factors | None
    sides: Sides | None = None
    """Of all experts, where most of them will be needed."""

    def gradients(self) -> Sides | None:
        """Zeros, in the dtype of the factors."""
        if self.factors is None:
            return None
        a, b = self.factors.a, self.factors.b
        return torch.zeros_like(a), [b.new_zeros(len(a), a.shape[1], b.shape[1] // len(self.factors.roles) * len(line.line.roles)) for line in self.lines]

    def of_factors(self, found: Sides | None) -> tuple[torch.Tensor, ...]:
        """The gradients of a and b as they are kept; nothing where there are no factors."""
        if found is None or self.factors is None:
            return ()
        roles: Roles = {}
        for line, one in zip(self.lines, found[1], strict=True):
            roles |= line.line.apart(one)
        return found[0], self.factors.of_targets(torch.cat([roles[role] for role in self.factors.roles], -1).mT)


@dataclass(frozen=True, eq=False)
class Part:
    """A stage's share in a block of experts, computed in `dtype`. What is decoded or made of the factors is kept as long as this is.

    `again`: it computes backward too, so that few rows gain nothing from codes.
    What tokens are between the factors is [n, r], or where the factors of the block are taken together [n, b r], zero in the columns of other experts.
    """

    stage: Stage
    block: Block
    dtype: torch.dtype
    again: bool = False

    @cached_property
    def matrices(self) -> list[torch.Tensor]:
        """[b, in, out] of each line."""
        return [line.line.in_out(line.dense(self.block.experts, self.dtype)) for line in self.stage.lines]

    @cached_property
    def sides(self) -> Sides:
        """Of the block."""
        if self.stage.sides:
            a, lines = self.stage.sides
            return a[self.experts], [line[self.experts] for line in lines]
        assert self.stage.factors
        return self.stage.factors.sides(self.stage.lines, self.experts, self.dtype)

    @property
    def experts(self) -> slice:
        """Those of the block."""
        return slice(self.block.experts.start, self.block.experts.stop)

    def forward(self, x: torch.Tensor, low: torch.Tensor | None) -> Roles:
        """x [n, in], and what `low` makes of it -> role -> [n, out]."""
        found: Roles = {}
        for n, line in enumerate(self.stage.lines):
            out = line.times(x, self.block.experts.start) if len(self.block.experts) == 1 and not self.again else None
            if out is None:
                out = rows(x, self.matrices[n], self.block.ends)
            if low is not None:
                out += self._from_low(low, self.sides[1][n])
            found |= line.line.apart(out)
        for role, bias in self.biases():
            found[role] = found[role] + bias
        return found

    def biases(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(role, [out], or [n, out] where the rows have several experts)."""
        for role, bias in biases_of(self.stage.biases, self.block.experts, self.dtype).items():
            yield role, bias[0] if bias.shape[0] == 1 else bias[row_ids(self.block)]

    def low(self, x: torch.Tensor) -> torch.Tensor | None:
        """x [n, in] through a, without what is dropped; None where there are no factors."""
        factors = self.stage.factors
        return self._to_low(masked(x, factors.mask(self.block, x)), self.sides[0]) if factors else None

    @cached_property
    def others(self) -> torch.Tensor | None:
        """bool [n, b r]: the columns of experts that a row does not have, where the factors of the block are taken together."""
        experts, rank = self.sides[0].shape[:2]
        if experts == 1 or experts * rank > TOGETHER or is_native(self.sides[0].device, self.dtype):
            return None
        ids = row_ids(self.block)
        return (ids.unsqueeze(-1) != torch.arange(experts, device=ids.device, dtype=torch.int64)).repeat_interleave(rank, -1)

    def _to_low(self, x: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
        """x [n, in], side [b, r, in]."""
        if self.others is None:
            return rows(x, side.mT, self.block.ends)
        return product(x, side.flatten(0, 1).mT).masked_fill_(self.others, 0)

    def _from_low(self, low: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
        """side [b, r, out] -> [n, out]."""
        return rows(low, side, self.block.ends) if self.others is None else product(low, side.flatten(0, 1))

    def _outer(self, low: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """x [n, out] -> [b, r, out]."""
        if self.others is None:
            return outer(low, x, self.block.ends)
        return outer(low, x, self.block.ends[-1:]).view(len(self.block.experts), -1, x.shape[-1])

    def backward(self, given: Roles, x: torch.Tensor, low: torch.Tensor | None, into: Sides | None, weights: torch.Tensor | None = None) -> torch.Tensor:
        """role -> [n, out] of the gradient, to [n, in]. `into` gets the gradients of the factors, for rows that count `weights` [n, 1] times."""
        lines = [line.line.together(given) for line in self.stage.lines]
        found = self.through(lines)
        if low is not None and self.stage.factors:
            assert into
            mask, back = self.stage.factors.mask(self.block, x), self.through_b(lines)
            found += masked(self.through_a(back), mask)
            if weights is not None:
                low, back = low * weights, back * weights
            self.grad_factors(masked(x, mask), lines, low, back, into)
        return found

    def through(self, lines: list[torch.Tensor]) -> torch.Tensor:
        """[n, out] for each line -> [n, in] through the matrices alone."""
        return _sum([rows(one, matrix.mT, self.block.ends) for one, matrix in zip(lines, self.matrices, strict=True)])

    def through_b(self, lines: list[torch.Tensor]) -> torch.Tensor:
        """[n, out] for each line, to between the factors, scaled."""
        return _sum([self._to_low(one, side) for one, side in zip(lines, self.sides[1], strict=True)])

    def through_a(self, back: torch.Tensor) -> torch.Tensor:
        """From between the factors -> [n, in]."""
        return self._from_low(back, self.sides[0])

    def grad_factors(self, x: torch.Tensor, lines: list[torch.Tensor], low: torch.Tensor, back: torch.Tensor, into: Sides) -> None:
        """The gradients of a and b on this block; `low` is what `a` made of x [n, in], `back` the gradient of that."""
        assert self.stage.factors
        into[0][self.experts] = self._outer(back, x)
        scaled = low * self.stage.factors.scale
        for found, one in zip(into[1], lines, strict=True):
            found[self.experts] = self._outer(scaled, one)


def _sum(given: list[torch.Tensor]) -> torch.Tensor:
    return given[0] if len(given) == 1 else torch.stack(given).sum(0)


def biases_of(lines: tuple[Held, ...], experts: range, dtype: torch.dtype) -> Roles:
    """role without `_bias` -> [b, out]."""
    found: Roles = {}
    for line in lines:
        found |= {role.removesuffix("_bias"): bias for role, bias in line.line.apart(line.dense(experts, dtype)).items()}
    return found


def again(expert: Expert, found: Roles) -> tuple[Roles, torch.Tensor]:
    """What gate and up gave, as leaves of a graph of its own, and the activation of it: what backward goes through."""
    given = {role: one.detach().requires_grad_() for role, one in found.items()}
    with torch.enable_grad():
        return given, expert.activate(given)


def row_ids(block: Block) -> torch.Tensor:
    """int64 [n]: which of the block's experts each row has, from 0."""
    places = torch.arange(block.count, device=block.ends.device, dtype=torch.int32)
    return torch.searchsorted(block.ends, places, right=True)


def stages(module: Experts, seed: int | None = None, whole: torch.dtype | None = None, given: Sequence[torch.Tensor] | None = None) -> tuple[Stage, Stage]:
    """(gate and up, down) of a module. `seed`: of this step's dropout, None for none. `whole`: the dtype in which the factors of all experts are prepared.
    `given`: the factors of this step, as `Experts.trained` has them; by default those that the module has now.
    """

    def stage(place: str) -> Stage:
        roles = module.places[place][0]
        lines = tuple(line for line in module.lines if set(line.line.roles) & set(roles))
        biases = tuple(line for line in module.lines if set(line.line.roles) & {f"{role}_bias" for role in roles})
        factors = module.factors(place, seed, given)
        return Stage(lines, biases, factors, factors.sides(lines, slice(None), whole) if factors and whole else None)

    return stage("first"), stage("down")
