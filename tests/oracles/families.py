"""A tiny random model of every family that the installed transformers has: its config from the family's own size keys, its class, its files.

`python tests/oracles/families.py [NAME ...]` reports which families can be built here, what they save and what they are called in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from synthetic import put
from transformers import CONFIG_MAPPING

from moeglot.family import Family
from moeglot.integrations.transformers import VERSION, model_class

torch.set_num_threads(1)  # matrices this small are slower on two

SIZES = {"square": (3, 64, 64), "h=2i": (3, 64, 32), "neither": (3, 64, 96)}
"""name -> e, h, i."""

SMALL: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers"), 3),
    **dict.fromkeys(("hidden_size", "d_model", "text_hidden_size", "audio_hidden_size", "output_dim"), 64),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "n_heads", "num_global_key_value_heads"), 4),
    **dict.fromkeys(("head_dim", "global_head_dim", "q_lora_rank", "kv_lora_rank", "o_lora_rank", "v_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "out_hidden_size"), 64),
    **dict.fromkeys(("mamba_num_heads", "mamba_head_dim", "ssm_state_size"), 8),  # by default up to 128: seconds for a few tokens
    **dict.fromkeys(
        (
            "linear_num_heads",
            "linear_head_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_num_key_heads",
            "linear_num_value_heads",
            "linear_attn_head_dim",
        ),
        4,
    ),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim"), 32),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "top_k", "moe_k", "moe_topk", "moe_top_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_groups", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("num_dense_layers", "first_k_dense_replace", "num_nextn_predict_layers", "depth", "temporal_patch_size", "index_n_heads"), 1),
    **dict.fromkeys(("adapter_in_dim", "adapter_out_dim", "adapter_input_size", "thinker_hidden_size", "conv_output_size"), 64),
    **dict.fromkeys(("encoder_attention_heads", "kv_n_heads"), 4),
    **dict.fromkeys(("encoder_layers", "encoder_ffn_dim"), 2),
    **dict.fromkeys(("downsample_hidden_size", "decoder_dim"), 16),
    "vocab_size": 96,
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 8,
    "index_topk": 4,
    "sliding_window": 8,
    "max_position_embeddings": 128,
    "patch_size": 4,
    "image_size": 16,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Config key -> a value that keeps a model tiny; set wherever a config class has the key."""

OFTEN_NONE = {"moe_intermediate_size", "num_experts_per_tok", "n_shared_experts", "head_dim", "n_group", "topk_group", "num_experts", "top_k_experts"}
"""Keys that are set although the class has no default for them."""

