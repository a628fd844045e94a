"""What transformers 4.57 takes for rotary embeddings where config.json says them in `rope_parameters`, which it does not know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.family import Config, dig

THETAS = {
    "aria": 1e4,
    "aria_text": 1e4,
    "deepseek_v2": 1e4,
    "deepseek_v3": 1e4,
    "dots1": 1e4,
    "ernie4_5_moe": 5e5,
    "flex_olmo": 5e5,
    "glm4_moe": 1e4,
    "glm4v_moe": 1e4,
    "gpt_oss": 1.5e5,
    "granitemoe": 1e4,
    "granitemoehybrid": 1e4,
    "granitemoeshared": 1e4,
    "hunyuan_v1_moe": 1e4,
    "jetmoe": 1e4,
    "llama4": 5e5,
    "llama4_text": 5e5,
    "longcat_flash": 1e7,
    "minimax": 1e6,
    "mixtral": 1e6,
    "olmoe": 1e4,
    "phimoe": 1e6,
    "qwen2_moe": 1e4,
    "qwen3_moe": 1e4,
    "qwen3_next": 1e4,
    "qwen3_omni_moe": 1e6,
    "qwen3_vl_moe": 5e6,
}
"""model_type -> the `rope_theta` of its config class in 4.57.6, where config.json has none; of a model in parts, that of its language model."""
PARTIAL = {"glm4_moe": 0.5, "glm4v_moe": 0.5, "qwen3_next": 0.25}
"""The same for `partial_rotary_factor`, where it is not 1."""
SCALINGS: Mapping[str, Config] = {
    "gpt_oss": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096}
}
"""The same for `rope_scaling`, where it is not None."""


def taken(model_type: str) -> dict[str, Any]:
    """What 4.57 takes where config.json says none of it; {} for what it does not turn, or does not know."""
    if model_type not in THETAS:
        return {}
    return {"rope_theta": THETAS[model_type], "partial_rotary_factor": PARTIAL.get(model_type, 1.0), "rope_scaling": SCALINGS.get(model_type)}


def otherwise(c: Checkpoint) -> Iterator[tuple[str, Any, Any]]:
    """(key, what 4.57 takes, what the file says in `rope_parameters`) of each that differs."""
    path = c.format.family.sparse.count.rpartition(".")[0]
    there, meant = (dig(config, path) if path else config for config in (c.source.config, c.config))
    if not isinstance(there, Mapping) or "rope_parameters" not in there or there.get("position_embedding_type", "rope") != "rope":
        return
    for key, default in taken(str(c.source.config.get("model_type"))).items():
        if key in meant and (found := there.get(key, default)) != meant[key]:
            yield key, found, meant[key]
