"""Qwen3-MoE: one matrix each on the Hub; concatenated gate and up, all experts in one tensor, in transformers 5."""

from moeglot.format import Activation, Family, Format, SparseLayers
from moeglot.layout import Stored

FAMILY = Family(
    name="qwen3-moe",
    model_types=("qwen3_moe",),
    roles=("gate", "up", "down"),
    activation=Activation("swiglu"),
    sizes={"e": ("num_experts", "num_local_experts"), "h": ("hidden_size",), "i": ("moe_intermediate_size",)},
    sparse=SparseLayers(every="decoder_sparse_step", dense="mlp_only_layers"),
    source="https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/models/qwen3_moe/modeling_qwen3_moe.py",
)

EXPERTS = "model.layers.{layer}.mlp.experts."

HUB = Format(
    "qwen3-moe/hub",
    FAMILY,
    (
        Stored(EXPERTS + "{expert}.gate_proj.weight", ("gate",), "i h"),
        Stored(EXPERTS + "{expert}.up_proj.weight", ("up",), "i h"),
        Stored(EXPERTS + "{expert}.down_proj.weight", ("down",), "h i"),
    ),
    source="https://huggingface.co/Qwen/Qwen3-30B-A3B",
    about="the release on the Hub: one matrix each",
)

TRANSFORMERS_5 = Format(
    "qwen3-moe/transformers-5",
    FAMILY,
    (
        Stored(EXPERTS + "gate_up_proj", ("gate", "up"), "e (p i) h"),
        Stored(EXPERTS + "down_proj", ("down",), "e h i"),
    ),
    source="https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen3_moe/modeling_qwen3_moe.py",
    about="Qwen3MoeExperts in memory, and save_pretrained(save_original_format=False)",
    reads="transformers 5",
)

FORMATS = (HUB, TRANSFORMERS_5)
