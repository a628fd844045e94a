"""The families whose releases hold one matrix each, as model.layers.N.mlp.experts.E.{gate,up,down}_proj.weight; they differ in config keys alone."""

from moeglot.format import SparseLayers
from moeglot.formats.lines import KINDS, LAYER, QWEN, family, first_dense, usual

MLP = LAYER + "mlp."
ROUTED = ("n_routed_experts", "num_local_experts")
EXPERTS = ("num_experts", "num_local_experts")

FORMATS = (
    *usual(family("afmoe", e=EXPERTS, sparse=first_dense("num_dense_layers", 1)), "arcee-ai/Trinity-Mini"),
    *usual(family("axk1", e=ROUTED, sparse=first_dense(default=1)), "skt/A.X-K1", {MLP + "post_mlp_layernorm.weight": LAYER + "post_mlp_layernorm.weight"}),
    *usual(
        family("axk2", e=ROUTED, sparse=first_dense(default=1)),
        "skt/A.X-K2",
        {
            LAYER + "input_layernorm.mlp.fc1.weight": LAYER + "input_layernorm.W_down.weight",
            LAYER + "input_layernorm.mlp.fc2.weight": LAYER + "input_layernorm.W_up.weight",
            LAYER + "post_attention_layernorm.mlp.fc1.weight": LAYER + "post_attention_layernorm.W_down.weight",
            LAYER + "post_attention_layernorm.mlp.fc2.weight": LAYER + "post_attention_layernorm.W_up.weight",
            LAYER + "self_attn.q_gate_proj.weight": LAYER + "self_attn.q_b_proj.weight",
        },
    ),
    *usual(family("beam", e=EXPERTS, sparse=first_dense(default=3)), "reflection/Beam-1.0-501B-A23B"),
    *usual(family("cohere2-moe", e=EXPERTS, i="intermediate_size", sparse=first_dense()), "CohereLabs/command-a-plus-05-2026"),
    *usual(family("deepseek-v2", e=ROUTED, sparse=first_dense()), "deepseek-ai/DeepSeek-V2-Lite"),
    *usual(family("deepseek-v3", e=ROUTED, sparse=first_dense(default=3)), "deepseek-ai/DeepSeek-V3"),
    *usual(family("deepseek-v32", e=ROUTED, sparse=first_dense(default=3)), "deepseek-ai/DeepSeek-V3.2-Exp"),
    *usual(family("dots1", e=ROUTED, sparse=first_dense()), "rednote-hilab/dots.llm1.base"),
    *usual(
        family(
            "ernie4-5-moe",
            model_type="ernie4_5_moe",
            e=("moe_num_experts", "num_experts"),
            sparse=SparseLayers(first=("moe_layer_start_index", 1), last="moe_layer_end_index", every="moe_layer_interval"),
        ),
        "baidu/ERNIE-4.5-21B-A3B-PT",
        {MLP + "gate.moe_statics.e_score_correction_bias": MLP + "moe_statics.e_score_correction_bias"},
    ),
    *usual(
        family("exaone-moe", e=EXPERTS, sparse=first_dense(default=1)),
        "LGAI-EXAONE/K-EXAONE-236B-A23B",
        {MLP + "gate.e_score_correction_bias": MLP + "e_score_correction_bias"},
    ),
    *usual(family("flex-olmo", e=EXPERTS, i="intermediate_size"), "allenai/FlexOlmo-7x7B-1T"),
    *usual(family("flint", e=EXPERTS, sparse=QWEN), "RecursiveSI/flint", {LAYER + "self_attn.sinks": LAYER + "self_attn.softmax_offset"}),
    *usual(family("glm4-moe", e=ROUTED, sparse=first_dense(default=1)), "zai-org/GLM-4.5"),
    *usual(family("glm4-moe-lite", e=ROUTED, sparse=first_dense(default=1)), "zai-org/GLM-4.7-Flash"),
    *usual(family("glm-moe-dsa", e=ROUTED, sparse=first_dense(default=3)), "zai-org/GLM-5"),
    *usual(family("hunyuan-v1-moe", e=EXPERTS, i="intermediate_size"), "tencent/Hunyuan-A13B-Instruct"),
    *usual(
        family("hy-v3", e=EXPERTS, sparse=first_dense(default=1)),
        "tencent/Hy3-preview",
        {
            MLP + "e_score_correction_bias": MLP + "expert_bias",
            MLP + "gate.weight": MLP + "router.gate.weight",
            MLP + "shared_experts.gate_proj.weight": MLP + "shared_mlp.gate_proj.weight",
            MLP + "shared_experts.up_proj.weight": MLP + "shared_mlp.up_proj.weight",
            MLP + "shared_experts.down_proj.weight": MLP + "shared_mlp.down_proj.weight",
        },
    ),
    *usual(
        family("kolibri1", e=EXPERTS),
        "Aleph-Alpha/Kolibri-1",
        {
            MLP + "gate.e_score_correction_bias": LAYER + "moe.router.expert_bias",
            LAYER + "post_mlp_layernorm.weight": LAYER + "post_ffn_norm.weight",
            LAYER + "post_self_attn_layernorm.weight": LAYER + "post_attn_norm.weight",
        },
    ),
    *usual(
        family("laguna", e=EXPERTS, sparse=SparseLayers(kinds=KINDS, first=("first_k_dense_replace", 1))),
        "poolside/laguna-XS.2",
        {
            MLP + "gate.e_score_correction_bias": MLP + "experts.e_score_correction_bias",
            MLP + "shared_experts.gate_proj.weight": MLP + "shared_expert.gate_proj.weight",
            MLP + "shared_experts.up_proj.weight": MLP + "shared_expert.up_proj.weight",
            MLP + "shared_experts.down_proj.weight": MLP + "shared_expert.down_proj.weight",
        },
    ),
    *usual(family("mellum", e=EXPERTS, sparse=SparseLayers(kinds=KINDS)), "JetBrains/Mellum2-12B-A2.5B-Base"),
    *usual(
        family("mimo-v2-flash", e=ROUTED, sparse=first_dense(default=1)),
        "XiaomiMiMo/MiMo-V2-Flash",
        {LAYER + "self_attn.sinks": LAYER + "self_attn.attention_sink_bias"},
    ),
    *usual(family("olmoe", e=EXPERTS, i="intermediate_size"), "allenai/OLMoE-1B-7B-0924"),
    *usual(family("qwen2-moe", e=EXPERTS, sparse=QWEN), "Qwen/Qwen1.5-MoE-A2.7B"),
    *usual(family("qwen3-moe", e=EXPERTS, sparse=QWEN), "Qwen/Qwen3-30B-A3B"),
    *usual(family("qwen3-next", e=EXPERTS, sparse=QWEN), "Qwen/Qwen3-Next-80B-A3B-Instruct"),
    *usual(family("solar-open", e=ROUTED, sparse=first_dense()), "upstage/Solar-Open-100B"),
)
