"""DBRX: all experts' rows one after another in one matrix, without an axis of their own; w1 is gate, v1 is up, and w2 is down turned."""

from dataclasses import replace

from moeglot.family import Activation, SparseLayers
from moeglot.formats.lines import family, hub
from moeglot.layout import Stored

EXPERTS = "transformer.blocks.{layer}.ffn.experts.mlp."

FEED_FORWARD = ("ffn_act_fn", "ffn_hidden_size", "moe_num_experts", "moe_top_k", "moe_jitter_eps", "moe_loss_weight", "moe_normalize_expert_weights")
FAMILY = replace(
    family(
        "dbrx",
        e="ffn_config.moe_num_experts",
        h="d_model",
        i="ffn_config.ffn_hidden_size",
        sparse=SparseLayers(count="n_layers"),
        activation=Activation("swiglu", ("ffn_config.ffn_act_fn.name", "silu")),
    ),
    parts={"ffn_config": FEED_FORWARD, "attn_config": ("attn_pdrop", "clip_qkv", "kv_n_heads", "rope_theta")},
)

FORMATS = (
    hub(
        FAMILY,
        "databricks/dbrx-base",
        (
            Stored(EXPERTS + "w1", ("gate",), "(e i) h"),
            Stored(EXPERTS + "v1", ("up",), "(e i) h"),
            Stored(EXPERTS + "w2", ("down",), "(e i) h"),
        ),
        "the release on the Hub, and the module in memory: [e × i, h]",
    ),
)
