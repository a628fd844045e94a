"""How the families of this folder say the same few things: the lines of an expert, a family's sizes, a Hub format and its twin in transformers 5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moeglot.family import Activation, Family, SparseLayers
from moeglot.format import Dense, Format, TorchDist
from moeglot.layout import SECOND, Stored

LAYER = "model.layers.{layer}."
NESTED = "model.language_model.layers.{layer}."
GATED = ("gate", "up", "down")
SWIGLU = Activation("swiglu")
KINDS = ("mlp_layer_types",)
MODELS = "https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/"


def separate(experts: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> tuple[Stored, ...]:
    """One matrix each, [out, in]: EXPERTS{expert}.GATE.weight and so on."""
    each = experts + "{expert}."
    return (
        Stored(f"{each}{gate}.weight", ("gate",), "i h"),
        Stored(f"{each}{up}.weight", ("up",), "i h"),
        Stored(f"{each}{down}.weight", ("down",), "h i"),
    )


def numbered(experts: str) -> tuple[Stored, ...]:
    """One matrix each, by Mixtral's names: w1 is gate, w3 is up, w2 is down."""
    return separate(experts, "w1", "w3", "w2")


def fused(experts: str, gate_up: str = "gate_up_proj", down: str = "down_proj") -> tuple[Stored, ...]:
    """All experts in one tensor, gate's rows before up's, [out, in]."""
    return Stored(experts + gate_up, ("gate", "up"), "e (p i) h"), Stored(experts + down, ("down",), "e h i")


def second(lines: tuple[Stored, ...], offset: int = 0) -> tuple[Stored, ...]:
    """The lines of a second group of experts, whose intermediate size is j. `offset`: BEHIND where they are numbered after the first group's."""
    return tuple(replace(line, roles=tuple(SECOND + role for role in line.roles), axes=line.axes.replace("i", "j"), offset=offset) for line in lines)


def turned(experts: str, gate_up: str = "gate_up_proj", down: str = "down_proj") -> tuple[Stored, ...]:
    """All experts in one tensor, gate's columns before up's, [in, out]."""
    return Stored(experts + gate_up, ("gate", "up"), "e h (p i)"), Stored(experts + down, ("down",), "e i h")


def first_dense(key: str = "first_k_dense_replace", default: int = 0, count: str = "num_hidden_layers") -> SparseLayers:
    """The layers that transformers 5 lists by kind; else all but the first few, and of those every `moe_layer_freq`-th."""
    return SparseLayers(count, kinds=(*KINDS, "moe_layer_freq"), first=(key, default), period="moe_layer_freq")


QWEN = SparseLayers(every="decoder_sparse_step", dense="mlp_only_layers")


def family(
    name: str,
    *,
    e: str | tuple[str, ...],
    i: str | tuple[str, ...] = "moe_intermediate_size",
    h: str | tuple[str, ...] = "hidden_size",
    sparse: SparseLayers = SparseLayers(),  # noqa: B008  # a frozen value
    activation: Activation = SWIGLU,
    roles: tuple[str, ...] = GATED,
    model_type: str | None = None,
    folder: str | None = None,
    under: str = "",
    others: Mapping[str, str | tuple[str, ...]] | None = None,
) -> Family:
    """A family by its config keys, all of them below the key `under` ("text_config") if that is given.

    `folder`: its name among transformers' models; `others`: letters that size what is no expert, and their keys.
    """
    model_type = model_type or name.replace("-", "_")
    folder = folder or model_type
    keys = {letter: (key,) if isinstance(key, str) else key for letter, key in {"e": e, "h": h, "i": i, **(others or {})}.items()}
    found = Family(name, (model_type,), roles, activation, keys, sparse, source=f"{MODELS}{folder}/modeling_{folder}.py")
    return nested(found, under) if under else found


