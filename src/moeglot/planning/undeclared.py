"""What the source's quantization_config has a server do beside the weights and the output's does not, and the tensors that are left out with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moeglot.codings.coding import said
from moeglot.codings.served import has_cache, is_of_cache, is_static
from moeglot.planning.plan import Plan


def undeclared(plan: Plan) -> Iterator[dict[str, Any]]:
    """For each such thing: `what` is left out, how many `tensors`, and `why`."""
    source, declared = plan.source, said(plan.source.source.config)
    written = {tensor.name for parts in plan.dense.values() for tensor in parts}
    others = {module: parts["input_scale"] for module, (_, parts) in source.matrices.items() if "input_scale" in parts}
    left = {module: 1 for module, name in others.items() if name not in written} | _of_experts(plan)
    if left:
        static = any(is_static(declared, module, alike=False) for module in left)
        why = f"{source.format.name} has activations rounded under them, and the output's config.json has not" if static else "config.json does not use them"
        yield {"what": "scales of activations", "tensors": sum(left.values()), "why": why}
    if has_cache(declared) and not has_cache(said(plan.config)):
        gone = [name for name in source.dense if is_of_cache(name) and name not in written]
        why = f"{source.format.name} has them kept in fewer bits, and the output's config.json has not"
        yield {"what": "scales of keys and values", "tensors": len(gone), "why": why}


def _of_experts(plan: Plan) -> dict[str, int]:
    """The module of a line in a layer -> how many such scales of it are not carried."""
    source, carried = plan.source, {(role, step.layer) for step in plan.steps if step.target.carried for role in step.line.roles}
    lines = [(line, layer) for layer in source.layers for line in source.format.lines(layer) if (line.roles[0], layer) not in carried]
    held = [(line, layer) for line, layer in lines if source.encoding(line, layer).carried]
    return {line.module(layer): source.sizes["e"] if line.per_expert else 1 for line, layer in held}
