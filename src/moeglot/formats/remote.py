"""Families whose modelling code lies on the Hub beside their weights, not in transformers: mlx-lm computes with some, the others are unverified."""

from dataclasses import replace

from moeglot.family import Activation, SparseLayers
from moeglot.formats.lines import LAYER, family, first_dense, hub, numbered, separate
from moeglot.layout import Stored

REMOTE = "its code lies on the Hub and was not run here"
LIMITED = Activation("capped-swiglu", numbers={"limit": ("swiglu_limits", float("inf"))})


KIMI_K2 = replace(family("kimi-k2", e="n_routed_experts", sparse=first_dense(default=1)), source="https://huggingface.co/moonshotai/Kimi-K2-Instruct")
LING = replace(family("bailing-moe", e="num_experts", sparse=first_dense()), source="https://huggingface.co/inclusionAI/Ling-lite")
LING_2 = replace(family("bailing-moe-v2", e="num_experts", sparse=first_dense()), unverified=REMOTE, source="https://huggingface.co/inclusionAI/Ling-mini-2.0")
MINIMAX = replace(
    family("minimax-text-01", model_type="minimax_text_01", e="num_local_experts", i="intermediate_size"),
    unverified=REMOTE,
    source="https://huggingface.co/MiniMaxAI/MiniMax-Text-01",
)
STEP = replace(
    family("step3p5", e="moe_num_experts", sparse=SparseLayers(listed="moe_layers_enum"), activation=LIMITED),
    source="https://huggingface.co/stepfun-ai/Step-3.5-Flash",
)

FORMATS = (
    hub(KIMI_K2, "moonshotai/Kimi-K2-Instruct", separate(LAYER + "mlp.experts.")),
    hub(LING, "inclusionAI/Ling-lite", separate(LAYER + "mlp.experts.")),
    hub(LING_2, "inclusionAI/Ling-mini-2.0", separate(LAYER + "mlp.experts.")),
    hub(MINIMAX, "MiniMaxAI/MiniMax-Text-01", numbered(LAYER + "block_sparse_moe.experts.")),
    hub(
        STEP,
        "stepfun-ai/Step-3.5-Flash",
        (
            Stored(LAYER + "moe.gate_proj.weight", ("gate",), "e i h"),
            Stored(LAYER + "moe.up_proj.weight", ("up",), "e i h"),
            Stored(LAYER + "moe.down_proj.weight", ("down",), "e h i"),
        ),
        "the release on the Hub: all experts in one tensor for each matrix",
    ),
)
