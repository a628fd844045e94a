"""The families whose language model is one part of several: config keys below `text_config`, tensors below `language_model`."""

from dataclasses import replace

from moeglot.family import Activation, SparseLayers
from moeglot.format import Dense
from moeglot.formats.lines import (
    CLAMPED,
    EXPERTS,
    KINDS,
    LAYER,
    NESTED,
    QWEN,
    ROUTED,
    SILU,
    each,
    family,
    first_dense,
    fused,
    hub,
    linears,
    memory,
    numbered,
    release_5_5,
    separate,
    turned,
    usual,
)

INNER = "language_model.model.layers.{layer}."
TEXT = "text_config"
BOTH = "the release on the Hub, and the experts module in memory: all experts in one tensor"
VISION = "its vision tower joins, cuts or turns matrices that the Hub stores otherwise"
GELU = Activation("swiglu", ("hidden_activation", "gelu_pytorch_tanh"))

ARIA = family("aria", under=TEXT, e="moe_num_experts", i="intermediate_size", activation=SILU)
LLAMA4 = family("llama4", under=TEXT, e="num_local_experts", i="intermediate_size", sparse=SparseLayers(listed="moe_layers", every="interleave_moe_layer_step"))
GEMMA4 = family("gemma4", under=TEXT, e="num_experts", activation=GELU)
DIFFUSION_GEMMA = family("diffusion-gemma", under=TEXT, e="num_experts", activation=GELU)
QWEN3_VL = family("qwen3-vl-moe", under=TEXT, e=EXPERTS, sparse=QWEN)
QWEN3_5 = family("qwen3.5-moe", model_type="qwen3_5_moe", under=TEXT, e=EXPERTS)
QWEN4 = family("qwen4-exp", under=TEXT, e=EXPERTS)
GLM4V = family("glm4v-moe", under=TEXT, e=ROUTED, sparse=first_dense(default=1))
UNLIMITED_OCR = replace(
    family("unlimited-ocr", under=TEXT, e=(*ROUTED, "num_experts"), sparse=first_dense(default=1)),
    elsewhere={TEXT: ("language_config", "sliding_window")},
)
DEEPSEEK_OCR2 = family("deepseek-ocr2", under=TEXT, e=(*ROUTED, "num_experts"), sparse=first_dense(default=1))
KIMI = family("kimi-k25", under=TEXT, e=ROUTED, sparse=first_dense(default=3))
MINIMAX_M3 = family(
    "minimax-m3-vl",
    under=TEXT,
    e=("num_local_experts", "num_experts"),
    i="intermediate_size",
    sparse=SparseLayers(kinds=(*KINDS, "moe_layer_freq")),
    activation=CLAMPED,
    others={"s": "shared_intermediate_size", "f": "dense_intermediate_size"},
)
MISTRAL_SMALL4 = family("mistral-small4", model_type="mistral3", folder="mistral4", under=TEXT, e=ROUTED, sparse=first_dense())
MISTRAL_LARGE4 = family("mistral-large4", under=TEXT, e=(*ROUTED, "num_experts"), sparse=first_dense(default=1))

LANGUAGE = {"model.language_model.{rest}": "language_model.model.{rest}", "lm_head.{rest}": "language_model.lm_head.{rest}"}
PROJECTOR = {"model.multi_modal_projector.{rest}": "multi_modal_projector.{rest}"}

ARIA_NAMES = {**LANGUAGE, "model.vision_tower.{rest}": "vision_tower.{rest}", **PROJECTOR}
ARIA_MEMORY = replace(memory(ARIA, turned(NESTED + "mlp.experts."), ARIA_NAMES), says_transposed=True)