def nested(plain: Family, under: str) -> Family:
    """The family with every config key below another: `"text_config"` -> `"text_config.hidden_size"`."""
    sparse, activation = plain.sparse, plain.activation
    return replace(
        plain,
        sizes={letter: _all_below(keys, under) for letter, keys in plain.sizes.items()},
        sparse=replace(
            sparse,
            count=f"{under}.{sparse.count}",
            kinds=_all_below(sparse.kinds, under),
            first=sparse.first and (f"{under}.{sparse.first[0]}", sparse.first[1]),
            listed=_below(sparse.listed, under),
            last=_below(sparse.last, under),
            every=_below(sparse.every, under),
            period=_below(sparse.period, under),
            offset=_below(sparse.offset, under) if isinstance(sparse.offset, str) else sparse.offset,
            dense=_below(sparse.dense, under),
        ),
        activation=replace(
            activation,
            function=(activation.function[0] and f"{under}.{activation.function[0]}", activation.function[1]),
            numbers={name: (f"{under}.{key}", default) for name, (key, default) in activation.numbers.items()},
        ),
    )


def _below(key: str | None, under: str) -> str | None:
    return key and f"{under}.{key}"


def _all_below(keys: tuple[str, ...], under: str) -> tuple[str, ...]:
    return tuple(f"{under}.{key}" for key in keys)


def hub(
    family: Family, repository: str, lines: tuple[Stored, ...], about: str = "the release on the Hub: one matrix each", beside: tuple[str, ...] = ()
) -> Format:
    """The format of a release: `"deepseek-ai/DeepSeek-V3"` is its repository on the Hub.

    `beside`: tensors that are no experts although they are named as if they were.
    """
    return Format(f"{family.name}/hub", family, lines, f"https://huggingface.co/{repository}", about, tuple(Dense(name, (name,)) for name in beside))


def each(family: Family, lines: tuple[Stored, ...]) -> Format:
    """What derivatives of a fused release, and `save_pretrained`, store: one matrix each."""
    return Format(
        f"{family.name}/per-expert", family, lines, family.source, "what save_pretrained writes, and some derivatives: one matrix each", reads="transformers 5"
    )


def memory(family: Family, lines: tuple[Stored, ...], renamed: Mapping[str, str] | None = None, packed: tuple[Dense, ...] = (), alone: str = "") -> Format:
    """The modules of transformers 5, which are also what `save_pretrained(save_original_format=False)` writes.

    `renamed`: the name of a tensor that is no expert here -> its name on the Hub; `packed`: lines for those that are joined here;
    `alone`: why those tensors cannot be told in the Hub's form, if so.
    """
    dense = (*packed, *(Dense(key, (name,)) for key, name in (renamed or {}).items()))
    about = "the experts module in memory, and save_pretrained(save_original_format=False)"
    return Format(f"{family.name}/transformers-5", family, lines, family.source, about, dense, reads="transformers 5", alone=alone)


def release_5_5(form: Format, lines: tuple[Stored, ...], about: str, renamed: Mapping[str, str] | None = None) -> Format:
    """The twin of a format in memory that transformers 5.5 has otherwise."""
    dense = tuple(Dense(key, (name,)) for key, name in (renamed or {}).items())
    return replace(form, name=f"{form.family.name}/transformers-5.5", stored=lines, about=about, dense=dense, reads="transformers 5.5")


def usual(family: Family, repository: str, renamed: Mapping[str, str] | None = None, layer: str = LAYER) -> tuple[Format, Format]:
    """One matrix each on the Hub, fused in transformers 5, under the same prefix. `renamed`: as in `memory`, within a layer."""
    experts = layer + "mlp.experts."
    names = {layer + key: layer + name for key, name in (renamed or {}).items()}
    beside = tuple(name for name in names.values() if name.startswith(experts))
    return hub(family, repository, separate(experts), beside=beside), memory(family, fused(experts), names)


MEGATRON = "decoder.layers.{layer}."
HEADS = ("num_attention_heads", "num_key_value_heads", "num_key_value_heads")
MEGATRON_SOURCE = "https://github.com/NVIDIA/Megatron-LM/tree/core_v0.16.1/megatron/core/transformer"


