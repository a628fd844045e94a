"""DeepSeek-V4: w1, w3, w2 below `ffn`, a limit on gate and up, and a Hub layout without the prefix `model.` that transformers writes."""

from moeglot.format import Activation, SparseLayers
from moeglot.formats.lines import LAYER, family, fused, hub, memory, numbered

FAMILY = family(
    "deepseek-v4",
    e=("n_routed_experts", "num_local_experts"),
    i=("moe_intermediate_size", "intermediate_size"),
    sparse=SparseLayers(kinds=("mlp_layer_types",)),
    activation=Activation("limited-swiglu", numbers={"limit": ("swiglu_limit", 10.0)}),
)

FORMATS = (
    hub(FAMILY, "deepseek-ai/DeepSeek-V4-Flash-Base", numbered("layers.{layer}.ffn.experts.")),
    memory(FAMILY, fused(LAYER + "mlp.experts.")),
)
