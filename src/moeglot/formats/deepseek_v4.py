"""DeepSeek-V4: w1, w3, w2 below `ffn`, a limit on gate and up, and three sets of names: the Hub's, transformers' version of them, and memory's."""

from moeglot.family import Activation, SparseLayers
from moeglot.format import Dense, Format
from moeglot.formats.lines import KINDS, LAYER, family, fused, hub, memory, numbered

FAMILY = family(
    "deepseek-v4",
    e=("n_routed_experts", "num_local_experts"),
    i=("moe_intermediate_size", "intermediate_size"),
    sparse=SparseLayers(kinds=KINDS),
    activation=Activation("limited-swiglu", numbers={"limit": ("swiglu_limit", 10.0)}),
)

HUB = "layers.{layer}."
ATTENTION, INDEXER = LAYER + "self_attn.", LAYER + "self_attn.compressor.indexer."
ROOT = {
    "model.embed_tokens.{rest}": "embed.{rest}",
    "model.norm.{rest}": "norm.{rest}",
    "model.hc_head.hc_fn": "hc_head_fn",
    "model.hc_head.hc_base": "hc_head_base",
    "model.hc_head.hc_scale": "hc_head_scale",
}
COMPRESSOR = {"gate_proj.{rest}": "wgate.{rest}", "kv_proj.{rest}": "wkv.{rest}", "kv_norm.{rest}": "norm.{rest}", "position_bias": "ape"}
LAYERS = {
    **{INDEXER + here: HUB + "attn.indexer.compressor." + there for here, there in COMPRESSOR.items()},
    INDEXER + "scorer.weights_proj.{rest}": HUB + "attn.indexer.weights_proj.{rest}",
    INDEXER + "q_b_proj.{rest}": HUB + "attn.indexer.wq_b.{rest}",
    **{ATTENTION + "compressor." + here: HUB + "attn.compressor." + there for here, there in COMPRESSOR.items()},
    ATTENTION + "kv_proj.{rest}": HUB + "attn.wkv.{rest}",
    ATTENTION + "kv_norm.{rest}": HUB + "attn.kv_norm.{rest}",
    ATTENTION + "o_a_proj.{rest}": HUB + "attn.wo_a.{rest}",
    ATTENTION + "o_b_proj.{rest}": HUB + "attn.wo_b.{rest}",
    ATTENTION + "q_a_norm.{rest}": HUB + "attn.q_norm.{rest}",
    ATTENTION + "q_a_proj.{rest}": HUB + "attn.wq_a.{rest}",
    ATTENTION + "q_b_proj.{rest}": HUB + "attn.wq_b.{rest}",
    ATTENTION + "sinks": HUB + "attn.attn_sink",
    **{LAYER + f"{part}_hc.{name}": HUB + f"hc_{part}_{name}" for part in ("attn", "ffn") for name in ("fn", "base", "scale")},
    LAYER + "input_layernorm.{rest}": HUB + "attn_norm.{rest}",
    LAYER + "post_attention_layernorm.{rest}": HUB + "ffn_norm.{rest}",
    LAYER + "mlp.gate.e_score_correction_bias": HUB + "ffn.gate.bias",
    LAYER + "mlp.gate.{rest}": HUB + "ffn.gate.{rest}",
    LAYER + "mlp.shared_experts.gate_proj.{rest}": HUB + "ffn.shared_experts.w1.{rest}",
    LAYER + "mlp.shared_experts.down_proj.{rest}": HUB + "ffn.shared_experts.w2.{rest}",
    LAYER + "mlp.shared_experts.up_proj.{rest}": HUB + "ffn.shared_experts.w3.{rest}",
}

TRANSFORMERS = Format(
    "deepseek-v4/transformers",
    FAMILY,
    numbered(LAYER + "ffn.experts."),
    FAMILY.source,
    "what save_pretrained writes: the names of the release below `model.`, but for the attention's kv_norm",
    tuple(Dense(here, (there,)) for here, there in {**ROOT, LAYER + "attn.norm.{rest}": HUB + "attn.kv_norm.{rest}", LAYER + "{rest}": HUB + "{rest}"}.items()),
    reads="transformers 5",
)

FORMATS = (
    hub(FAMILY, "deepseek-ai/DeepSeek-V4-Flash-Base", numbered(HUB + "ffn.experts.")),
    TRANSFORMERS,
    memory(FAMILY, fused(LAYER + "mlp.experts."), {**ROOT, "lm_head.{rest}": "head.{rest}", **LAYERS}),
)
