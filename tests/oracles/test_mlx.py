"""mlx-lm, a second implementation of families whose own code lies on the Hub: it stacks the experts of a release itself, and computes with them.

Its modules' arithmetic is float32 on a CPU, as ours is. Kimi's INT4 it unpacks with a decoder of its own.
"""

import importlib
import json

import numpy
import pytest
import torch
from safetensors.torch import load_file
from synthetic import write_checkpoint

import moeglot
from moeglot.experts import Expert, relative_error
from moeglot.verification.forward import loud_tokens
from moeglot.verification.misreadings import right

mx = pytest.importorskip("mlx.core", reason="installed in an environment of its own")

LIMIT, POWER = 1e-5, 1e-2
SIZES = {"square": (3, 64, 64), "h=2i": (3, 64, 32), "neither": (3, 64, 96)}
COMMON = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "vocab_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 64,
    "head_dim": 16,
    "num_experts_per_tok": 1,
}
CASES = {
    "kimi-k2": ("deepseek_v3", {"n_shared_experts": None, "first_k_dense_replace": 0, "topk_method": "noaux_tc"}),
    "bailing-moe": ("bailing_moe", {"num_shared_experts": 0, "norm_topk_prob": False, "first_k_dense_replace": 0}),
    "step3p5": ("step3p5", {"num_attention_groups": 4, "moe_layers_enum": "0,1,2", "swiglu_limits": [0.0, 1.5, None], "share_expert_dim": 32}),
}
"""Family -> the library's module for it, and what its config says beyond `COMMON` and sizes."""


def theirs(tensors, config, module):
    """Layer -> the library's experts module, loaded from the tensors of a release by the library's own rules."""
    code = importlib.import_module(f"mlx_lm.models.{module}")
    model = code.Model(code.ModelArgs.from_dict(config))
    weights = model.sanitize({name: as_mlx(tensor) for name, tensor in tensors.items() if "experts" in name or ".moe." in name})
    found = {}
    for layer in range(config["num_hidden_layers"]):
        experts = model.model.layers[layer].mlp.switch_mlp
        prefix = f"model.layers.{layer}.mlp.switch_mlp."
        mine = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        assert mine.keys() == {f"{name}_proj.weight" for name in ("gate", "up", "down")}
        experts.load_weights(list(mine.items()))
        found[layer] = experts
    return found


def as_mlx(tensor):
    return mx.array(tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy())


def respond(experts, expert, tokens):
    found = experts(mx.array(tokens.numpy()), mx.array(numpy.full((len(tokens), 1), expert)))
    return torch.from_numpy(numpy.array(found)).view(tokens.shape)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", CASES)
def test_each_expert_computes_what_it_does_there(family, size, tmp_path):
    e, h, i = SIZES[size]
    module, more = CASES[family]
    folder = write_checkpoint(tmp_path / "release", f"{family}/hub", {"e": e, "h": h, "i": i}, 3, dtype=torch.float32)
    config = {**COMMON, **json.loads((folder / "config.json").read_text()), **more}
    (folder / "config.json").write_text(json.dumps(config))
    source = moeglot.open(folder)
    assert source.format.name == f"{family}/hub"
    live = theirs(load_file(folder / "model.safetensors"), config, module)
    assert source.layers == tuple(live)
    swapped = {"gate": "up", "up": "gate"}
    for layer in source.layers:
        for expert in range(e):
            matrix, model = right(source, layer, expert), Expert.of(source.format.family, source.config, layer)
            tokens = loud_tokens(layer, expert, model, matrix, h)
            expected = respond(live[layer], expert, tokens)
            assert relative_error(model.forward(tokens, matrix), expected) <= LIMIT
            wrong = model.forward(tokens, lambda role, matrix=matrix: matrix(swapped.get(role, role)))
            assert relative_error(wrong, expected) > POWER
            assert relative_error(model.forward(tokens, right(source, layer, (expert + 1) % e)), expected) > POWER


def test_kimis_int4_is_unpacked_there_to_the_same_numbers(tmp_path):
    """The library reads weight_packed as its own 4-bit words, with the scales and -8 times the scales as offsets."""
    folder = write_checkpoint(tmp_path / "release", "kimi-k2/hub", {"e": 2, "h": 64, "i": 64}, 1, dtype=torch.float32)
    moeglot.convert(folder, "kimi-k2/hub+int4-pack", tmp_path / "int4", allow_loss=True)
    file, source = load_file(tmp_path / "int4" / "model.safetensors"), moeglot.open(tmp_path / "int4")
    for role in ("gate", "up", "down"):
        key = f"model.layers.0.mlp.experts.1.{role}_proj.weight"
        words, scale = mx.array(file[f"{key}_packed"].numpy()).view(mx.uint32), as_mlx(file[f"{key}_scale"])
        found = torch.from_numpy(numpy.array(mx.dequantize(words, scale, -8 * scale, group_size=32, bits=4)))
        ours = source.experts(0)[role][1].decode(torch.float32)
        assert relative_error(ours, found) <= 1e-6
        twos_complement = torch.from_numpy(numpy.array(mx.dequantize(words, scale, 0 * scale, group_size=32, bits=4)))
        assert relative_error(twos_complement, found) > POWER
