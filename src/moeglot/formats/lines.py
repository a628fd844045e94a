"""How the families of this folder say the same few things: the lines of an expert, a family's sizes, a Hub format and its twin in transformers 5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from moeglot.family import Activation, Family, SparseLayers
from moeglot.format import ConfigForm, Dense, Format, TorchDist
from moeglot.layout import SECOND, Stored

LAYER = "model.layers.{layer}."
NESTED = "model.language_model.layers.{layer}."
GATED = ("gate", "up", "down")
SWIGLU = Activation("swiglu")
SILU = Activation("swiglu", (None, "silu"))
"""Of experts that are gated so whatever `hidden_act` says, which is then for other MLPs."""
CLAMPED = Activation("clamped-swiglu", numbers={"alpha": ("swiglu_alpha", 1.702), "limit": ("swiglu_limit", 7.0)})
"""What gpt-oss computes, with its numbers under MiniMax's keys."""
KINDS = ("mlp_layer_types",)
ROUTED = ("n_routed_experts", "num_local_experts")
EXPERTS = ("num_experts", "num_local_experts")
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
        carried=(*_all_below(plain.carried, under), *plain.carried),
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


def linears(family: Family, lines: tuple[Stored, ...], file: str = "moe/linearize.py") -> Format:
    """What llm-compressor makes of stacked experts before it quantizes them, and AutoRound after it: a module of Linear layers for each.

    Since llm-compressor 0.14 its names are gate_proj, up_proj and down_proj whatever the release calls them, and what is no expert has the release's.
    """
    source = f"https://github.com/vllm-project/llm-compressor/blob/main/src/llmcompressor/modeling/{file}"
    about = "one Linear a role and expert, as llm-compressor and AutoRound take the experts apart to quantize them"
    return Format(f"{family.name}/llm-compressor", family, lines, source, about, reads="vLLM", wrapped=False)


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
MEGATRON_SOURCE = "https://github.com/NVIDIA/Megatron-LM/tree/core_v0.16.1/megatron/core/transformer"
HEADS = ("num_attention_heads", "num_key_value_heads", "num_key_value_heads")
ENDS = (
    Dense("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), padded="vocab_size", tp="rows", stage="first", needed=True),
    Dense("output_layer.weight", ("lm_head.weight",), padded="vocab_size", tp="rows", stage="last", needed=True, unless="tie_word_embeddings"),
    Dense("decoder.final_layernorm.weight", ("model.norm.weight",), stage="last", needed=True),
)


def in_layer(
    names: Mapping[str, str], only: Literal["", "dense", "sparse"] = "", tp: Literal["", "rows", "columns"] = "", between: str = ""
) -> tuple[Dense, ...]:
    """Tensors of a layer that Megatron-Core has as they are: its name -> the Hub's; the rest as in `Dense`."""
    return tuple(Dense(MEGATRON + here, (LAYER + there,), only=only, tp=tp, between=between) for here, there in names.items())


def by_heads(names: Mapping[str, str]) -> tuple[Dense, ...]:
    """Tensors of a layer whose rows are those of heads, which tensor parallelism divides."""
    return in_layer(names, tp="rows", between=HEADS[0])


def query_groups(kind: Literal["weight", "bias"]) -> tuple[Dense]:
    """Queries, keys and values in one tensor, head group by head group."""
    return (Dense(MEGATRON + f"self_attention.linear_qkv.{kind}", tuple(LAYER + f"self_attn.{x}_proj.{kind}" for x in "qkv"), heads=HEADS, tp="rows"),)


def gate_before_up(here: str, there: str, rows: str, only: Literal["", "dense", "sparse"] = "") -> tuple[Dense, ...]:
    """An MLP that is no routed expert. `rows`: the config keys whose product is the number of rows of its gate."""
    both = tuple(LAYER + f"{there}.{x}_proj.weight" for x in ("gate", "up"))
    return Dense(MEGATRON + f"{here}.linear_fc1.weight", both, (rows, rows), only=only, tp="rows"), *in_layer(
        {f"{here}.linear_fc2.weight": f"{there}.down_proj.weight"}, only, "columns"
    )


def megatron_experts(experts: str, biased: bool) -> tuple[Stored, ...]:
    """`experts`: a template with {} for the linear and * for what it has; `biased`: there are biases."""
    rows, also = "(p i)", "(i p 32)"
    first, second = (MEGATRON + experts.format(name) for name in ("linear_fc1", "linear_fc2"))
    weights = (
        Stored(first.replace("*", "weight"), ("gate", "up"), f"{rows} h", also=(f"{also} h",)),
        Stored(second.replace("*", "weight"), ("down",), "h i"),
    )
    biases = (
        Stored(first.replace("*", "bias"), ("gate_bias", "up_bias"), rows, also=(also,)),
        Stored(second.replace("*", "bias"), ("down_bias",), "h"),
    )
    return weights + (biases if biased else ())


LEGACY = (
    Stored(MEGATRON + "mlp.experts.weight1", ("gate", "up"), "e h (p i)", shaped="h (e p i)"),
    Stored(MEGATRON + "mlp.experts.weight2", ("down",), "(e i) h"),
)
"""GroupedMLP of Megatron-Core: the file says [h, e 2i], the module takes `view(e, h, 2i)` of that memory. It has no biases."""
BLOCKS = "moe_mlp_glu_interleave_size"
HALVES = {BLOCKS: None, "moe_shared_expert_glu_interleave_size": None}


def megatron(
    family: Family,
    names: Mapping[str, tuple[Dense, ...]],
    linear: tuple[str, ...],
    beside: tuple[str, ...],
    biased: bool = False,
) -> tuple[Format, ...]:
    """Megatron-Core's formats of a family: its state dicts with SequentialMLP, TEGroupedMLP and GroupedMLP, and its torch_dist checkpoints.

    `names`: of what is no expert, in the layers of transformer-engine ("engine"), in a state dict of the local layers ("local") and in their torch_dist
    checkpoint ("stored"). `linear`: the modules of a layer that have an _extra_state in both, where a model has them; `beside`: those that have one with
    transformer-engine. The experts' are added. `biased`: experts have biases, so that GroupedMLP cannot hold them.
    """
    experts = tuple(MEGATRON + "mlp.experts.experts.{expert}." + name for name in ("linear_fc1", "linear_fc2"))
    plain = (*experts, *(MEGATRON + name for name in linear))
    states = (*plain, *(MEGATRON + name for name in beside), "decoder.final_layernorm")
    single, grouped, stacked = (
        megatron_experts(template, biased)
        for template in ("mlp.experts.local_experts.{{expert}}.{}.*", "mlp.experts.{}.*{{expert}}", "mlp.experts.experts.{{expert}}.{}.*")
    )

    def form(name: str, norms: str, lines: tuple[Stored, ...], about: str, container: TorchDist | None = None, told: int | None = None) -> Format:
        reads = "Megatron-Core with transformer-engine" if name.startswith("megatron-te") else "Megatron-Core"
        config = ConfigForm(told=HALVES | {BLOCKS: told})
        made = Format(f"{family.name}/{name}", family, lines, MEGATRON_SOURCE, about, ENDS + names[norms], config, reads, closed=True, container=container)
        return replace(made, by_rank=container is None)

    in_blocks = f"; gate and up in blocks of 32 rows, {BLOCKS}"
    alone = "; each expert under its number, gate and up as _w and _v, singleton_local_shards"
    engine, dist = "a state dict of transformer-engine's layers with", "a torch_dist checkpoint for transformer-engine's layers"
    legacy = {"megatron-grouped": ("local", "a state dict of the local layers with"), "megatron-te-grouped": ("engine", engine)}
    return (
        form("megatron", "local", single, "a state dict of the local layers with SequentialMLP"),
        form("megatron-te", "engine", grouped, f"{engine} TEGroupedMLP"),
        form("megatron-te-glu32", "engine", _in_blocks(grouped), f"{engine} TEGroupedMLP{in_blocks}", told=32),
        *(form(name, norms, LEGACY, f"{of} the legacy GroupedMLP") for name, (norms, of) in legacy.items() if not biased),
        form("megatron-torch-dist", "engine", stacked, dist, TorchDist(states)),
        form("megatron-torch-dist-local", "stored", stacked, "a torch_dist checkpoint for the local layers", TorchDist(plain)),
        form("megatron-torch-dist-glu32", "engine", _in_blocks(stacked), f"{dist}{in_blocks}", TorchDist(states), told=32),
        form("megatron-torch-dist-singleton", "engine", stacked, f"{dist}{alone}", TorchDist(states, "single")),
        form("megatron-torch-dist-singleton-local", "stored", stacked, f"a torch_dist checkpoint for the local layers{alone}", TorchDist(plain, "single")),
    )


def _in_blocks(lines: tuple[Stored, ...]) -> tuple[Stored, ...]:
    """The lines with what they might be instead of what they are."""
    return tuple(replace(line, axes=line.also[0], also=(line.axes,)) if line.also else line for line in lines)