EXTRA: dict[str, dict[str, Any]] = {
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dbrx": {"ffn_config.hidden_size": 64, "attn_config.kv_n_heads": 2, "attn_config.rope_theta": 77777.0, "attn_config.clip_qkv": 8.0},
    "deepseek-v4": {"layer_types": ["compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"], "num_hash_layers": 1},
    "glm4v-moe": {"text_config.rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
    "glm5-next": {"text_config.index_kpool": 2, "text_config.qk_rope_head_dim": 0, "text_config.mlp_layer_types": ["dense", "sparse", "sparse"]},
    "minimax-m3-vl": {"text_config.mlp_layer_types": ["dense", "sparse", "sparse"]},
    "ernie4-5-vl-moe": {
        "text_config.mlp_layer_types": ["dense", "sparse", "sparse"],
        "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
    },
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2, "encoder_layers": 4, "decoder_layers": 4, "decoder_attention_heads": 4},
    "switch-transformers": {"num_layers": 4, "num_decoder_layers": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "d_kv": 16},
    "zaya": {"num_experts_per_tok": 1},
    "jamba": {"use_mamba_kernels": False},
    "jetmoe": {"num_attention_heads": 8, "kv_channels": 16},
    "qwen3-vl-moe": {"text_config.rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [2, 3, 3]}},
    "lfm2-moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "gemma4-text": {"enable_moe_block": True},
    "deepseek-ocr2": {"text_config.mlp_layer_types": ["dense", "sparse", "sparse"]},
    "gemma4": {"text_config.enable_moe_block": True},
    "mimo-v2-flash": {"num_key_value_heads": 2, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "nemotron-h": {"layers_block_type": ["mamba", "moe", "attention", "moe"]},
    "dots3-note": {
        "text_config.layer_types": ["indexed_attention"] * 3,
        "text_config.mlp_layer_types": ["dense", "sparse", "sparse"],
        "vision_config.mlp_layer_types": ["dense", "sparse", "sparse"],
        "vision_config.num_local_experts": 4,
    },
    "dots3-note-text": {"layer_types": ["indexed_attention"] * 3},
    "inkling2": {"text_config.unpadded_vocab_size": 90},
    "inkling2-text": {"unpadded_vocab_size": 90},
    "longcat-flash": {"qk_head_dim": 16, "zero_expert_num": 0, "head_dim": 8},
    "qwen3-omni-moe": {
        "thinker_config.vision_start_token_id": 7,  # as the release says it; 4.57 has no default
        **{
            f"{part}.text_config.rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [2, 3, 3]}
            for part in ("thinker_config", "talker_config")
        },
        "talker_config.text_config.shared_expert_intermediate_size": 32,
        "talker_config.spatial_merge_size": 2,
        "talker_config.text_config.num_local_experts": 4,
    },
    "muse-spark": {
        "audio_config.num_hidden_layers": 4,
        "audio_config.hidden_sizes": [16, 16, 16, 16],
        "audio_config.depths": [1, 1, 1, 1],
        "audio_config.out_hidden_size": 64,
    },
    "inkling": {"vision_config.patch_size": 40, "vision_config.hidden_size": 1024},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8},
    "nemo-speechlm": {"word_timestamp_config.blank_token_id": 5, "text_config.layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "step3p7": {
        "text_config.mlp_layer_types": ["dense", "sparse", "sparse"],
        "text_config.sliding_window": 8,
        "text_config.swiglu_limits": [0.0, 0.0, 1.5],
    },
    "flint": {"mlp_only_layers": [1]},
    "qwen2-moe": {"mlp_only_layers": [1]},
    "qwen3-moe": {"mlp_only_layers": [1]},
    "qwen3-next": {"decoder_sparse_step": 2, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
}
"""Family -> what its config needs beyond `SMALL`, by dotted key."""

BEFORE_5: dict[str, dict[str, Any]] = {
    "qwen3-vl-moe": {"text_config.rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
}
"""The same for transformers 4, which has no default for it."""


WITHIN = {"mistral-small4": "mistral4"}
"""Family -> the model_type of its language model, where the config class has another by default."""
PARTS = {"step3p5": "transformers has its config as a part of Step-3.7's, and no model of its own; test_mlx.py judges it"}


def why_not(family: Family) -> str | None:
    """Why the installed library has no model of a family that it has a config of."""
    inner = WITHIN.get(family.name)
    return family.unverified or PARTS.get(family.name) or (f"it has no {inner}" if inner and inner not in CONFIG_MAPPING else None)


def small(cls: type) -> dict[str, Any]:
    """Keyword arguments of a config class, its sub-configs included, that make it tiny."""
    default = cls()
    known = default.to_dict()
    found = {
        key: value
        for key, value in SMALL.items()
        if key in known and (known[key] is not None or key in OFTEN_NONE) and not isinstance(known[key], (list, dict))
    }
    if "qk_rope_head_dim" in known:
        found.pop("head_dim", None)  # it follows
    for name in getattr(cls, "sub_configs", None) or {}:
        if getattr(default, name, None) is not None:
            part = type(getattr(default, name))
            found[name] = {**small(part), "model_type": part.model_type}  # without it, Aria's before 5.23 stays a dict
    return found


def config_of(family: Family, sizes: Mapping[str, int]) -> Any:
    """The tiny config of a family, with these sizes under the family's own keys."""
    cls = CONFIG_MAPPING[family.model_types[0]]
    options = small(cls)
    if inner := WITHIN.get(family.name):
        options["text_config"] = {**small(CONFIG_MAPPING[inner]), "model_type": inner}
    for letter, keys in family.sizes.items():
        if letter in sizes and (letter != "j" or keys != family.sizes["i"]):
            put(options, keys[0], sizes[letter])
    extra = EXTRA.get(family.name, {})
    if VERSION < (5, 0):  # which does not know rope_parameters
        extra = {path: value for path, value in extra.items() if not path.endswith("rope_parameters")} | BEFORE_5.get(family.name, {})
    for path, value in extra.items():
        put(options, path, value)
    return cls(**options)


THETA = 77777.0
"""A base of rotary embeddings that no release has by default."""


def turn_otherwise(config: Any) -> None:
    """Every part of a config that has one set of rotary embeddings gets a base of its own."""
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {})):
        if isinstance(rope := getattr(part, "rope_parameters", None), dict) and "rope_theta" in rope:
            rope["rope_theta"] = THETA
        if part is not config and part is not None:
            turn_otherwise(part)


def activate_otherwise(config: Any) -> None:
    """Every activation that some part of a config names becomes another."""
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {})):
        for key in ("hidden_act", "hidden_activation", "activation_function", "dense_act_fn"):
            if isinstance(getattr(part, key, None), str):
                setattr(part, key, "gelu_pytorch_tanh")
        if part is not config and part is not None:
            activate_otherwise(part)


