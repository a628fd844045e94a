"""`experts_implementation="moeglot"` for stock modules of transformers 5.23, through its own registry, for those who call `from_pretrained` themselves."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch.autograd.function import once_differentiable

from moeglot.errors import UsageError
from moeglot.integrations.transformers import VERSION
from moeglot.nn.compute import row_ids
from moeglot.nn.grouped import outer, rows
from moeglot.nn.routing import Block, Routing

NAME = "moeglot"
FIRST = (5, 23)
"""The release whose registry takes names of others; 5.5 has one and refuses names that it does not know, 4.57 has none."""


def register() -> None:
    """Make `experts_implementation="moeglot"` known; doing it again changes nothing. Raises `UsageError` where the release has no registry for it."""
    if VERSION < FIRST:
        raise UsageError(
            f"transformers {transformers.__version__} takes no implementation of experts from others",
            "its registry came with 5.23" if VERSION < (5, 0) else "it has a registry, and from_pretrained refuses names that are not its own",
            "load the model with moeglot.load(path, native=True)",
        )
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if NAME not in ALL_EXPERTS_FUNCTIONS.valid_keys():
        ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """A stock experts module: hidden_states [t, h], top_k_index int [t, k], top_k_weights [t, k] -> [t, h]; sums in one order, with gradients for weights."""
    routing = Routing.of(top_k_index, module.num_experts)
    here = torch.arange(len(routing.order), device=hidden_states.device, dtype=torch.int64) < routing.ends[-1]
    order = routing.order
    x = torch.where(here.unsqueeze(-1), hidden_states[order // routing.ranks], 0)
    ids = row_ids(Block(range(module.num_experts), slice(0, len(order)), routing.ends)).clamp(max=module.num_experts - 1)
    name = "gate_up_proj" if module.has_gate else "up_proj"
    given = _linear(module, x, name, routing.ends, ids)
    inner = module._apply_gate(given) if module.has_gate else module.act_fn(given)
    out = _linear(module, inner, "down_proj", routing.ends, ids)
    if getattr(module, "has_post_expert_norm", False):
        out = module.post_expert_norm(out)
    out = torch.where(here.unsqueeze(-1), out * top_k_weights.reshape(-1)[order].unsqueeze(-1), 0)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device, dtype=torch.int64))
    return out[back].view(routing.tokens, routing.ranks, hidden_states.shape[-1]).sum(1).to(hidden_states.dtype)


def _linear(module: Any, x: torch.Tensor, name: str, ends: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, name)
    matrices = weight if module.is_transposed else weight.mT  # the class says how its own parameters lie
    found: torch.Tensor = Grouped.apply(x.to(weight.dtype), matrices, ends)  # type: ignore[no-untyped-call]  # torch types no Function.apply
    return found + getattr(module, f"{name}_bias")[ids] if module.has_bias else found


class Grouped(torch.autograd.Function):
    """(x [n, in], matrices [e, in, out], ends int32 [e]) -> [n, out]; rows after the last end give zeros."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, matrices, ends)
        return _whole(rows(x, matrices, ends), ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, matrices, ends = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_x = _whole(rows(grad, matrices.mT, ends), ends) if ctx.needs_input_grad[0] else None
        return d_x, outer(x, grad, ends) if ctx.needs_input_grad[1] else None, None


def _whole(found: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows that belong to nobody hold whatever memory held."""
    return torch.where((torch.arange(len(found), device=found.device, dtype=torch.int64) < ends[-1]).unsqueeze(-1), found, 0)
