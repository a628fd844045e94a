"""The families whose releases hold one matrix each, as model.layers.N.mlp.experts.E.{gate,up,down}_proj.weight; they differ in config keys alone."""

from moeglot.family import SparseLayers
from moeglot.formats.lines import EXPERTS, KINDS, QWEN, ROUTED, family, first_dense, usual

DEEPSEEK_V3 = family("deepseek-v3", e=ROUTED, sparse=first_dense(default=3))
QWEN3_MOE = family("qwen3-moe", e=EXPERTS, sparse=QWEN)

FORMATS = (
    *usual(family("afmoe", e=EXPERTS, sparse=first_dense("num_dense_layers", 1)), "arcee-ai/Trinity-Mini"),
    *usual(family("axk1", e=ROUTED, sparse=first_dense(default=1)), "skt/A.X-K1", {"mlp.post_mlp_layernorm.{rest}": "post_mlp_layernorm.{rest}"}),
    *usual(
        family("axk2", e=ROUTED, sparse=first_dense(default=1)),
        "skt/A.X-K2",
        {
            "input_layernorm.mlp.fc1.{rest}": "input_layernorm.W_down.{rest}",
            "input_layernorm.mlp.fc2.{rest}": "input_layernorm.W_up.{rest}",
            "post_attention_layernorm.mlp.fc1.{rest}": "post_attention_layernorm.W_down.{rest}",
            "post_attention_layernorm.mlp.fc2.{rest}": "post_attention_layernorm.W_up.{rest}",
            "self_attn.q_gate_proj.{rest}": "self_attn.q_b_proj.{rest}",
        },
    ),
    *usual(family("beam", e=EXPERTS, sparse=first_dense(default=3)), "reflection/Beam-1.0-501B-A23B"),
    *usual(family("cohere2-moe", e=EXPERTS, i="intermediate_size", sparse=first_dense()), "CohereLabs/command-a-plus-05-2026"),
    *usual(family("deepseek-v2", e=(*ROUTED, "num_experts"), sparse=first_dense()), "deepseek-ai/DeepSeek-V2-Lite"),
    *usual(DEEPSEEK_V3, "deepseek-ai/DeepSeek-V3"),
    *usual(family("deepseek-v32", e=(*ROUTED, "num_experts"), sparse=first_dense(default=3)), "deepseek-ai/DeepSeek-V3.2-Exp"),
    *usual(family("dots1", e=ROUTED, sparse=first_dense()), "rednote-hilab/dots.llm1.base"),
    *usual(
        family(
            "ernie4-5-moe",
            model_type="ernie4_5_moe",
            e=("moe_num_experts", "num_experts"),
            sparse=SparseLayers(first=("moe_layer_start_index", 1), last="moe_layer_end_index", every="moe_layer_interval"),
        ),
        "baidu/ERNIE-4.5-21B-A3B-PT",
        {"mlp.gate.moe_statics.e_score_correction_bias": "mlp.moe_statics.e_score_correction_bias"},
    ),
    *usual(
        family("exaone-moe", e=EXPERTS, sparse=first_dense(default=1)),
        "LGAI-EXAONE/K-EXAONE-236B-A23B",
        {"mlp.gate.e_score_correction_bias": "mlp.e_score_correction_bias"},
    ),
    *usual(family("flex-olmo", e=EXPERTS, i="intermediate_size"), "allenai/FlexOlmo-7x7B-1T"),
    *usual(family("flint", e=EXPERTS, sparse=QWEN), "RecursiveSI/flint", {"self_attn.sinks": "self_attn.softmax_offset"}),
    *usual(family("glm4-moe", e=ROUTED, sparse=first_dense(default=1)), "zai-org/GLM-4.5"),
    *usual(family("glm4-moe-lite", e=ROUTED, sparse=first_dense(default=1)), "zai-org/GLM-4.7-Flash"),
    *usual(family("glm-moe-dsa", e=(*ROUTED, "num_experts"), sparse=first_dense(default=3)), "zai-org/GLM-5"),
    *usual(family("hunyuan-v1-moe", e=EXPERTS, i="intermediate_size"), "tencent/Hunyuan-A13B-Instruct"),
    *usual(
        family("hy-v3", e=EXPERTS, sparse=first_dense(default=1)),
        "tencent/Hy3-preview",
        {
            "mlp.e_score_correction_bias": "mlp.expert_bias",
            "mlp.gate.{rest}": "mlp.router.gate.{rest}",
            "mlp.shared_experts.{rest}": "mlp.shared_mlp.{rest}",
        },
    ),
    *usual(
        family("kolibri1", e=EXPERTS),
        "Aleph-Alpha/Kolibri-1",
        {
            "mlp.gate.e_score_correction_bias": "moe.router.expert_bias",
            "post_mlp_layernorm.{rest}": "post_ffn_norm.{rest}",
            "post_self_attn_layernorm.{rest}": "post_attn_norm.{rest}",
        },
    ),
    *usual(
        family("laguna", e=EXPERTS, sparse=SparseLayers(kinds=KINDS, first=("first_k_dense_replace", 1))),
        "poolside/laguna-XS.2",
        {
            "mlp.gate.e_score_correction_bias": "mlp.experts.e_score_correction_bias",
            "mlp.shared_experts.{rest}": "mlp.shared_expert.{rest}",
        },
    ),
    *usual(family("mellum", e=EXPERTS, sparse=SparseLayers(kinds=KINDS)), "JetBrains/Mellum2-12B-A2.5B-Base"),
    *usual(
        family("mimo-v2-flash", e=ROUTED, sparse=first_dense(default=1)),
        "XiaomiMiMo/MiMo-V2-Flash",
        {"self_attn.sinks": "self_attn.attention_sink_bias"},
    ),
    *usual(family("olmoe", e=EXPERTS, i="intermediate_size"), "allenai/OLMoE-1B-7B-0924"),
    *usual(family("qwen2-moe", e=EXPERTS, sparse=QWEN), "Qwen/Qwen1.5-MoE-A2.7B"),
    *usual(QWEN3_MOE, "Qwen/Qwen3-30B-A3B"),
    *usual(family("qwen3-next", e=EXPERTS, sparse=QWEN), "Qwen/Qwen3-Next-80B-A3B-Instruct"),
    *usual(family("solar-open", e=ROUTED, sparse=first_dense()), "upstage/Solar-Open-100B"),
)
