"""Language models that are also parts of larger models, saved on their own: their experts lie as in memory."""

from dataclasses import replace

from moeglot.family import SparseLayers
from moeglot.format import Dense
from moeglot.formats.lines import CLAMPED, EXPERTS, KINDS, LAYER, NESTED, ROUTED, each, family, fused, hub, memory, release_5_5, separate

LARGER = {"model.language_model.{rest}": "model.{rest}"}
BOTH = "what save_pretrained writes, and the experts module in memory: all experts in one tensor"

MINIMAX_M3 = family(
    "minimax-m3-vl-text",
    folder="minimax_m3_vl",
    e=("num_local_experts", "num_experts"),
    i="intermediate_size",
    sparse=SparseLayers(kinds=(*KINDS, "moe_layer_freq")),
    activation=CLAMPED,
)
QWEN3_5 = family("qwen3.5-moe-text", model_type="qwen3_5_moe_text", folder="qwen3_5_moe", e=EXPERTS)
QWEN4 = family("qwen4-exp-text", model_type="qwen4_exp_text", folder="qwen4_exp", e=EXPERTS)
INKLING = replace(
    family(
        "inkling-text",
        folder="inkling",
        e=ROUTED,
        i=("moe_intermediate_size", "intermediate_size"),
        sparse=SparseLayers(kinds=KINDS, first=("dense_mlp_idx", 0)),
    ),
    first_wins=("i",),  # where there is no moe_intermediate_size, the width of dense layers is dense_intermediate_size
)

QWEN3_5_MEMORY = memory(QWEN3_5, fused(LAYER + "mlp.experts."))

FORMATS = (
    hub(MINIMAX_M3, "MiniMaxAI/MiniMax-M3", fused(LAYER + "mlp.experts."), BOTH),
    hub(QWEN3_5, "Qwen/Qwen3.5-35B-A3B", separate(LAYER + "mlp.experts.")),
    QWEN3_5_MEMORY,
    release_5_5(
        QWEN3_5_MEMORY,
        fused(NESTED + "mlp.experts."),
        "what save_pretrained of 5.5 writes: the names of the larger model",
        LARGER,
    ),
    replace(
        each(QWEN3_5, separate(NESTED + "mlp.experts.")),
        source="https://github.com/bryce-hoehn/Qwen3.5-25B-REAP-A3B-Coding",
        about="derivatives with fewer experts: one matrix each, under the names of the larger model",
        dense=tuple(Dense(key, (name,)) for key, name in LARGER.items()),
    ),
    hub(QWEN4, "Qwen/Qwen4-Exp", separate(LAYER + "mlp.experts.")),
    memory(QWEN4, fused(LAYER + "mlp.experts.")),
    hub(INKLING, "thinkingmachines/Inkling", fused(LAYER + "mlp.experts."), BOTH),
)
