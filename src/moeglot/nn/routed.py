"""The experts of a layer as one step of autograd: it keeps the packed weights, the routing and the unsorted tokens, and decodes again in backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moeglot.nn.backends import block_size
from moeglot.nn.compute import Roles, Stage, masked, row_ids, stages
from moeglot.nn.routing import Block, Routing, Total

if TYPE_CHECKING:
    from moeglot.nn.module import Experts

Grads = tuple[torch.Tensor, torch.Tensor]


class Routed(torch.autograd.Function):
    """(module, one expert at a time, seed of dropout, hidden [t, h], index [t, k], weights [t, k], *factors) -> [t, h].

    Nothing dense is kept: no decoded matrix, no change, no sorted copy of the tokens. The factors are those of gate and up, then those of down.
    """

    @staticmethod
    def forward(
        ctx: Any, module: Experts, alone: bool, seed: int | None, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, *factors: torch.Tensor
    ) -> torch.Tensor:
        routing = Routing.of(index, module.num_experts)
        ctx.module, ctx.seed, ctx.ranks = module, seed, routing.ranks
        ctx.size = 1 if alone else block_size(module, hidden.dtype)
        ctx.save_for_backward(hidden, weights, routing.order, routing.ends, *factors)
        first, down = stages(module, seed)
        total, flat = Total(routing, hidden.shape[-1], hidden), weights.reshape(-1)
        for block in routing.blocks(ctx.size):
            slots = routing.order[block.rows]
            x = hidden[slots // routing.ranks]
            ids = row_ids(block, x)
            out = down.forward(module.expert.activate(first.forward(x, block, ids)), block, ids)["down"]
            total.add(block.rows, out * flat[slots].unsqueeze(-1).to(out.dtype))
        return total.sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        hidden, weights, order, ends, *factors = ctx.saved_tensors
        routing = Routing(order, ends, ctx.ranks, len(hidden))
        first, down = stages(ctx.module, ctx.seed)
        total = Total(routing, hidden.shape[-1], hidden) if ctx.needs_input_grad[3] else None
        d_weights, found = torch.zeros(weights.numel(), dtype=weights.dtype, device=weights.device), [torch.zeros_like(factor) for factor in factors]
        pairs = iter(zip(found[::2], found[1::2], strict=True))
        of_first, of_down = (next(pairs) if stage.factors else None for stage in (first, down))
        for block in routing.blocks(ctx.size):
            slots = order[block.rows]
            w = weights.reshape(-1)[slots].unsqueeze(-1).to(hidden.dtype)
            x, grad = hidden[slots // ctx.ranks], grads[0][slots // ctx.ranks]
            given, inner, leaves = _again(ctx.module, first, x, block)
            d_inner, for_weights = _through_down(down, inner, grad, w, block, of_down)
            d_weights[slots] = for_weights.to(weights.dtype)
            d_given = dict(zip(given, torch.autograd.grad(inner, leaves, d_inner), strict=True))
            d_x = _through_first(first, x, d_given, block, of_first)
            if total is not None:
                total.add(block.rows, d_x)
        d_hidden = total.sum() if total is not None else None
        return (None, None, None, d_hidden, None, d_weights.view(weights.shape) if ctx.needs_input_grad[5] else None, *found)


def _again(module: Experts, first: Stage, x: torch.Tensor, block: Block) -> tuple[Roles, torch.Tensor, list[torch.Tensor]]:
    """What gate and up gave, as leaves of a graph of its own, and the activation of it."""
    given = {role: one.detach().requires_grad_() for role, one in first.forward(x, block, row_ids(block, x)).items()}
    with torch.enable_grad():
        inner = module.expert.activate(given)
    return given, inner, list(given.values())


def _through_down(down: Stage, inner: torch.Tensor, grad: torch.Tensor, w: torch.Tensor, block: Block, into: Grads | None) -> tuple[torch.Tensor, torch.Tensor]:
    """grad [n, h] of the weighted sum -> that of inner [n, i], and of the weights [n]: <grad, out> without computing out again."""
    inner = inner.detach()
    back = down.backward({"down": grad}, block)
    for_weights, d_inner = (back * inner).sum(-1), w * back
    for bias in down.biases:
        vectors = bias.dense(block.experts, grad.dtype)
        each = vectors[0] if len(vectors) == 1 else vectors[row_ids(block, grad) - block.experts.start]
        for_weights = for_weights + (grad * each).sum(-1)
    if down.factors:
        assert into
        mask = down.factors.mask(block, inner)
        dropped, low = masked(inner, mask), down.low({"down": grad}, block)
        change = down.through_a(low, block)
        for_weights = for_weights + (change * dropped).sum(-1)
        d_inner = d_inner + w * masked(change, mask)
        down.grad_factors(dropped, {"down": w * grad}, w * low, block, into)
    return d_inner, for_weights


def _through_first(first: Stage, x: torch.Tensor, given: Roles, block: Block, into: Grads | None) -> torch.Tensor:
    """role -> [n, i] of the gradient, to that of x [n, h]."""
    d_x = first.backward(given, block)
    if first.factors:
        assert into
        mask, low = first.factors.mask(block, x), first.low(given, block)
        d_x = d_x + masked(first.through_a(low, block), mask)
        first.grad_factors(masked(x, mask), given, low, block, into)
    return d_x