FORMATS = (
    hub(ARIA, "rhymes-ai/Aria", turned(INNER + "mlp.experts.", "fc1.weight", "fc2.weight"), "the release on the Hub: all experts in one tensor, [in, out]"),
    ARIA_MEMORY,
    release_5_5(
        ARIA_MEMORY,
        turned(NESTED + "mlp.experts.", "fc1.weight", "fc2.weight"),
        "the experts module in memory of 5.5, and what it saves: [in, out]",
        ARIA_NAMES,
    ),
    hub(LLAMA4, "meta-llama/Llama-4-Scout-17B-16E", turned(INNER + "feed_forward.experts."), "the release on the Hub: [in, out]"),
    linears(LLAMA4, separate(INNER + "feed_forward.experts."), "llama4.py"),
    hub(GEMMA4, "google/gemma-4-26B-A4B-it", fused(NESTED + "experts."), BOTH),
    hub(DIFFUSION_GEMMA, "google/diffusiongemma-26B-A4B-it", fused("model.decoder.layers.{layer}.experts."), BOTH),
    hub(QWEN3_VL, "Qwen/Qwen3-VL-30B-A3B-Instruct", turned(NESTED + "mlp.experts."), "the release on the Hub: [in, out]"),
    memory(QWEN3_VL, fused(NESTED + "mlp.experts.")),
    linears(QWEN3_VL, separate(NESTED + "mlp.experts."), "qwen3_vl_moe.py"),
    hub(QWEN3_5, "Qwen/Qwen3.5-35B-A3B", fused(NESTED + "mlp.experts."), BOTH),
    each(QWEN3_5, separate(NESTED + "mlp.experts.")),
    hub(QWEN4, "Qwen/Qwen4-Exp", fused(NESTED + "mlp.experts."), BOTH),
    each(QWEN4, separate(NESTED + "mlp.experts.")),
    *usual(GLM4V, "zai-org/GLM-4.5V", layer=NESTED),
    hub(UNLIMITED_OCR, "baidu/Unlimited-OCR", separate(LAYER + "mlp.experts.")),
    memory(UNLIMITED_OCR, fused(NESTED + "mlp.experts."), alone=VISION),
    hub(DEEPSEEK_OCR2, "deepseek-ai/DeepSeek-OCR-2", separate(LAYER + "mlp.experts.")),
    memory(DEEPSEEK_OCR2, fused(NESTED + "mlp.experts."), alone=VISION),
    hub(KIMI, "moonshotai/Kimi-K2.5", separate(INNER + "mlp.experts.")),
    memory(KIMI, fused(NESTED + "mlp.experts."), alone=VISION),
    hub(MINIMAX_M3, "MiniMaxAI/MiniMax-M3", numbered(INNER + "block_sparse_moe.experts.")),
    memory(
        MINIMAX_M3,
        fused(NESTED + "mlp.experts."),
        {
            **{NESTED + f"self_attn.indexer.{x}.{{rest}}": INNER + f"self_attn.index_{x}.{{rest}}" for x in ("q_proj", "k_proj", "q_norm", "k_norm")},
            NESTED + "mlp.gate.e_score_correction_bias": INNER + "block_sparse_moe.e_score_correction_bias",
            NESTED + "mlp.gate.{rest}": INNER + "block_sparse_moe.gate.{rest}",
            NESTED + "mlp.shared_experts.down_proj.{rest}": INNER + "block_sparse_moe.shared_experts.down_proj.{rest}",
            **LANGUAGE,
            "model.vision_tower.embeddings.proj.{rest}": "vision_tower.vision_model.embeddings.patch_embedding.{rest}",
            "model.vision_tower.layers.{rest}": "vision_tower.vision_model.encoder.layers.{rest}",
            "model.vision_tower.pre_layrnorm.{rest}": "vision_tower.vision_model.pre_layrnorm.{rest}",
            "model.multi_modal_projector.merge_{rest}": "patch_merge_mlp.{rest}",
            **PROJECTOR,
        },
        (
            Dense(
                NESTED + "mlp.shared_experts.gate_up_proj.weight",
                tuple(INNER + f"block_sparse_moe.shared_experts.{x}_proj.weight" for x in ("gate", "up")),
                ("s", "s"),
            ),
            Dense(NESTED + "mlp.gate_up_proj.weight", tuple(INNER + f"mlp.{x}_proj.weight" for x in ("gate", "up")), ("f", "f")),
        ),
    ),
    hub(MISTRAL_SMALL4, "mistralai/Mistral-Small-4-119B-2603", fused(INNER + "mlp.experts."), "the release on the Hub: all experts in one tensor"),
    memory(MISTRAL_SMALL4, fused(NESTED + "mlp.experts."), ARIA_NAMES),
    hub(MISTRAL_LARGE4, "mistralai/Mistral-Large-4-1T-A52B", numbered("layers.{layer}.experts.")),
    memory(MISTRAL_LARGE4, fused(NESTED + "mlp.experts."), alone=VISION),
)
