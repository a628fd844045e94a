"""What the smallest complete checkpoint of each format looks like: the dense tensors of each family, its config.json, and random experts."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moeglot.axes import parse_axes
from moeglot.encodings.mxfp4 import MXFP4
from moeglot.family import dig
from moeglot.format import Format
from moeglot.formats import by_name, of_family

SIZES = {"e": 4, "h": 64, "i": 64, "q": 4, "k": 2, "d": 16, "v": 32, "n": 3, "s": 24, "f": 40}
"""Letter -> size; square (h = i), so that no shape gives a wrong orientation away. q, k and n heads of d numbers, v words, s and f rows of other MLPs."""

LAYER = "model.layers.{layer}."
ATTENTION = LAYER + "self_attn."
TRUNK = {
    "model.embed_tokens.weight": "v h",
    "model.norm.weight": "h",
    "lm_head.weight": "v h",
    LAYER + "input_layernorm.weight": "h",
    LAYER + "post_attention_layernorm.weight": "h",
    ATTENTION + "q_proj.weight": "(q d) h",
    ATTENTION + "k_proj.weight": "(k d) h",
    ATTENTION + "v_proj.weight": "(k d) h",
    ATTENTION + "o_proj.weight": "h (q d)",
}
"""Hub name -> axes of the tensors that all three families have."""

DENSE = {
    "gpt-oss": TRUNK
    | {
        ATTENTION + "q_proj.bias": "(q d)",
        ATTENTION + "k_proj.bias": "(k d)",
        ATTENTION + "v_proj.bias": "(k d)",
        ATTENTION + "o_proj.bias": "h",
        ATTENTION + "sinks": "q",
        LAYER + "mlp.router.weight": "e h",
        LAYER + "mlp.router.bias": "e",
    },
    "qwen3-moe": TRUNK | {ATTENTION + "q_norm.weight": "d", ATTENTION + "k_norm.weight": "d", LAYER + "mlp.gate.weight": "e h"},
    "mixtral": TRUNK | {LAYER + "block_sparse_moe.gate.weight": "e h"},
    "deepseek-v3": {name: axes for name, axes in TRUNK.items() if "_proj" not in name}
    | {
        ATTENTION + "q_a_proj.weight": "s h",
        ATTENTION + "q_a_layernorm.weight": "s",
        ATTENTION + "q_b_proj.weight": "(q d) s",
        ATTENTION + "kv_a_proj_with_mqa.weight": "s h",
        ATTENTION + "kv_a_layernorm.weight": "s",
        ATTENTION + "kv_b_proj.weight": "(k d) s",
        ATTENTION + "o_proj.weight": "h (q d)",
        LAYER + "mlp.gate.weight": "e h",
        LAYER + "mlp.gate.e_score_correction_bias": "e",
        LAYER + "mlp.shared_experts.gate_proj.weight": "i h",
        LAYER + "mlp.shared_experts.up_proj.weight": "i h",
        LAYER + "mlp.shared_experts.down_proj.weight": "h i",
    },
}
"""Family -> Hub name -> axes of every tensor that is no expert; the other families have one tensor for each name that some format of theirs changes."""

CONFIG = {
    "gpt-oss": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "hidden_act": "silu",
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
    },
    "qwen3-moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "hidden_act": "silu",
        "intermediate_size": 256,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "deepseek-v3": {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "n_shared_experts": 1, "tie_word_embeddings": False},
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
}
"""Family -> what its config.json on the Hub says beyond sizes; of the other families, their model_type."""


def write_checkpoint(
    folder: Path,
    format_name: str,
    sizes: Mapping[str, int] | None = None,
    layers: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
) -> Path:
    """`folder`, holding a complete random checkpoint of that format: config.json and as many safetensors files, with an index if several.

    `sizes` replaces some of `SIZES`; `dtype` is that of all floats, biases and dense tensors too. MXFP4 has random blocks, and scales from 118 to 126.
    """
    known = SIZES | dict(sizes or {})
    known = {"j": known["i"], **known}
    form = by_name(format_name).sized(known)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(form, known, layers, dtype), indent=2))
    found = tensors(form, known, layers, seed, dtype)
    if form.container:
        save_dist(folder, stacked(found) if form.container.experts == "stacked" else single(found))
    else:
        save(folder, found, shards, {"moeglot.format": form.name} if form.asked else {})
    return folder


def write_dense_first(folder: Path) -> Path:
    """A DeepSeek-V3 of three layers, the first of which has an MLP of its own in the place of experts."""
    write_checkpoint(folder, "deepseek-v3/hub", layers=3)
    config = json.loads((folder / "config.json").read_text()) | {"first_k_dense_replace": 1, "intermediate_size": SIZES["f"]}
    (folder / "config.json").write_text(json.dumps(config))
    found = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if not name.startswith("model.layers.0.mlp.")}
    for name, axes in {"gate_proj": ("f", "h"), "up_proj": ("f", "h"), "down_proj": ("h", "f")}.items():
        shape = tuple(SIZES[axis] for axis in axes)
        found[f"model.layers.0.mlp.{name}.weight"] = _floats(shape, torch.bfloat16, torch.Generator().manual_seed(len(name)))
    save(folder, found)
    return folder


def save_dist(folder: Path, found: Mapping[str, torch.Tensor]) -> None:
    """Have torch write the tensors of a torch_dist checkpoint, each as one chunk."""
    from torch.distributed.checkpoint import save as dcp_save

    dcp_save(dict(found), checkpoint_id=folder, no_dist=True)


def stacked(found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by name -> those of a torch_dist checkpoint: the numbers in a name are places along the first axes."""
    places: dict[str, dict[tuple[int, ...], torch.Tensor]] = {}
    for name, tensor in found.items():
        numbers = tuple(int(piece) for piece in name.split(".") if piece.isdecimal())
        places.setdefault(".".join(piece for piece in name.split(".") if not piece.isdecimal()), {})[numbers] = tensor
    whole = {}
    for key, there in places.items():
        shape = tuple(max(numbers) + 1 for numbers in zip(*there, strict=True))
        first = next(iter(there.values()))
        whole[key] = torch.stack([there[place] for place in sorted(there)]).view(*shape, *first.shape) if shape else first
    return whole