def model_of(family: Family, size: str, otherwise: bool = False, activated: bool = False) -> torch.nn.Module:
    """A random model in float32 whose activations stay near 1. `otherwise`: with rotary embeddings that no release has by default;
    `activated`: with activations that no release has.
    """
    e, h, i = SIZES[size]
    torch.manual_seed(e + h + i)
    config = config_of(family, {"e": e, "h": h, "i": i, "j": 32 if i == h else h})  # a second group of experts: square where the first is not
    if otherwise:
        turn_otherwise(config)
    if activated:
        activate_otherwise(config)
    model = model_class(config)(config).float().eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3 if parameter.ndim < 2 else 1.5 / parameter.shape[-1] ** 0.5)
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(0)  # diffusion models draw noise
    tokens = (torch.arange(16).view(2, 8) * 3 % 90 + 3).to(next(model.parameters()).device)
    decoder = {"decoder_input_ids": tokens.flip(1)} if getattr(model.config, "is_encoder_decoder", False) else {}
    mask = {"attention_mask": torch.ones_like(tokens)} if VERSION < (5, 0) else {}  # without one, 4.57's GLM-4.5V takes positions for packed text
    found = getattr(model, "thinker", model)(input_ids=tokens, use_cache=False, **decoder, **mask)
    return (found.logits if hasattr(found, "logits") else found[0]).cpu()


UNDONE = {"kimi_k25": ("language_model.model.blocks.", "language_model.model.layers.")}
"""model_type -> a name that save_pretrained writes by mistake (a vision tower's rename undone on the language model), and the release's."""


def saved(model: torch.nn.Module, folder: Path, original: bool) -> dict[str, torch.Tensor]:
    """Key -> tensor, as `save_pretrained` writes them."""
    model.save_pretrained(folder, **({} if original else {"save_original_format": False}))
    if original and model.config.model_type in UNDONE:
        wrong, right = UNDONE[model.config.model_type]
        file = folder / "model.safetensors"
        save_file({key.replace(wrong, right): tensor for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def _report(names: list[str]) -> int:
    """How many could not be built, each with the reason."""
    import sys
    import tempfile
    import time

    from moeglot.formats import FAMILIES

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    failed = 0
    for family in (family for family in FAMILIES if not names or family.name in names):
        start = time.time()
        try:
            model = model_of(family, "neither")
            count, finite = sum(p.numel() for p in model.parameters()), bool(logits(model).isfinite().all())
            print(f"## {family.name}: {type(model).__name__}, {count} parameters, finite {finite}")
            with tempfile.TemporaryDirectory() as folder:
                for way in (True, False):
                    tensors = saved(model, Path(folder) / str(way), way)
                    print(
                        "  ",
                        "original" if way else "memory",
                        len(tensors),
                        *[f"{k} {list(v.shape)}" for k, v in tensors.items() if "expert" in k and "shared" not in k][:4],
                    )
                if names:
                    print((Path(folder) / "True" / "config.json").read_text())
        except Exception as error:  # a report of all, which ends with the status of a failure
            failed += 1
            print(f"## {family.name}: {type(error).__name__}: {str(error)[:300]}")
        print(f"   {time.time() - start:.1f} s")
        sys.stdout.flush()
    return failed


if __name__ == "__main__":
    import sys

    sys.exit(min(1, _report(sys.argv[1:])))
