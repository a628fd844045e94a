"""Kimi-Linear, Ling-3 and GLM-5.3: their linear attention has three convolutions on the Hub that transformers 5 joins, beside the usual experts."""

from dataclasses import replace

from moeglot.family import Activation
from moeglot.format import Dense
from moeglot.formats.lines import LAYER, NESTED, family, first_dense, fused, hub, memory, numbered, separate

HEADS = {"n": ("linear_num_heads", "linear_attn_config.num_heads"), "d": ("linear_head_dim", "linear_attn_config.head_dim")}
SPARSE, MLP = LAYER + "block_sparse_moe.", LAYER + "mlp."
ATTENTION, GATE = LAYER + "self_attn.", LAYER + "self_attn.forget_gate."
QKV = ("n d", "n d", "n d")

KIMI = family("kimi-linear", e=("num_experts", "num_local_experts"), sparse=first_dense(default=1), others=HEADS)
LING = family("bailing-hybrid", e=("num_experts", "num_local_experts"), sparse=first_dense(default=2), others=HEADS)
GLM = replace(
    family(
        "glm5-next",
        under="text_config",
        e=("n_routed_experts", "num_local_experts"),
        sparse=first_dense(default=3),
        activation=Activation("limited-swiglu", (None, "silu"), {"limit": ("swiglu_limit", 10.0)}),
        others=HEADS,
    ),
    elsewhere={"text_config": ()},
)

FORMATS = (
    hub(KIMI, "moonshotai/Kimi-Linear-48B-A3B-Instruct", numbered(SPARSE + "experts.")),
    memory(
        KIMI,
        fused(MLP + "experts."),
        {
            MLP + "gate.{rest}": SPARSE + "gate.{rest}",
            MLP + "shared_experts.{rest}": SPARSE + "shared_experts.{rest}",
            **{GATE + name: ATTENTION + name for name in ("f_a_proj.{rest}", "f_b_proj.{rest}", "dt_bias", "A_log")},
        },
        (Dense(ATTENTION + "conv1d.weight", tuple(ATTENTION + f"{x}_conv1d.weight" for x in "qkv"), QKV),),
    ),
    hub(LING, "inclusionAI/Ling-3.0-Flash", separate(MLP + "experts.")),
    memory(
        LING,
        fused(MLP + "experts."),
        {
            "model.embed_tokens.{rest}": "model.word_embeddings.{rest}",
            MLP + "gate.e_score_correction_bias": MLP + "gate.expert_bias",
            **{GATE + name: LAYER + "attention." + name for name in ("f_proj.{rest}", "dt_bias", "A_log")},
            ATTENTION + "o_proj.{rest}": LAYER + "attention.dense.{rest}",
            ATTENTION + "{rest}": LAYER + "attention.{rest}",
        },
        (Dense(ATTENTION + "conv1d.weight", tuple(LAYER + f"attention.{x}_conv1d.weight" for x in "qkv"), QKV),),
    ),
    hub(GLM, "zai-org/GLM-5.3-Flash", separate(NESTED + "mlp.experts.")),
    memory(
        GLM,
        fused(NESTED + "mlp.experts."),
        {
            **{NESTED + "self_attn.forget_gate." + name: NESTED + "self_attn." + name for name in ("f_a_proj.{rest}", "f_b_proj.{rest}", "dt_bias", "A_log")},
            **{NESTED + f"{part}_hc.{name}": NESTED + f"hc_{part}_{name}" for part in ("attn", "ffn") for name in ("fn", "base", "scale")},
        },
        (Dense(NESTED + "self_attn.conv1d.weight", tuple(NESTED + f"self_attn.{x}_conv1d.weight" for x in "qkv"), QKV),),
    ),
)
