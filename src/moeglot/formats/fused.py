"""The families whose releases hold all experts in one tensor as gate_up_proj and down_proj, in whichever orientation, and Jamba."""

from dataclasses import replace

from moeglot.family import Activation, SparseLayers
from moeglot.formats.lines import KINDS, LAYER, ROUTED, SILU, family, first_dense, fused, hub, linears, memory, separate, turned

BOTH = "the release on the Hub, and the experts module in memory: all experts in one tensor"
TURNED = "the release on the Hub, and the experts module in memory: [in, out]"
LIMITED = Activation("limited-swiglu", (None, "silu"), {"limit": ("swiglu_limit", 10.0)})

JAMBA = family(
    "jamba", e=("num_experts", "num_local_experts"), i="intermediate_size", sparse=SparseLayers(period="expert_layer_period", offset="expert_layer_offset")
)
LLAMA4 = family(
    "llama4-text",
    folder="llama4",
    e="num_local_experts",
    i="intermediate_size",
    sparse=SparseLayers(listed="moe_layers", every="interleave_moe_layer_step"),
)
ARIA = family("aria-text", folder="aria", e="moe_num_experts", i="intermediate_size", activation=SILU)
GEMMA4 = family("gemma4-text", folder="gemma4", e="num_experts", activation=Activation("swiglu", ("hidden_activation", "gelu_pytorch_tanh")))
MISTRAL4 = family("mistral4", e=ROUTED, sparse=first_dense())
ZAYA = family("zaya", e="num_experts", sparse=SparseLayers(kinds=KINDS))
HY_V4 = family("hy-v4", e=ROUTED, sparse=first_dense(default=1), activation=LIMITED)

FORMATS = (
    hub(JAMBA, "ai21labs/Jamba-v0.1", separate(LAYER + "feed_forward.experts.")),
    memory(JAMBA, fused(LAYER + "feed_forward.experts.")),
    hub(LLAMA4, "meta-llama/Llama-4-Scout-17B-16E", turned(LAYER + "feed_forward.experts."), TURNED),
    hub(ARIA, "rhymes-ai/Aria", turned(LAYER + "mlp.experts.", "fc1.weight", "fc2.weight"), "the release on the Hub: all experts in one tensor, [in, out]"),
    replace(memory(ARIA, turned(LAYER + "mlp.experts.")), says_transposed=True),
    hub(GEMMA4, "google/gemma-4-26B-A4B-it", fused(LAYER + "experts."), BOTH),
    linears(GEMMA4, separate(LAYER + "experts.")),
    hub(MISTRAL4, "mistralai/Mistral-Small-4-119B-2603", fused(LAYER + "mlp.experts."), BOTH),
    hub(ZAYA, "Zyphra/ZAYA1-8B", fused(LAYER + "mlp.experts."), BOTH),
    hub(HY_V4, "tencent/Hy4-preview", fused(LAYER + "mlp.experts."), "the release on the Hub: all experts in one tensor"),
    memory(
        HY_V4,
        fused(LAYER + "mlp.experts."),
        {
            **{f"model.hc_head.hc_{name}": f"model.hc_pre.hc_head.hc_head_{name}" for name in ("base", "fn", "scale")},
            **{LAYER + f"attn_hc.{name}": LAYER + f"hc_pre.hc_attn_layer.hc_{name}" for name in ("base", "fn", "scale")},
            **{LAYER + f"ffn_hc.{name}": LAYER + f"hc_pre.hc_mlp_layer.hc_{name}" for name in ("base", "fn", "scale")},
            **{LAYER + part + "gate_proj.{rest}": LAYER + part + "linear_gate.{rest}" for part in ("mlp.", "mlp.shared_experts.", "self_attn.")},
            LAYER + "self_attn.sinks": LAYER + "self_attn.learnable_sink_param",
        },
    ),
)
