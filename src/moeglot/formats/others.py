"""Families with a layout or a name of their own: Step-3.7, Inkling, Muse Spark, dots3, Qwen3-Omni, LongCat, NeMo's speech models."""

from dataclasses import replace

from moeglot.family import Activation, SparseLayers
from moeglot.format import Format
from moeglot.formats import nemotron_h, text_only
from moeglot.formats.lines import EXPERTS, KINDS, LAYER, NESTED, QWEN, ROUTED, each, family, first_dense, fused, hub, memory, nested, release_5_5, separate
from moeglot.layout import Stored

INTERLEAVED = "the release on the Hub: gate and up interleaved"
VISION = "its vision tower joins, cuts or turns matrices that the Hub stores otherwise"
SHARED = "its shared experts, too, are interleaved on the Hub and not in memory"
NUMBERED = "the layers of its residual attention are numbered from 1 on the Hub"
TALKER = "its talker has experts of another size, which would stay as they are"

STEP = family(
    "step3p7",
    under="text_config",
    e=(*ROUTED, "moe_num_experts"),
    sparse=SparseLayers(kinds=KINDS, listed="moe_layers_enum", first=("first_k_dense_replace", 3)),
    activation=Activation("capped-swiglu", (None, "silu"), {"limit": ("swiglu_limits", float("inf"))}),
)
SOFTCAPPED = Activation("softcapped-swiglu", numbers={"gate_cap": ("mlp_gate_softcap", 4.0), "up_cap": ("mlp_up_softcap", 25.0)})
INKLING = replace(
    nested(text_only.INKLING, "text_config"),
    name="inkling",
    model_types=("inkling_mm_model",),
    unverified="no tiny model of it could be built; its text model, inkling-text, is verified",
)
INKLING2 = family("inkling2", under="text_config", e=ROUTED, i=("moe_intermediate_size", "intermediate_size"), activation=SOFTCAPPED)
INKLING2_TEXT = family("inkling2-text", folder="inkling2", e=ROUTED, i=("moe_intermediate_size", "intermediate_size"), activation=SOFTCAPPED)
MUSE = family("muse-spark", under="text_config", e="num_local_experts", h="moe_hidden_size", sparse=SparseLayers(kinds=KINDS))
DOTS3 = replace(family("dots3-note", under="text_config", e=ROUTED, sparse=first_dense(default=1)), elsewhere={"text_config": ()})
DOTS3_TEXT = family("dots3-note-text", folder="dots3_note", e=ROUTED, sparse=first_dense(default=1))
OMNI = family("qwen3-omni-moe", under="thinker_config.text_config", e=EXPERTS, sparse=QWEN)
THINKER = family("qwen3-omni-moe-thinker", folder="qwen3_omni_moe", under="text_config", e=EXPERTS, sparse=QWEN)
LONGCAT = replace(
    family("longcat-flash", e=ROUTED, i=("expert_ffn_hidden_size", "moe_intermediate_size"), sparse=SparseLayers(count="num_layers")), idle="zero_expert_num"
)
SPEECH = nested(replace(nemotron_h.FAMILY, name="nemo-speechlm", model_types=("nemo_speechlm",)), "text_config")

SPEECH_HUB, SPEECH_MEMORY = "llm.model.layers.{layer}.mixer.experts.", NESTED + "mixer.experts."
INKLING_HUB = (
    Stored("model.llm.layers.{layer}.mlp.experts.w13_weight", ("gate", "up"), "e (i p) h"),
    Stored("model.llm.layers.{layer}.mlp.experts.w2_weight", ("down",), "e h i"),
)

OMNI_MEMORY = memory(OMNI, fused("thinker." + NESTED + "mlp.experts."), alone=TALKER)

FORMATS = (
    hub(
        STEP,
        "stepfun-ai/Step-3.7-Flash",
        (
            Stored(LAYER + "moe.gate_proj.weight", ("gate",), "e i h"),
            Stored(LAYER + "moe.up_proj.weight", ("up",), "e i h"),
            Stored(LAYER + "moe.down_proj.weight", ("down",), "e h i"),
        ),
        "the release on the Hub: all experts in one tensor for each matrix",
    ),
    memory(STEP, fused(NESTED + "mlp.experts."), alone=VISION),
    hub(
        INKLING,
        "thinkingmachines/Inkling",
        INKLING_HUB,
        INTERLEAVED,
    ),
    memory(INKLING, fused(NESTED + "mlp.experts."), alone=SHARED),
    hub(
        INKLING2,
        "thinkingmachines/Inkling-2-Small-MXFP8",
        INKLING_HUB,
        INTERLEAVED,
    ),
    memory(INKLING2, fused(NESTED + "mlp.experts."), alone=NUMBERED),
    hub(
        INKLING2_TEXT,
        "thinkingmachines/Inkling-2-Small-MXFP8",
        INKLING_HUB,
        INTERLEAVED,
    ),
    memory(INKLING2_TEXT, fused(LAYER + "mlp.experts."), alone=NUMBERED),
    hub(
        MUSE,
        "meta-models/Muse-Spark-Open-816B-A42B",
        fused(NESTED + "mlp.experts."),
        "the release on the Hub, and the experts module in memory",
        (NESTED + "mlp.experts.post_expert_norm.weight",),
    ),
    hub(DOTS3, "dots-studio/dots3-note-prev", separate(LAYER + "mlp.experts.")),
    memory(DOTS3, fused(NESTED + "mlp.experts."), alone="its vision tower has experts of its own, which are joined in memory"),
    hub(DOTS3_TEXT, "dots-studio/dots3-note-prev", separate(LAYER + "mlp.experts.")),
    memory(DOTS3_TEXT, fused(LAYER + "mlp.experts.")),
    hub(OMNI, "Qwen/Qwen3-Omni-30B-A3B-Instruct", separate("thinker.model.layers.{layer}.mlp.experts.")),
    OMNI_MEMORY,
    release_5_5(
        OMNI_MEMORY, fused("thinker." + LAYER + "mlp.experts."), "the experts module in memory of 5.5, and save_pretrained(save_original_format=False)"
    ),
    hub(THINKER, "Qwen/Qwen3-Omni-30B-A3B-Thinking", separate(LAYER + "mlp.experts.")),
    memory(
        THINKER,
        fused(NESTED + "mlp.experts."),
        {f"model.language_model.{part}.{{rest}}": f"model.{part}.{{rest}}" for part in ("embed_tokens", "layers", "norm")}
        | {f"model.{part}.{{rest}}": f"{part}.{{rest}}" for part in ("audio_tower", "visual")},
    ),
    hub(LONGCAT, "meituan-longcat/LongCat-Flash-Chat", separate(LAYER + "mlp.experts.")),
    memory(LONGCAT, fused(LAYER + "mlp.experts.")),
    Format(
        "nemo-speechlm/hub",
        SPEECH,
        (Stored(SPEECH_HUB + "gate_and_up_projs", ("up",), "e h i"), Stored(SPEECH_HUB + "down_projs", ("down",), "e i h")),
        SPEECH.source,
        "what transformers' conversion reads: all experts in one tensor, [in, out]",
    ),
    each(SPEECH, (Stored(SPEECH_HUB + "{expert}.up_proj.weight", ("up",), "i h"), Stored(SPEECH_HUB + "{expert}.down_proj.weight", ("down",), "h i"))),
    memory(SPEECH, (Stored(SPEECH_MEMORY + "up_proj", ("up",), "e i h"), Stored(SPEECH_MEMORY + "down_proj", ("down",), "e h i")), alone=VISION),
)