def megatron(family: Family, router: str, attention: Mapping[str, str], biased: bool = False) -> tuple[Format, ...]:
    """Megatron-Core's formats of a family: its state dicts with SequentialMLP and TEGroupedMLP, and its torch_dist checkpoints, by the names that the layers
    of transformer-engine have there and by those of the local ones.

    `router`: its name in a layer on the Hub; `attention`: what the attention of this family has beyond projections, here -> on the Hub;
    `biased`: experts have biases.
    """
    fused_norm, own_norm, local_norm = "self_attention.linear_qkv.layer_norm_weight", "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"
    of_attention = tuple(Dense(MEGATRON + here, (LAYER + there,)) for here, there in attention.items())

    def dense(input_norm: str, mlp_norm: str) -> tuple[Dense, ...]:
        qkv = tuple(LAYER + f"self_attn.{x}_proj." for x in "qkv")
        return (
            Dense("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), padded="vocab_size"),
            Dense("output_layer.weight", ("lm_head.weight",), padded="vocab_size"),
            Dense("decoder.final_layernorm.weight", ("model.norm.weight",)),
            Dense(MEGATRON + input_norm, (LAYER + "input_layernorm.weight",)),
            Dense(MEGATRON + "self_attention.linear_qkv.weight", tuple(key + "weight" for key in qkv), heads=HEADS),
            Dense(MEGATRON + "self_attention.linear_qkv.bias", tuple(key + "bias" for key in qkv), heads=HEADS),
            *of_attention,
            Dense(MEGATRON + "self_attention.linear_proj.{rest}", (LAYER + "self_attn.o_proj.{rest}",)),
            Dense(MEGATRON + mlp_norm, (LAYER + "post_attention_layernorm.weight",)),
            Dense(MEGATRON + "mlp.router.{rest}", (LAYER + router + ".{rest}",)),
        )

    def lines(experts: str) -> tuple[Stored, ...]:
        first, second = MEGATRON + experts.format("linear_fc1"), MEGATRON + experts.format("linear_fc2")
        weights = (Stored(first.replace("*", "weight"), ("gate", "up"), "(p i) h"), Stored(second.replace("*", "weight"), ("down",), "h i"))
        biases = (Stored(first.replace("*", "bias"), ("gate_bias", "up_bias"), "(p i)"), Stored(second.replace("*", "bias"), ("down_bias",), "h"))
        return weights + (biases if biased else ())

    def form(name: str, experts: str, input_norm: str, mlp_norm: str, about: str, container: TorchDist | None = None, reads: str = "Megatron-Core") -> Format:
        packed = dense(input_norm, mlp_norm)
        return Format(f"{family.name}/{name}", family, lines(experts), MEGATRON_SOURCE, about, packed, reads=reads, closed=True, container=container)

    linear = tuple(MEGATRON + name for name in ("self_attention.linear_qkv", "self_attention.linear_proj")) + tuple(
        MEGATRON + "mlp.experts.experts.{expert}." + name for name in ("linear_fc1", "linear_fc2")
    )
    norms = tuple(MEGATRON + here.removesuffix(".weight") for here in (*attention, own_norm) if "norm" in here)
    engine = (*linear, *norms, MEGATRON + "self_attention.core_attention", "decoder.final_layernorm")
    stacked = "mlp.experts.experts.{{expert}}.{}.*"
    return (
        form("megatron", "mlp.experts.local_experts.{{expert}}.{}.*", "input_layernorm.weight", own_norm, "a state dict of local layers with SequentialMLP"),
        form(
            "megatron-te",
            "mlp.experts.{}.*{{expert}}",
            fused_norm,
            own_norm,
            "a state dict of transformer-engine's layers with TEGroupedMLP",
            reads="Megatron-Core with transformer-engine",
        ),
        form("megatron-torch-dist", stacked, fused_norm, own_norm, "a torch_dist checkpoint for transformer-engine's layers", TorchDist(engine)),
        form("megatron-torch-dist-local", stacked, fused_norm, local_norm, "a torch_dist checkpoint for the local layers", TorchDist(linear)),
    )
