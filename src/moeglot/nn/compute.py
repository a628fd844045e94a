"""What runs of tokens become under a block of experts, forward and backward: products with decoded slices and with the factors of adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moeglot.nn.grouped import outer, rows
from moeglot.nn.held import Held
from moeglot.nn.routing import Block

if TYPE_CHECKING:
    from moeglot.nn.module import Experts

Roles = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Factors:
    """LoRA of some roles with one input: a [e, r, in], b [e, p out, r] for the roles in turn; the change of expert e is scale × b a.

    `dropout`: share of the inputs of `a` that are zero in this step; `seed` says which.
    """

    roles: tuple[str, ...]
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    dropout: float = 0.0
    seed: int = 0

    def of(self, block: Block, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """a [b, r, in], b [b, p out, r]."""
        experts = slice(block.experts.start, block.experts.stop)
        return self.a[experts].to(dtype), self.b[experts].to(dtype)

    def mask(self, block: Block, x: torch.Tensor) -> torch.Tensor | None:
        """What the inputs x [n, in] are multiplied by: the same numbers whenever it is asked for the same block."""
        if not self.dropout:
            return None
        generator = torch.Generator(x.device).manual_seed(self.seed + block.experts.start)
        kept = torch.rand(x.shape, generator=generator, device=x.device) >= self.dropout
        return kept.to(x.dtype) / (1 - self.dropout)

    def roles_of(self, given: torch.Tensor) -> Roles:
        """[n, p out] -> role -> [n, out]."""
        return dict(zip(self.roles, given.chunk(len(self.roles), -1), strict=True))


def masked(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return x if mask is None else x * mask


@dataclass(frozen=True, eq=False)
class Stage:
    """The matrices of one input: gate and up, or down; with their biases and factors. `ids` int64 [n]: each row's expert."""

    lines: tuple[Held, ...]
    biases: tuple[Held, ...]
    factors: Factors | None

    def forward(self, x: torch.Tensor, block: Block, ids: torch.Tensor) -> Roles:
        """x [n, in] -> role -> [n, out]."""
        found: Roles = {}
        for line in self.lines:
            product = line.times(x, block.experts.start) if len(block.experts) == 1 else None
            if product is None:
                product = rows(x, line.line.in_out(line.dense(block.experts, x.dtype)), block.ends)
            found |= line.line.apart(product)
        for role, bias in biases_of(self.biases, block.experts, x.dtype).items():
            found[role] = found[role] + (bias[0] if len(bias) == 1 else bias[ids - block.experts.start])
        if self.factors:
            a, b = self.factors.of(block, x.dtype)
            low = rows(masked(x, self.factors.mask(block, x)), a.mT, block.ends)
            for role, change in self.factors.roles_of(rows(low, b.mT, block.ends)).items():
                found[role] = found[role] + self.factors.scale * change
        return found

    def backward(self, given: Roles, block: Block) -> torch.Tensor:
        """role -> [n, out] of the gradient, to [n, in] through the matrices alone."""
        found = [
            rows(line.line.together(given), line.line.in_out(line.dense(block.experts, next(iter(given.values())).dtype)).mT, block.ends) for line in self.lines
        ]
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)

    def low(self, given: Roles, block: Block) -> torch.Tensor:
        """role -> [n, out] of the gradient, to [n, r] through b, scaled."""
        assert self.factors
        together = torch.cat([given[role] for role in self.factors.roles], -1)
        return rows(together, self.factors.of(block, together.dtype)[1], block.ends) * self.factors.scale

    def through_a(self, low: torch.Tensor, block: Block) -> torch.Tensor:
        """[n, r] -> [n, in] through a."""
        assert self.factors
        return rows(low, self.factors.of(block, low.dtype)[0], block.ends)

    def grad_factors(self, x: torch.Tensor, given: Roles, low: torch.Tensor, block: Block, into: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Adds the gradients of a and b on this block; x [n, in] is what `a` multiplied, `low` [n, r] the gradient of that product."""
        assert self.factors
        a, _ = self.factors.of(block, x.dtype)
        experts = slice(block.experts.start, block.experts.stop)
        together = torch.cat([given[role] for role in self.factors.roles], -1)
        into[0][experts] += outer(low, x, block.ends)
        into[1][experts] += outer(together, rows(x, a.mT, block.ends), block.ends) * self.factors.scale


def biases_of(lines: tuple[Held, ...], experts: range, dtype: torch.dtype) -> Roles:
    """role without `_bias` -> [b, out]."""
    found: Roles = {}
    for line in lines:
        found |= {role.removesuffix("_bias"): bias for role, bias in line.line.apart(line.dense(experts, dtype)).items()}
    return found


def row_ids(block: Block, like: torch.Tensor) -> torch.Tensor:
    """int64 [n]: each row's expert."""
    if len(block.experts) == 1:
        return torch.full((len(like),), block.experts.start, device=like.device)
    places = torch.arange(len(like), device=like.device, dtype=torch.int32)
    return torch.searchsorted(block.ends, places, right=True) + block.experts.start


def stages(module: Experts, seed: int | None = None) -> tuple[Stage, Stage]:
    """(gate and up, down) of a module; `seed`: of this step's dropout, None for none."""

    def stage(roles: tuple[str, ...]) -> Stage:
        lines = tuple(line for line in module.lines if set(line.line.roles) & set(roles))
        biases = tuple(line for line in module.lines if set(line.line.roles) & {f"{role}_bias" for role in roles})
        return Stage(lines, biases, module.factors(roles, seed))

    return stage(module.expert.first), stage(("down",))
