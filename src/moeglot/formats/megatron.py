"""Megatron-Core's names for a whole model, experts and all else, of the families that are spelled out: each head group of queries, keys and values in turn.

https://github.com/NVIDIA/Megatron-LM/tree/core_v0.16.1/megatron/core: `transformer/moe/experts.py` for the experts, `transformer/attention.py`
(`get_query_key_value_tensors`) for the groups, `models/gpt/gpt_layer_specs.py` for what the layers of transformer-engine and the local ones are called.
"""

from moeglot.formats import gpt_oss
from moeglot.formats.gate_up_down import QWEN3_MOE
from moeglot.formats.lines import megatron
from moeglot.formats.w1_w3_w2 import MIXTRAL

SINKS = {"self_attention.core_attention.softmax_offset": "self_attn.sinks"}
NORMS = {"self_attention.q_layernorm.weight": "self_attn.q_norm.weight", "self_attention.k_layernorm.weight": "self_attn.k_norm.weight"}

FORMATS = (
    *megatron(gpt_oss.FAMILY, "mlp.router", SINKS, biased=True),
    *megatron(QWEN3_MOE, "mlp.gate", NORMS),
    *megatron(MIXTRAL, "block_sparse_moe.gate", {}),
)
