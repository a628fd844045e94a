"""Granite and JetMoE: all experts in one tensor on the Hub too, gate's rows before up's, as input_linear and output_linear."""

from dataclasses import replace

from moeglot.family import Activation
from moeglot.formats.lines import LAYER, family, fused, hub, linears, memory, separate

SPARSE = LAYER + "block_sparse_moe."
ROUTER = {SPARSE + "router.{rest}": SPARSE + "router.layer.{rest}"}
LINEAR = ("input_linear.weight", "output_linear.weight")
ABOUT = "the release on the Hub: all experts in one tensor"

GRANITE = family("granitemoe", e="num_local_experts", i="intermediate_size")
SHARED = family("granitemoeshared", e="num_local_experts", i="intermediate_size")
HYBRID = replace(
    family("granitemoehybrid", e="num_local_experts", i="intermediate_size"),
    words={"layer_types": {"linear_attention": "mamba", "full_attention": "attention"}},
)
SWA = family("granitemoe-swa", e="num_local_experts", i="intermediate_size")
JETMOE = family("jetmoe", e="num_local_experts", i="intermediate_size", activation=Activation("swiglu", ("activation_function", "silu")))

FORMATS = (
    hub(GRANITE, "ibm-granite/granite-3.1-3b-a800m-base", fused(SPARSE, *LINEAR), ABOUT),
    memory(GRANITE, fused(SPARSE + "experts."), ROUTER),
    linears(GRANITE, separate(SPARSE + "experts.")),
    hub(SHARED, "ibm-research/moe-7b-1b-active-shared-experts", fused(SPARSE, *LINEAR), ABOUT),
    memory(SHARED, fused(SPARSE + "experts."), ROUTER),
    hub(HYBRID, "ibm-granite/granite-4.0-h-tiny", fused(SPARSE, *LINEAR), ABOUT),
    memory(HYBRID, fused(SPARSE + "experts."), ROUTER),
    hub(SWA, "ibm-granite/granite-swash-3b-a600m", fused(SPARSE + "experts."), "the release on the Hub, and the experts module in memory"),
    hub(
        JETMOE,
        "jetmoe/jetmoe-8b",
        fused(LAYER + "mlp.", *LINEAR),
        "the release on the Hub, and the module in memory; the experts of its attention are left as they are",
    ),
)