def single(found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with `singleton_local_shards`: all numbers stay in the names, and the first linear of an MLP is two tensors, gate as _w and up as _v."""
    whole = {}
    for name, tensor in found.items():
        if name.endswith(("linear_fc1.weight", "linear_fc1.bias")):
            whole[f"{name}_w"], whole[f"{name}_v"] = (half.clone() for half in tensor.chunk(2))
        else:
            whole[name] = tensor
    return whole


def save(folder: Path, found: Mapping[str, torch.Tensor], shards: int = 1, marks: Mapping[str, str] | None = None) -> None:
    """Write the tensors to `model.safetensors`, or in their order to that many files and an index, named as on the Hub."""
    names = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)] if shards > 1 else ["model.safetensors"]
    weight_map = {key: names[n * shards // len(found)] for n, key in enumerate(found)}
    for name in names:
        save_file({key: found[key] for key, file in weight_map.items() if file == name}, folder / name, {"format": "pt", **(marks or {})})
    if shards > 1:
        total = sum(tensor.nbytes for tensor in found.values())
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def tensors(form: Format, sizes: Mapping[str, int] = SIZES, layers: int = 2, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Key -> random tensor, for every tensor of a checkpoint of this format."""
    random = torch.Generator().manual_seed(seed)
    return {**_dense(form, sizes, layers, dtype, random), **_experts(form, sizes, layers, dtype, random)}


def config(form: Format, sizes: Mapping[str, int] = SIZES, layers: int = 2, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """config.json of this format."""
    family = form.family
    hub = copy.deepcopy(CONFIG.get(family.name, {"architectures": [], "model_type": family.model_types[0]}))
    hub |= {
        "num_attention_heads": sizes["q"],
        "num_key_value_heads": sizes["k"],
        "head_dim": sizes["d"],
        "vocab_size": sizes["v"],
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    for letter, keys in family.sizes.items():
        put(hub, keys[0], sizes[letter])
    for rule in (family.sparse, *((family.second,) if family.second else ())):
        put(hub, rule.count, layers)
    if family.sparse.first:
        put(hub, family.sparse.first[0], 0)
    if form.config.only:
        return {key: dig(hub, path) for path, key in form.config.names.items()}
    hub |= {key: value for key, value in form.config.told.items() if value is not None}
    return {**hub, **form.config.constants, **({"quantization_config": dict(form.config.quantization)} if form.config.quantization else {})}


def put(config: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted key."""
    *parents, last = path.split(".")
    if last.isdecimal():
        held = dig(config, ".".join(parents))
        items = [*(held if isinstance(held, list) else ()), *[None] * (int(last) + 1)][: max(int(last) + 1, len(held) if isinstance(held, list) else 0)]
        items[int(last)] = value
        put(config, ".".join(parents), items)
        return
    for parent in parents:
        config = config.setdefault(parent, {})
    config[last] = value


def _experts(form: Format, sizes: Mapping[str, int], layers: int, dtype: torch.dtype, random: torch.Generator) -> dict[str, torch.Tensor]:
    found = {}
    for key, line, part in ((key, line, part) for line, part, keys in form.expert_keys(tuple(range(layers)), sizes) for key in keys):
        shape = part.shape(line.shape(sizes))
        if isinstance(line.encoding, MXFP4):
            low, high = {"packed": (0, 256), "scale": (118, 127)}[part.name]
            found[key] = torch.randint(low, high, shape, dtype=torch.uint8, generator=random)
        else:
            found[key] = _floats(shape, dtype, random)
    return found


def _dense(form: Format, sizes: Mapping[str, int], layers: int, dtype: torch.dtype, random: torch.Generator) -> dict[str, torch.Tensor]:
    hub = {}
    for name, axes in (DENSE.get(form.family.name) or _renamed(form)).items():
        shape = tuple(prod(sizes[letter] for letter in group) for group in parse_axes(axes))
        for layer in range(layers) if "{layer}" in name else (0,):
            hub[name.format(layer=layer, rest="x.weight")] = _floats(shape, dtype, random)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in hub.items():
        if named := form.from_hub(name, tuple(range(layers))):
            line, braces = named
            parts = [hub[part.format(**braces)] for part in line.hub]
            if line.heads:
                parts = [torch.cat([part.chunk(sizes["k"])[group] for part in parts]) for group in range(sizes["k"])]
            found[line.key.format(**braces)] = torch.cat(parts)
        else:
            found[name] = tensor
    return found


def _renamed(form: Format) -> dict[str, str]:
    """Hub name -> axes of a tensor for each name that some format of this family changes, and of one that none does."""
    lines = [line for other in of_family(form.family) if not other.coding for line in other.dense]
    names = {name: f"({rows}) h" for line in lines for name, rows in zip(line.hub, line.rows or ("h",) * len(line.hub), strict=True)}
    return {"unrelated.weight": "v h", **names}


def _floats(shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator) -> torch.Tensor:
    return (torch.randn(shape, generator=random) / 4).to(dtype)
