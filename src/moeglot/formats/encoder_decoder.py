"""Switch Transformers and NLLB-MoE: an encoder and a decoder, each with experts, in the layers of the same numbers."""

from dataclasses import replace

from moeglot.family import Activation, SparseLayers
from moeglot.formats.lines import family, hub, second
from moeglot.layout import SECOND, Stored

MATRICES, BIASES = ("up", "down"), ("up_bias", "down_bias")
SWITCH = replace(
    family(
        "switch-transformers",
        e="num_experts",
        h=("d_model", "hidden_size"),
        i="d_ff",
        others={"j": "d_ff"},
        sparse=SparseLayers(count="num_layers", period="encoder_sparse_step", offset=1),
        activation=Activation("ungated", ("dense_act_fn", "relu")),
    ),
    roles=(*MATRICES, *(SECOND + role for role in MATRICES)),
    second=SparseLayers(count="num_decoder_layers", period="decoder_sparse_step", offset=1),
)
NLLB = replace(
    family(
        "nllb-moe",
        model_type="nllb-moe",
        folder="nllb_moe",
        e="num_experts",
        h=("d_model", "hidden_size"),
        i="encoder_ffn_dim",
        others={"j": "decoder_ffn_dim"},
        sparse=SparseLayers(count="encoder_layers", every="encoder_sparse_step"),
        activation=Activation("ungated", ("activation_function", "relu")),
    ),
    roles=(*MATRICES, *BIASES, *(SECOND + role for role in (*MATRICES, *BIASES))),
    second=SparseLayers(count="decoder_layers", every="decoder_sparse_step"),
)

ABOUT = "the release on the Hub, and the modules in memory: one matrix each"
EXPERT = ".experts.expert_{expert}."
SWITCH_ENCODER, SWITCH_DECODER = (
    (Stored(mlp + EXPERT + "wi.weight", ("up",), "i h"), Stored(mlp + EXPERT + "wo.weight", ("down",), "h i"))
    for mlp in ("encoder.block.{layer}.layer.1.mlp", "decoder.block.{layer}.layer.2.mlp")
)
NLLB_ENCODER, NLLB_DECODER = (
    (
        Stored(ffn + EXPERT + "fc1.weight", ("up",), "i h"),
        Stored(ffn + EXPERT + "fc2.weight", ("down",), "h i"),
        Stored(ffn + EXPERT + "fc1.bias", ("up_bias",), "i"),
        Stored(ffn + EXPERT + "fc2.bias", ("down_bias",), "h"),
    )
    for ffn in ("model.encoder.layers.{layer}.ffn", "model.decoder.layers.{layer}.ffn")
)

FORMATS = (
    hub(SWITCH, "google/switch-base-8", (*SWITCH_ENCODER, *second(SWITCH_DECODER)), ABOUT),
    hub(NLLB, "facebook/nllb-moe-54b", (*NLLB_ENCODER, *second(NLLB_DECODER)), ABOUT),
)
