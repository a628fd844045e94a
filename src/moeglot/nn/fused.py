"""The experts of a layer on a GPU without waiting for it: products with codes as they lie, gathered and scattered in the kernels, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from moeglot.kernels.triton import between, gemm, route
from moeglot.kernels.triton.gemm import Change, Matrices, Rows
from moeglot.kernels.triton.outer import outer
from moeglot.nn import coded
from moeglot.nn.compute import Factors, Roles, Stage, again, biases_of, masked, stages
from moeglot.nn.held import Held
from moeglot.nn.routing import Block, Routing

if TYPE_CHECKING:
    from moeglot.nn.module import Experts


def plain(tensor: torch.Tensor) -> Matrices:
    """[e, rows, columns] of any strides."""
    experts, height, width = tensor.shape
    return Matrices(gemm.PLAIN, tensor, None, (experts, height, width))


@dataclass(frozen=True, eq=False)
class Step:
    """One step over all experts: rows in the order of the routing, `hidden` [t, h] in that of the tokens."""

    rows: Rows
    block: Block
    tokens: int

    @classmethod
    def of(cls, index: torch.Tensor, experts: int) -> Step:
        """index int [t, k], local ids."""
        if 0 < index.numel() <= route.MOST:
            order, starts, ends = route.route(index, experts)
            rows = Rows(starts, ends, order, index.shape[-1])
        else:
            routing = Routing.of(index, experts)
            rows = Rows.of(routing.ends, routing.order, routing.ranks)
        return cls(rows, Block(range(experts), slice(0, index.numel()), rows.ends), index.shape[0])

    def summed(self, slots: torch.Tensor) -> torch.Tensor:
        """[t k, h], each slot in its place -> [t, h], summed in float32."""
        return between.summed(slots, self.tokens)

    def gathered(self, hidden: torch.Tensor) -> torch.Tensor:
        """[t, h] -> [n, h]."""
        return hidden[self.rows.order // self.rows.ranks]

    def low(self, factors: Factors, x: torch.Tensor, gather: bool) -> torch.Tensor:
        """x [n, in], or [t, in] to gather, to [n, r] through `a`, not scaled; what is dropped is left out."""
        if factors.dropout:
            x, gather = self.gathered(x) if gather else x, False
            x = masked(x, factors.mask(self.block, x))
        return gemm.product(x, plain(factors.a.to(x.dtype)), self.rows, True, gather=gather)

    def forward(self, stage: Stage, x: torch.Tensor, gather: bool = False, scatter: bool = False, weights: torch.Tensor | None = None) -> Roles:
        """x [n, in], or [t, in] to gather -> role -> [n, out], or in the slots' places."""
        low = side = None
        if stage.factors:
            low = self.low(stage.factors, x, gather) * stage.factors.scale
            side = stage.factors.roles_of(stage.factors.b.to(x.dtype).mT)
        found: Roles = {}
        for line in stage.lines:
            bias = self._bias(stage, line, x.dtype)
            change = Change(low, line.line.together(side)) if low is not None and side is not None else None
            out = coded.product(line, x, self.rows, False, gather=gather, scatter=scatter, bias=bias, change=change, weights=weights)
            found |= line.line.apart(out)
        return found

    def _bias(self, stage: Stage, line: Held, dtype: torch.dtype) -> torch.Tensor | None:
        """[e, out], as the line's rows lie: the bias that is stored beside it, where that lies as they do."""
        for beside in stage.biases:
            if beside.line.roles == tuple(f"{role}_bias" for role in line.line.roles) and beside.line.out_group == line.line.out_group:
                return beside.dense(self.block.experts, dtype)
        biases = biases_of(stage.biases, self.block.experts, dtype)
        return line.line.together(biases).contiguous() if biases else None

    def backward(self, stage: Stage, given: Roles, low: torch.Tensor | None, gather: bool = False, scatter: bool = False) -> torch.Tensor:
        """role -> [n, out] of the gradient, to [n, in]. `low` [n, r]: the gradient of what `a` gives, if what follows `a` is to be added."""
        change = Change(low, stage.factors.a.to(low.dtype)) if low is not None and stage.factors else None
        found = None
        for line in stage.lines:
            part = coded.product(line, line.line.together(given).contiguous(), self.rows, True, gather=gather, scatter=scatter, change=change)
            found, change = part if found is None else found + part, None
        assert found is not None
        return found

    def through_b(self, factors: Factors, given: torch.Tensor, gather: bool = False) -> torch.Tensor:
        """[n, p out] of the gradient to [n, r], scaled."""
        return gemm.product(given, plain(factors.b.to(given.dtype)), self.rows, False, gather=gather) * factors.scale


