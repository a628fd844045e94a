"""openai/privacy-filter: gpt-oss's twin, whose gate and up are concatenated; no key and no shape tells them apart, only config.json's model_type."""

from dataclasses import replace

from moeglot.family import Activation
from moeglot.formats.lines import LAYER, family, hub, turned
from moeglot.layout import Stored

EXPERTS = LAYER + "mlp.experts."

FAMILY = family(
    "openai-privacy-filter",
    e=("num_local_experts", "num_experts"),
    i="intermediate_size",
    roles=("gate", "up", "down", "gate_bias", "up_bias", "down_bias"),
    activation=Activation("clamped-swiglu", (None, "silu"), {"alpha": ("swiglu_alpha", 1.702), "limit": ("swiglu_limit", 7.0)}),
)

RELEASE = hub(
    FAMILY,
    "openai/privacy-filter",
    (
        *turned(EXPERTS),
        Stored(EXPERTS + "gate_up_proj_bias", ("gate_bias", "up_bias"), "e (p i)"),
        Stored(EXPERTS + "down_proj_bias", ("down_bias",), "e h"),
    ),
    "the release on the Hub, and the experts module in memory: [in, out]",
)

FORMATS = (replace(RELEASE, says_transposed=True),)
