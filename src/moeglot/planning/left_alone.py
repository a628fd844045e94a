"""Which names quantization_config lists of what an output leaves alone: those that its readers ask for."""

from __future__ import annotations

from collections.abc import Sequence

from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.format import Format, holder

BY_HOLDER = ("gptq", "awq")
"""For whose files vLLM and SGLang ask by the name of what holds the experts, or of the one matrix that they make of several; not by that of each.

https://github.com/vllm-project/vllm/tree/main/vllm/model_executor/layers/quantization (auto_awq.py, auto_gptq.py, utils/gptq_utils.py)
https://github.com/sgl-project/sglang/tree/main/python/sglang/srt/layers/quantization (awq, gptq)
"""
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj"), "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa")}
"""How they call such a matrix."""


def experts_alone(source: Checkpoint, target: Format, method: str) -> list[str]:
    """The modules of experts that the target leaves as they are; where readers want it so, of whole layers what holds them."""
    found: dict[str, None] = {}
    for layer, lines in target.unlike.items():
        whole = method in BY_HOLDER and all(line.is_plain and line.per_expert for line in lines if line.is_matrix)
        for line, coded in zip(lines, target.stored, strict=True):
            if line.is_plain and not coded.is_plain:
                each = range(source.sizes["e"]) if line.per_expert else (0,)
                found |= dict.fromkeys([holder(line, layer)] if whole else [line.module(layer, n) for n in each])
    return list(found)


def fused(modules: Sequence[str], method: str) -> list[str]:
    """What servers make of some of these modules, where they ask by that name and all are there that they make it of."""
    known = set(modules)
    holders = dict.fromkeys(name.rpartition(".")[0] for name in modules if method in BY_HOLDER)
    return [f"{one}.{name}" for one in holders for name, of in FUSED.items() if all(f"{one}.{part}" in known for part in of)]
