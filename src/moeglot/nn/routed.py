"""The experts of a layer as one step of autograd: it keeps the packed weights, the routing and the unsorted tokens, and decodes again in backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from moeglot.nn.backends import block_size, in_blocks
from moeglot.nn.compute import Part, Sides, again, stages
from moeglot.nn.routing import Routing, Total

if TYPE_CHECKING:
    from moeglot.nn.module import Experts


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
        ctx.size = 1 if alone else block_size(module, hidden, index)
        ctx.save_for_backward(hidden, weights, routing.order, routing.ends, *factors)
        of = stages(module, seed, hidden.dtype if routing.is_busy else None, factors)
        return in_blocks(module, of, routing, hidden, weights, ctx.size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        hidden, weights, order, ends, *factors = ctx.saved_tensors
        routing = Routing(order, ends, ctx.ranks, len(hidden))
        first, down = stages(ctx.module, ctx.seed, hidden.dtype if routing.is_busy else None, factors)
        total = Total(routing, hidden.shape[-1], hidden) if ctx.needs_input_grad[3] else None
        d_weights = torch.zeros(weights.numel(), dtype=weights.dtype, device=weights.device)
        of_first, of_down = first.gradients(), down.gradients()
        for block in routing.blocks(ctx.size):
            slots, places = routing.taken(block)
            one = Part(first, block, hidden.dtype, again=True)
            x = hidden[places]
            low = one.low(x)
            given, inner = again(ctx.module.expert, one.forward(x, low))
            w = weights.reshape(-1)[slots].unsqueeze(-1).to(hidden.dtype)
            w[block.count :] = 0  # rows that are there again
            d_inner, for_weights = _through_down(Part(down, block, hidden.dtype, again=True), inner.detach(), grads[0][places], w, of_down)
            d_weights[slots[: block.count]] = for_weights[: block.count].to(weights.dtype)
            d_given = dict(zip(given, torch.autograd.grad(inner, list(given.values()), d_inner), strict=True))
            d_x = one.backward(d_given, x, low, of_first)
            if total is not None:
                total.add(block.rows, d_x)
        d_hidden = total.sum() if total is not None else None
        of_weights = d_weights.view(weights.shape) if ctx.needs_input_grad[5] else None
        return (None, None, None, d_hidden, None, of_weights, *first.of_factors(of_first), *down.of_factors(of_down))


def _through_down(down: Part, inner: torch.Tensor, grad: torch.Tensor, w: torch.Tensor, into: Sides | None) -> tuple[torch.Tensor, torch.Tensor]:
    """grad [n, h] of the weighted sum -> that of inner [n, i], and of the weights [n]: <grad, out> without computing out again."""
    back = down.backward({"down": grad}, inner, down.low(inner), into, w)
    for_weights = (back * inner).sum(-1)
    for _, bias in down.biases():
        for_weights = for_weights + (grad * bias).sum(-1)
    return back * w, for_weights
