"""Rotary embeddings other than a class's default: what is written computes in transformers as its source does, and so does what is loaded."""

import json

import pytest
import torch
import transformers
from reading import relative
from small_models import config_of, logits, readable

import moeglot
from moeglot.integrations.transformers import VERSION

LIMIT, POWER = 1e-5, 1e-2
BASE = {"rope_theta": 777.0}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}
FAMILIES = ("gpt-oss", "qwen3-moe", "mixtral", *(("cohere2-moe",) if VERSION >= (5, 23) else ()))


def model_of(family: str, rope: dict | None):
    torch.manual_seed(2)
    if family == "cohere2-moe":
        given = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2, "vocab_size": 96}
        config = transformers.AutoConfig.for_model("cohere2_moe", **given, num_attention_heads=4, num_key_value_heads=2, head_dim=16, pad_token_id=0)
    else:
        config = config_of(family, 4, 64, 32)
    if rope is not None and VERSION >= (5, 0):
        config.rope_parameters = {**BASE, **rope}
    elif rope is not None:
        config.rope_theta = BASE["rope_theta"]
        config.rope_scaling = None if rope["rope_type"] == "default" else dict(rope)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3 if parameter.ndim < 2 else 1.5 / parameter.shape[-1] ** 0.5)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope", ROPES)
def test_the_rope_of_the_source(family, rope, tmp_path):
    model = model_of(family, ROPES[rope])
    expected = logits(model)
    model.save_pretrained(tmp_path / "source")
    assert relative(logits(model_of(family, None)), expected) > POWER  # it matters
    source = moeglot.open(tmp_path / "source")
    for n, to in enumerate(readable(family) if family != "cohere2-moe" else [source.format.name]):
        moeglot.convert(source, to, out := tmp_path / f"out{n}")
        again = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        assert relative(logits(again), expected) <= LIMIT, (to, json.loads((out / "config.json").read_text()))
    assert relative(logits(moeglot.load(source.source.home, "float32")), expected) <= LIMIT
