"""Megatron-Core's names for a whole model, experts and all else, of the families that are spelled out.

https://github.com/NVIDIA/Megatron-LM/tree/core_v0.16.1/megatron/core: `transformer/moe/experts.py` for the experts, `transformer/attention.py`
(`get_query_key_value_tensors`) for groups of heads, `models/gpt/gpt_layer_specs.py` for what the layers of transformer-engine and the local ones are called.
Of tensor parallelism: `tensor_parallel/layers.py` for rows and columns, `transformer/multi_latent_attention.py` for the latent projections, which
transformer-engine's layers have whole and the local ones divided.
transformer-engine folds a norm into the linear that follows it, and so calls it that linear's; the local layers' checkpoints take that name for some, too.
"""

from dataclasses import replace

from moeglot.formats import gpt_oss
from moeglot.formats.gate_up_down import DEEPSEEK_V3, QWEN3_MOE
from moeglot.formats.lines import by_heads, gate_before_up, in_layer, megatron, query_groups
from moeglot.formats.w1_w3_w2 import MIXTRAL

INPUT, OUTPUT = "input_layernorm.weight", "post_attention_layernorm.weight"
PROJ = in_layer({"self_attention.linear_proj.weight": "self_attn.o_proj.weight"}, tp="columns", between="num_attention_heads")

GROUPED = (*query_groups("weight"), *PROJ)
BIASES = (*query_groups("bias"), *in_layer({"self_attention.linear_proj.bias": "self_attn.o_proj.bias"}))
NORMS = {
    "engine": in_layer({"self_attention.linear_qkv.layer_norm_weight": INPUT, "pre_mlp_layernorm.weight": OUTPUT}),
    "local": in_layer({"input_layernorm.weight": INPUT, "pre_mlp_layernorm.weight": OUTPUT}),
    "stored": in_layer({"self_attention.linear_qkv.layer_norm_weight": INPUT, "mlp.linear_fc1.layer_norm_weight": OUTPUT}),
}
LINEAR = ("self_attention.linear_qkv", "self_attention.linear_proj")
BESIDE = ("self_attention.core_attention", "pre_mlp_layernorm")

SINKS = (
    *by_heads({"self_attention.core_attention.softmax_offset": "self_attn.sinks"}),
    *in_layer({f"mlp.router.{kind}": f"mlp.router.{kind}" for kind in ("weight", "bias")}),
)
HEAD_NORMS = tuple(replace(line, of_head=True) for line in in_layer({f"self_attention.{x}_layernorm.weight": f"self_attn.{x}_norm.weight" for x in "qk"}))
DECLARED_BIASES = tuple(replace(line, given="attention_bias") for line in BIASES)
GATE = in_layer({"mlp.router.weight": "mlp.gate.weight"})
SPARSE_GATE = in_layer({"mlp.router.weight": "block_sparse_moe.gate.weight"})

DOWN = {
    "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
    "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
}
LATENT = (
    *in_layer({"input_layernorm.weight": INPUT}),
    *by_heads(
        {
            "self_attention.linear_q_proj.weight": "self_attn.q_proj.weight",
            "self_attention.linear_q_up_proj.weight": "self_attn.q_b_proj.weight",
            "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
        }
    ),
    *PROJ,
    *in_layer({"mlp.router.weight": "mlp.gate.weight", "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias"}, "sparse"),
    *gate_before_up("mlp", "mlp", "intermediate_size", "dense"),
    *gate_before_up("mlp.shared_experts", "mlp.shared_experts", "moe_intermediate_size n_shared_experts", "sparse"),
)
LATENT_ENGINE = (
    *in_layer(DOWN),
    *in_layer(
        {
            "self_attention.linear_q_up_proj.layer_norm_weight": "self_attn.q_a_layernorm.weight",
            "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attn.kv_a_layernorm.weight",
        }
    ),
    *in_layer({"pre_mlp_layernorm.weight": OUTPUT}, "sparse"),
    *in_layer({"mlp.linear_fc1.layer_norm_weight": OUTPUT}, "dense"),
)
LATENT_LOCAL = (
    *in_layer(DOWN, tp="rows"),
    *in_layer(
        {
            "self_attention.q_layernorm.weight": "self_attn.q_a_layernorm.weight",
            "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
            "pre_mlp_layernorm.weight": OUTPUT,
        }
    ),
)
LATENT_NORMS = {"engine": LATENT_ENGINE, "local": LATENT_LOCAL, "stored": LATENT_LOCAL}
LATENT_LINEAR = (
    "self_attention.linear_q_proj",
    "self_attention.linear_q_down_proj",
    "self_attention.linear_q_up_proj",
    "self_attention.linear_kv_down_proj",
    "self_attention.linear_kv_up_proj",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "mlp.shared_experts.linear_fc1",
    "mlp.shared_experts.linear_fc2",
)

FORMATS = (
    *megatron(gpt_oss.FAMILY, {kind: GROUPED + BIASES + SINKS + norms for kind, norms in NORMS.items()}, LINEAR, BESIDE, biased=True),
    *megatron(
        QWEN3_MOE,
        {kind: GROUPED + DECLARED_BIASES + HEAD_NORMS + GATE + norms for kind, norms in NORMS.items()},
        LINEAR,
        (*BESIDE, "self_attention.q_layernorm", "self_attention.k_layernorm"),
    ),
    *megatron(MIXTRAL, {kind: GROUPED + SPARSE_GATE + norms for kind, norms in NORMS.items()}, LINEAR, BESIDE),
    *megatron(DEEPSEEK_V3, {kind: LATENT + norms for kind, norms in LATENT_NORMS.items()}, LATENT_LINEAR, (*BESIDE, "input_layernorm")),
)
