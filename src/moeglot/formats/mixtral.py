"""Mixtral: w1 is gate, w3 is up, w2 is down; transformers 5 renames the block and concatenates gate and up."""

from moeglot.format import Activation, Dense, Family, Format
from moeglot.layout import Stored

FAMILY = Family(
    name="mixtral",
    model_types=("mixtral",),
    roles=("gate", "up", "down"),
    activation=Activation("swiglu"),
    sizes={"e": ("num_local_experts", "num_experts"), "h": ("hidden_size",), "i": ("intermediate_size",)},
    source="https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/models/mixtral/modeling_mixtral.py",
)

SPARSE = "model.layers.{layer}.block_sparse_moe."
MLP = "model.layers.{layer}.mlp."

HUB = Format(
    "mixtral/hub",
    FAMILY,
    (
        Stored(SPARSE + "experts.{expert}.w1.weight", ("gate",), "i h"),
        Stored(SPARSE + "experts.{expert}.w3.weight", ("up",), "i h"),
        Stored(SPARSE + "experts.{expert}.w2.weight", ("down",), "h i"),
    ),
    source="https://huggingface.co/mistralai/Mixtral-8x7B-v0.1",
    about="the release on the Hub: one matrix each",
)

TRANSFORMERS_5 = Format(
    "mixtral/transformers-5",
    FAMILY,
    (
        Stored(MLP + "experts.gate_up_proj", ("gate", "up"), "e (p i) h"),
        Stored(MLP + "experts.down_proj", ("down",), "e h i"),
    ),
    source="https://github.com/huggingface/transformers/blob/main/src/transformers/models/mixtral/modeling_mixtral.py",
    about="MixtralExperts in memory, and save_pretrained(save_original_format=False)",
    reads="transformers 5",
    dense=(Dense(MLP + "gate.weight", (SPARSE + "gate.weight",)),),
)

FORMATS = (HUB, TRANSFORMERS_5)
