"""Small models of transformers with random weights, and what they compute."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from moeglot.demo import BUNDLED
from moeglot.integrations.transformers import VERSION

GOLDEN = Path(__file__).parents[1] / "golden" / "king-james-logits.json"
SIZES = {"square": (4, 64, 64), "h=2i": (4, 64, 32), "2h=i": (4, 32, 64), "e=h": (32, 32, 64), "neither": (6, 64, 96)}
COMMON = {"vocab_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2, "tie_word_embeddings": False}


def config_of(family: str, e: int, h: int, i: int):
    if family == "gpt-oss":
        return GptOssConfig(hidden_size=h, intermediate_size=i, num_local_experts=e, num_hidden_layers=2, sliding_window=8, **COMMON)
    if family == "mixtral":
        return MixtralConfig(hidden_size=h, intermediate_size=i, num_local_experts=e, num_hidden_layers=2, **COMMON)
    sparse = {"num_experts": e, "moe_intermediate_size": i, "mlp_only_layers": [1], "intermediate_size": 48}
    return Qwen3MoeConfig(hidden_size=h, num_hidden_layers=3, **sparse, **COMMON)


def model_of(family: str, e: int, h: int, i: int) -> torch.nn.Module:
    torch.manual_seed(e + h + i)
    model = AutoModelForCausalLM.from_config(config_of(family, e, h, i)).float().eval()
    for name, parameter in model.named_parameters():
        # Weights of the size that keeps activations near 1, so that nothing is lost in saturation; norms near 1.
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3 if parameter.ndim < 2 else 1.5 / parameter.shape[-1] ** 0.5)
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=(torch.arange(24).view(2, 12) * 3 % 96).to(model.device)).logits.cpu()


def readable(family: str) -> list[str]:
    """Formats of a family that this version reads, MXFP4 apart."""
    return {
        "gpt-oss": ["gpt-oss/transformers"],
        "qwen3-moe": ["qwen3-moe/hub"] + ["qwen3-moe/transformers-5"] * (VERSION >= (5, 0)),
        "mixtral": ["mixtral/hub"] + ["mixtral/transformers-5"] * (VERSION >= (5, 0)),
    }[family]


def mostly_experts(folder: Path, layers: int) -> int:
    """Writes gpt-oss in MXFP4, nearly all of it experts; how many bytes these take in bfloat16: 50 MB for each of the layers."""
    e, h, i = 32, 512, 512
    config = GptOssConfig(hidden_size=h, intermediate_size=i, num_local_experts=e, num_hidden_layers=layers, vocab_size=96, head_dim=16)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    random, file = torch.Generator().manual_seed(1), {}
    for name, tensor in shapes.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            rows, columns = tensor.shape[2], tensor.shape[1]
            file[name + "_blocks"] = torch.randint(256, (e, rows, columns // 32, 16), generator=random, dtype=torch.uint8)
            file[name + "_scales"] = torch.full((e, rows, columns // 32), 120, dtype=torch.uint8)
        else:
            file[name] = torch.randn(tensor.shape, generator=random).bfloat16()
    save_file(file, folder / "model.safetensors", {"format": "pt"})
    said = {**json.loads((BUNDLED / "config.json").read_text()), **json.loads(config.to_json_string())}
    (folder / "config.json").write_text(json.dumps({**said, "architectures": ["GptOssForCausalLM"]}))
    return layers * e * 3 * h * i * 2
