"""ERNIE-4.5-VL: in each layer as many experts for images as for text, numbered after those on the Hub, smaller, and chosen by a router of their own."""

from dataclasses import replace

from moeglot.family import SparseLayers
from moeglot.formats.lines import GATED, KINDS, LAYER, NESTED, family, fused, hub, memory, second, separate
from moeglot.layout import BEHIND, SECOND

FAMILY = replace(
    family(
        "ernie4-5-vl-moe",
        model_type="ernie4_5_vl_moe",
        under="text_config",
        e=("moe_num_experts", "num_experts"),
        i="moe_intermediate_size.0",
        others={"j": "moe_intermediate_size.1"},
        sparse=SparseLayers(kinds=KINDS, first=("moe_layer_start_index", 1), last="moe_layer_end_index", every="moe_layer_interval"),
    ),
    roles=(*GATED, *(SECOND + role for role in GATED)),
)

ONE_EACH = separate(LAYER + "mlp.experts.")

FORMATS = (
    hub(FAMILY, "baidu/ERNIE-4.5-VL-28B-A3B-PT", (*ONE_EACH, *second(ONE_EACH, BEHIND)), "the release on the Hub: one matrix each, text before images"),
    memory(
        FAMILY,
        (*fused(NESTED + "mlp.text_moe.experts."), *second(fused(NESTED + "mlp.vision_moe.experts."))),
        alone="its routers are turned in memory, and their biases are cut in two",
    ),
)
