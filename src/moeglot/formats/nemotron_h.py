"""Nemotron-H and Nemotron-3: no gate, relu², and where there is a latent size, experts that read and write that instead of the hidden state."""

from moeglot.family import Activation, Family, SparseLayers
from moeglot.formats.lines import LAYER, MODELS, hub, memory
from moeglot.layout import Stored

FAMILY = Family(
    name="nemotron-h",
    model_types=("nemotron_h",),
    roles=("up", "down"),
    activation=Activation("ungated", ("mlp_hidden_act", "relu2")),
    sizes={"e": ("n_routed_experts", "num_local_experts"), "h": ("moe_latent_size", "hidden_size"), "i": ("moe_intermediate_size",)},
    sparse=SparseLayers(kinds=("layers_block_type", "hybrid_override_pattern")),
    source=MODELS + "nemotron_h/modeling_nemotron_h.py",
    first_wins=("h",),
    words={key: {"linear_attention": "mamba", "full_attention": "attention"} for key in ("layers_block_type", "mtp_layers_block_type")},
)

EXPERTS = "backbone.layers.{layer}.mixer.experts.{expert}."
MEMORY = LAYER + "mixer.experts."

FORMATS = (
    hub(
        FAMILY,
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        (Stored(EXPERTS + "up_proj.weight", ("up",), "i h"), Stored(EXPERTS + "down_proj.weight", ("down",), "h i")),
    ),
    memory(
        FAMILY,
        (Stored(MEMORY + "up_proj", ("up",), "e i h"), Stored(MEMORY + "down_proj", ("down",), "e h i")),
        {"model.{rest}": "backbone.{rest}"},
    ),
)
