"""The ways to compute a layer's experts, by name: the reference, one expert or slot at a time, blocks of experts, or their codes; and which one suits where."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING

import torch

from moeglot.encoded import Encoded
from moeglot.errors import UsageError
from moeglot.floats import values
from moeglot.kernels.backend import has_triton
from moeglot.nn.compute import Part, Stage, biases_of, stages
from moeglot.nn.routing import Routing, Total

if TYPE_CHECKING:
    from moeglot.nn.module import Experts

Backend = Callable[["Experts", torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(module, hidden [t, h], top_k_index [t, k], top_k_weights [t, k]) -> [t, h]."""

FEW = 64
"""Slots (tokens × experts of each) up to which a device that computes in parallel takes one matrix for each slot."""
BUSY = 2
"""Slots for each expert, on average, from which on a CPU decodes experts in blocks: few of them have no token and are decoded in vain.

Experts that need no decoding are computed together up to there, since then it is Python that takes time; above, what tokens become takes memory.
"""
BUDGET = {"cpu": 1 << 24}
"""Bytes of decoded experts that a block may take on a kind of device, at least one expert; on a CPU, small experts share what a step costs in Python."""
OTHERS = 1 << 28
"""As BUDGET, on every other kind of device."""


def reference(module: Experts, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each expert by `moeglot.experts`, in float32, its adapter added to its matrices: what the others are measured against."""
    routing = Routing.of(index, module.num_experts)
    total = torch.zeros(hidden.shape, device=hidden.device, dtype=torch.float32)
    for block in routing.blocks(1):
        slots = routing.order[block.rows]
        roles = {role: each for line in module.lines for role, each in line.roles(block.experts.start).items()}
        roles |= _changed(module, roles, block.experts.start)
        out = module.expert.forward(hidden[slots // routing.ranks].float(), roles.__getitem__)
        total = total.index_add(0, slots // routing.ranks, module.after(out) * weights.reshape(-1)[slots].float().unsqueeze(-1))
    return total.to(hidden.dtype)


def _changed(module: Experts, roles: dict[str, Encoded], expert: int) -> dict[str, Encoded]:
    found = {}
    for place in module.places:
        if factors := module.factors(place):
            for n, role in enumerate(factors.roles):
                b = factors.b[expert].float().chunk(len(factors.roles))[n]
                b = b if role in factors.targets else b.detach()
                found[role] = values(roles[role].decode(torch.float32) + factors.scale * (b @ factors.a[expert].float()))
    return found


def in_blocks(module: Experts, of: tuple[Stage, Stage], routing: Routing, hidden: torch.Tensor, weights: torch.Tensor, size: int) -> torch.Tensor:
    """`of`: its stages. `size` experts at a time: hidden [t, h], weights [t, k] -> [t, h]."""
    total, flat = Total(routing, hidden.shape[-1], hidden), weights.reshape(-1)
    for block in routing.blocks(size):
        one, two = (Part(stage, block, hidden.dtype) for stage in of)
        slots, places = routing.taken(block)
        x = hidden[places]
        inner = module.expert.activate(one.forward(x, one.low(x)))
        out = module.after(two.forward(inner, two.low(inner))["down"])
        total.add(block.rows, out * flat[slots].unsqueeze(-1).to(out.dtype))
    return total.sum()


def eager(module: Experts, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One expert after the other, those alone that have tokens."""
    return in_blocks(module, stages(module), Routing.of(index, module.num_experts), hidden, weights, 1)


def grouped(module: Experts, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Blocks of experts, each decoded at once and multiplied by one grouped GEMM."""
    routing = Routing.of(index, module.num_experts)
    return in_blocks(module, stages(module), routing, hidden, weights, block_size(module, hidden, index))


def block_size(module: Experts, hidden: torch.Tensor, index: torch.Tensor) -> int:
    """How many decoded experts the budget of the device holds; never more than half a layer, or all of it for a few tokens and nothing to decode.

    One on a CPU, if experts are decoded one by one: they would be copied to lie beside each other.
    """
    kind, dtype = module.lines[0].device.type, hidden.dtype
    if _is_few(module, index) and module.is_plain(dtype):
        return module.num_experts
    if kind == "cpu" and any(line.alone for line in module.lines):
        return 1
    largest = max(prod(line.shape) for line in module.lines) * dtype.itemsize
    return max(1, min(module.num_experts // 2, BUDGET.get(kind, OTHERS) // largest))


def _is_few(module: Experts, index: torch.Tensor) -> bool:
    return index.numel() < BUSY * module.num_experts


def batched(module: Experts, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One matrix for each slot, gathered in its encoding: no id comes to the host; for few tokens."""
    tokens, ranks = index.shape
    first, down = stages(module)
    ids = index.reshape(-1)
    here = (ids >= 0) & (ids < module.num_experts)
    ids = ids.clamp(0, module.num_experts - 1)
    x = hidden.repeat_interleave(ranks, 0)
    inner = module.expert.activate(_each(first, x, ids))
    out = module.after(_each(down, inner, ids)["down"])
    weighted = torch.where(here.unsqueeze(-1), out * weights.reshape(-1, 1).to(out.dtype), 0)
    return weighted.view(tokens, ranks, -1).sum(1, dtype=torch.promote_types(hidden.dtype, torch.float32)).to(hidden.dtype)


def _each(stage: Stage, x: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """x [n, in], each row with its own expert -> role -> [n, out]."""
    found: dict[str, torch.Tensor] = {}
    for line in stage.lines:
        found |= line.line.apart((x.unsqueeze(1) @ line.line.in_out(line.gathered(ids, x.dtype))).squeeze(1))
    for role, bias in biases_of(stage.biases, range(stage.lines[0].experts), x.dtype).items():
        found[role] = found[role] + bias[ids]
    if stage.factors:
        a, b = (side[ids].to(x.dtype) for side in (stage.factors.a, stage.factors.b))
        change = (x.unsqueeze(1) @ a.mT @ b.mT).squeeze(1) * stage.factors.scale
        for role, one in stage.factors.roles_of(change).items():
            found[role] = found[role] + one
    return found


def triton(module: Experts, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """All experts at once, multiplied in their codes by Triton's kernels, without waiting for the device."""
    from moeglot.nn.fused import forward

    return forward(module, hidden, index, weights)


BACKENDS: dict[str, Backend] = {"reference": reference, "eager": eager, "batched": batched, "grouped": grouped, "triton": triton}
NAMES = ("auto", *BACKENDS)


def check(name: str) -> str:
    """The name; raises `UsageError` for one that is not there."""
    if name not in NAMES:
        raise UsageError(f"{name!r} is not a backend", f"known: {', '.join(NAMES)}", "leave it out; 'auto' chooses by device and shape")
    if name == "triton" and not has_triton():
        raise UsageError("there is no triton backend here", "triton is not installed", "pip install 'moeglot[triton]', or leave the backend out")
    return name


def choose(module: Experts, hidden: torch.Tensor, index: torch.Tensor) -> str:
    """The backend that computes these tokens; raises `UsageError` where the one that is asked for cannot.

    A GPU without tensor cores for bfloat16 (sm_75 and before) decodes and multiplies instead of "triton".
    """
    name = module.backend
    if name == "triton":
        from moeglot.kernels.triton import launch, tiles

        launch.check(hidden.device)
        if hidden.device.type == "cuda" and tiles.table_of(hidden.device) is None:
            return "grouped"
        launch.check_compiler(hidden.device)
        launch.check_dtype(hidden.dtype)
    if name != "auto":
        return name
    if hidden.device.type == "cpu":
        return "eager" if _is_few(module, index) and not module.is_plain(hidden.dtype) else "grouped"
    if hidden.device.type == "cuda" and hidden.dtype == torch.bfloat16 and module.is_encoded and has_triton():
        from moeglot.kernels.triton import launch, tiles

        if tiles.table_of(hidden.device) is not None and launch.compiles_on(hidden.device):
            return "triton"
    return "batched" if index.numel() <= FEW else "grouped"