def forward(
    module: Experts,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    seed: int | None = None,
    factors: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """hidden [t, h], index int [t, k], weights [t, k] -> [t, h]; nothing waits for the device."""
    step = Step.of(index, module.num_experts)
    first, down = stages(module, seed, given=factors)
    flat, expert = weights.reshape(-1), module.expert
    given = step.forward(first, hidden.contiguous(), gather=True)
    inner = between.activated(expert.kind, expert.function, expert.numbers, given)
    if inner is None:
        inner = expert.activate(given).contiguous()
    if module.post_expert_norm is None:
        return step.summed(step.forward(down, inner, scatter=True, weights=flat)["down"])
    out = module.after(step.forward(down, inner, scatter=True)["down"])
    here = ((index >= 0) & (index < module.num_experts)).reshape(-1, 1)
    return step.summed(torch.where(here, out * flat.unsqueeze(-1).to(out.dtype), 0))


class Fused(torch.autograd.Function):
    """(module, seed of dropout, hidden [t, h], index [t, k], weights [t, k], *factors) -> [t, h]; keeps what `moeglot.nn.routed.Routed` keeps."""

    @staticmethod
    def forward(ctx: Any, module: Experts, seed: int | None, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, *factors: torch.Tensor) -> Any:
        ctx.module, ctx.seed = module, seed
        ctx.save_for_backward(hidden, index, weights, *factors)
        return forward(module, hidden, index, weights, seed, factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        hidden, index, weights, *factors = ctx.saved_tensors
        step = Step.of(index, ctx.module.num_experts)
        first, down = stages(ctx.module, ctx.seed, given=factors)
        hidden, grad = hidden.contiguous(), grads[0].to(hidden.dtype).contiguous()
        given, inner = again(ctx.module.expert, step.forward(first, hidden, gather=True))
        w = weights.reshape(-1)[step.rows.order].unsqueeze(-1).to(hidden.dtype)
        d_inner, for_weights, of_down = _through_down(step, down, inner.detach(), grad, w)
        d_given = dict(zip(given, torch.autograd.grad(inner, list(given.values()), d_inner), strict=True))
        d_hidden, of_first = _through_first(step, first, hidden, d_given)
        d_weights = torch.empty(weights.numel(), dtype=weights.dtype, device=weights.device)
        d_weights[step.rows.order] = for_weights.to(weights.dtype)
        of_factors = [found.to(factor.dtype) for found, factor in zip((*of_first, *of_down), factors, strict=True)]
        needs = ctx.needs_input_grad
        return (None, None, d_hidden if needs[2] else None, None, d_weights.view(weights.shape) if needs[4] else None, *of_factors)


def _through_down(
    step: Step, down: Stage, inner: torch.Tensor, grad: torch.Tensor, w: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """grad [t, h] of the weighted sum -> that of inner [n, i], of the weights [n]: <grad, out> without computing out again; and of the factors."""
    inner, factors = inner.contiguous(), down.factors
    back = step.backward(down, {"down": grad}, None, gather=True)
    found: tuple[torch.Tensor, ...] = ()
    if factors:
        mask = factors.mask(step.block, inner)
        low = step.through_b(factors, grad, gather=True)
        back = back + masked(gemm.product(low, plain(factors.a.to(low.dtype)), step.rows, False), mask)
        given = step.low(factors, inner, False) * factors.scale
        found = outer(low * w, masked(inner, mask), step.rows), outer(given * w, grad, step.rows, gather=True).mT
    for_weights = (back * inner).sum(-1)
    for bias in biases_of(down.biases, step.block.experts, grad.dtype).values():
        for_weights = for_weights + gemm.product(grad, plain(bias.unsqueeze(1)), step.rows, True, gather=True).squeeze(-1)
    return w * back, for_weights, found


def _through_first(step: Step, first: Stage, hidden: torch.Tensor, given: Roles) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """role -> [n, i] of the gradient, to that of hidden [t, h] and of the factors."""
    factors = first.factors
    if not factors:
        return step.summed(step.backward(first, given, None, scatter=True)), ()
    together = torch.cat([given[role] for role in factors.roles], -1)
    low = step.through_b(factors, together)
    x = step.gathered(hidden) if factors.dropout else None
    mask = factors.mask(step.block, x) if x is not None else None
    of_a = outer(low, masked(x, mask), step.rows) if x is not None else outer(low, hidden, step.rows, gather=True)
    of_b = factors.of_targets(outer(step.low(factors, hidden, True) * factors.scale, together, step.rows).mT)
    d_hidden = step.summed(step.backward(first, given, low if mask is None else None, scatter=True))
    if mask is not None:
        change = masked(gemm.product(low, plain(factors.a.to(low.dtype)), step.rows, False), mask)
        d_hidden = d_hidden + step.summed(torch.empty_like(change).index_copy_(0, step.rows.order, change))
    return d_hidden, (of_a, of_b)
