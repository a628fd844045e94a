"""What config.json declares of codes, as producers write it: what is not understood is refused before a number is read or written."""

import json
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
from counting import READ, upload
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint

import moeglot
from moeglot.checkpoints.identify import identify
from moeglot.demo import BUNDLED
from moeglot.encodings.fp8 import FP8
from moeglot.errors import BadNumbers, BrokenFile, Contradiction, MoeglotError, TensorMismatch, UnknownFormat, UsageError
from moeglot.experts import Expert
from moeglot.files.source import read_source
from moeglot.formats import FAMILIES
from moeglot.inspection.inspection import inspect_json
from moeglot.reports.report import dump

SIZES = {"e": 3, "h": 128, "i": 128}
ATTENTION = "model.layers.0.self_attn.q_proj"
GROUP = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "_load_in_8bit": True, "load_in_4bit": False}
AWQ = {"quant_method": "awq", "version": "gemv", "bits": 4, "group_size": 128, "modules_to_not_convert": ["lm_head", "mlp.experts"]}


def folder(where: Path, layout: str = "qwen3-moe/transformers-5", quantization: dict | None = None, **changes) -> Path:
    """A checkpoint without our mark. `changes`: name with __ in place of dots -> a tensor, or None to leave it out."""
    found = write_checkpoint(where / "plain", layout, {**SIZES, "q": 6, "d": 64}, 2)
    tensors = load_file(found / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, found / "model.safetensors", {"format": "pt"})
    if quantization:
        config = json.loads((found / "config.json").read_text())
        (found / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return found


def int8(where: Path) -> Path:
    """Stacked experts that bitsandbytes left alone, beside attention in a coding that we do not read."""
    codes = torch.randint(-127, 128, (384, 128), dtype=torch.int8)
    scale = torch.rand(384)
    return folder(where, quantization=INT8, **{f"{ATTENTION}.weight".replace(".", "__"): codes, f"{ATTENTION}.SCB".replace(".", "__"): scale})


def awq(where: Path) -> Path:
    name = ATTENTION.replace(".", "__")
    packed = {f"{name}__qweight": torch.zeros(128, 48, dtype=torch.int32), f"{name}__qzeros": torch.zeros(1, 48, dtype=torch.int32)}
    return folder(where, quantization=AWQ, **{f"{name}__weight": None, **packed, f"{name}__scales": torch.ones(1, 384).half()})


@pytest.mark.parametrize("make", [int8, awq])
def test_codes_that_are_not_known_are_moved_with_what_declares_them(make, tmp_path):
    source = make(tmp_path)
    before = load_file(source / "model.safetensors")
    moeglot.convert(source, "qwen3-moe/hub", tmp_path / "moved")
    after, config = load_file(tmp_path / "moved" / "model.safetensors"), json.loads((tmp_path / "moved" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] in ("bitsandbytes", "awq")
    others = [name for name in before if ".experts." not in name]
    assert all(torch.equal(before[name], after[name]) for name in others)
    assert moeglot.open(tmp_path / "moved").format.name == "qwen3-moe/hub"  # each expert is a module there, and is named as left alone
    moeglot.convert(tmp_path / "moved", "qwen3-moe/transformers-5", tmp_path / "back")
    assert moeglot.compare(source, tmp_path / "back").verdict == "holds"
    with pytest.raises((UnknownFormat, Contradiction), match="in a way that moeglot does not know"):
        moeglot.open(source).decoded("F32")
    with pytest.raises((UnknownFormat, Contradiction), match="in a way that moeglot does not know"):
        moeglot.convert(source, "qwen3-moe/hub+fp8-block", tmp_path / "coded", allow_loss=True)


@pytest.mark.parametrize("shape", [(2, 3), (6,), (3, 2, 1)])
def test_scales_of_another_shape_are_no_view_of_these(shape, tmp_path):
    plain = folder(tmp_path, "qwen3-moe/hub", **{f"{ATTENTION}.weight".replace(".", "__"): torch.randn(384, 256).bfloat16()})
    for name in ("k_proj", "v_proj", "o_proj"):  # a hidden size of 256 for q_proj alone would be no model; the shape is what is looked at
        assert f"model.layers.0.self_attn.{name}.weight" in load_file(plain / "model.safetensors")
    moeglot.convert(plain, "qwen3-moe/hub+fp8-block", tmp_path / "coded", allow_loss=True)
    tensors = load_file(tmp_path / "coded" / "model.safetensors")
    tensors[f"{ATTENTION}.weight"] = torch.randn(384, 256).to(torch.float8_e4m3fn)
    tensors[f"{ATTENTION}.weight_scale_inv"] = torch.rand(3, 2).reshape(shape)
    save_file(tensors, tmp_path / "coded" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "coded" / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"].remove(ATTENTION)
    (tmp_path / "coded" / "config.json").write_text(json.dumps(config))
    tensor = moeglot.open(tmp_path / "coded").decoded("F32")[f"{ATTENTION}.weight"]
    if shape == (3, 2, 1):
        assert tensor.read().shape == (384, 256)
    else:
        with pytest.raises(TensorMismatch, match="has \\[3, 2\\] there"):
            tensor.read()


@pytest.mark.parametrize("location", ["input", "weight_input"])
def test_transforms_of_activations_are_in_no_weight(location, tmp_path):
    scheme = {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": location}]}
    quantization = {"quant_method": "compressed-tensors", "config_groups": {}, "transform_config": {"config_groups": {"R": scheme}}}
    source = folder(tmp_path, quantization=quantization)
    if location == "weight_input":
        assert moeglot.open(source).format.name == "qwen3-moe/transformers-5"
    else:
        with pytest.raises(UnknownFormat, match="hadamard at input"):
            moeglot.open(source)


def test_codes_of_matrices_that_lie_in_out(tmp_path):
    """As ModelOpt exports Llama 4: U8 [e, h / 2, 2 i], two codes of a column in a byte."""
    name = "language_model.model.layers.{}.feed_forward.experts.gate_up_proj"
    codes = {name.format(layer).replace(".", "__"): torch.zeros(3, 64, 256, dtype=torch.uint8) for layer in (0, 1)}
    source = folder(tmp_path, "llama4/hub", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, **codes)
    with pytest.raises(UnknownFormat, match=r"gate_up_proj is U8, .*; of matrices that lie \[in, out\], no codes are read"):
        moeglot.open(source)


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        ({"name": "rotation", "r1": True, "r2": True, "r3": True, "r4": False, "online_r1_rotation": False, "online_config": None}, ""),
        ({"name": "awq", "scaling_layers": []}, ""),
        ({"name": "rotation", "r1": True, "r2": True, "r3": False, "r4": True}, "rotation with r4"),
        ({"name": "rotation", "r4": False, "online_r1_rotation": True}, "rotation with online_r1_rotation"),
        ({"name": "rotation", "r4": False, "online_config": {"online_rotation_layers": ["*"]}}, "rotation with online_rotation_layers"),
        ({"name": "quarot"}, "quarot with r4"),
        ({"name": "svdquant"}, "branches of low rank"),
    ],
)
def test_what_quark_does_beside_the_weights(algorithm, said, tmp_path):
    source = folder(tmp_path, quantization={"quant_method": "quark", "algo_config": [algorithm], "global_quant_config": {"weight": {"dtype": "int4"}}})
    if said:
        with pytest.raises(UnknownFormat, match=said):
            moeglot.open(source)
    else:
        assert moeglot.open(source).format.name == "qwen3-moe/transformers-5"


@pytest.mark.parametrize(("first", "gone"), [(1, 1), (1, 2), (1, 3), (0, 1), (0, 2)])
def test_a_shard_that_is_missing_without_an_index(first, gone, tmp_path):
    source = folder(tmp_path)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    last = {name: tensors.pop(name) for name in ("lm_head.weight", "model.norm.weight")}
    names = list(tensors)
    parts = [{name: tensors[name] for name in names[:5]}, {name: tensors[name] for name in names[5:]}, last]
    for n, part in enumerate(parts, first):
        save_file(part, source / f"model-{n:05}-of-00003.safetensors", {"format": "pt"})
    assert moeglot.open(source).format.name == "qwen3-moe/transformers-5"
    (source / f"model-{gone:05}-of-00003.safetensors").unlink()
    with pytest.raises(BrokenFile, match=f"1 of 3 files are missing, first number {gone}"):
        moeglot.open(source)


ALONE = {
    "of attention alone": {"quant_method": "compressed-tensors", "config_groups": {"a": {**GROUP, "targets": ["re:.*self_attn.*"]}}},
    "of the cache alone": {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
    "of the cache alone, by ModelOpt": {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"},
    "vLLM's name": {"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]},
}


@pytest.mark.parametrize("declared", ALONE)
@pytest.mark.parametrize("layout", ["qwen3-moe/hub", "qwen3-moe/transformers-5"])
def test_experts_that_are_left_alone(declared, layout, tmp_path):
    assert moeglot.open(folder(tmp_path, layout, ALONE[declared])).format.name == layout


W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
STRANGE = {
    "INT6": (
        "int4-pack",
        ("config_groups", "group_0", "weights"),
        {**W4, "num_bits": 6},
        "'num_bits': 6, 'type': 'int', 'strategy': 'group', 'group_size': 32",
    ),
    "INT8 in blocks": (
        "int8-channel",
        ("config_groups", "group_0", "weights"),
        {**W4, "num_bits": 8, "strategy": "block", "block_structure": [128, 128]},
        "'num_bits': 8, 'type': 'int', 'strategy': 'block'",
    ),
    "INT4 in no groups": ("int4-pack", ("config_groups", "group_0", "weights"), {**W4, "strategy": "token"}, "'strategy': 'token'"),
    "W4A8": ("nvfp4-modelopt", ("quant_algo",), "W4A8_NVFP4_FP8", "'quant_algo': 'W4A8_NVFP4_FP8'}; of modelopt moeglot decodes nvfp4-modelopt, fp8-modelopt"),
    "FP8 without a word on its blocks": ("fp8-block", (), {"quant_method": "fp8"}, "{'quant_method': 'fp8'}; of fp8 moeglot decodes fp8-block"),
}


@pytest.mark.parametrize("declared", STRANGE)
def test_codings_that_are_not_known_are_no_contradiction(declared, tmp_path):
    coding, path, value, told = STRANGE[declared]
    moeglot.convert(folder(tmp_path, "qwen3-moe/hub"), f"qwen3-moe/hub+{coding}", tmp_path / "coded", allow_loss=True)
    (tensors,) = (tmp_path / "coded").glob("*.safetensors")
    save_file(load_file(tensors), tensors, {"format": "pt"})
    config = json.loads((tmp_path / "coded" / "config.json").read_text())
    place = config
    for key in ("quantization_config", *path)[:-1]:
        place = place[key]
    place[("quantization_config", *path)[-1]] = value
    (tmp_path / "coded" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownFormat, match="quantized in a way that moeglot does not know") as refused:
        moeglot.open(tmp_path / "coded")
    assert told in refused.value.known
    assert f"those of qwen3-moe/hub+{coding}" in refused.value.known


FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}


def compressed(where: Path, coding: str, groups: dict, changes: dict | None = None, format: str = "pack-quantized") -> Path:
    """A folder without our mark whose quantization_config has these groups. `changes`: how a name ends -> a tensor made of it, or None."""
    moeglot.convert(folder(where, "qwen3-moe/hub"), f"qwen3-moe/hub+{coding}", where / "coded", allow_loss=True)
    (path,) = (where / "coded").glob("*.safetensors")
    tensors = load_file(path)
    for end, make in (changes or {}).items():
        for name in [name for name in tensors if name.endswith(end)]:
            tensor = tensors.pop(name)
            tensors |= {name: make(tensor)} if make else {}
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((where / "coded" / "config.json").read_text())
    made = {str(n): {"targets": targets, "weights": weights} for n, (targets, weights) in enumerate(groups)}
    config["quantization_config"] |= {"config_groups": made, "format": format}
    (where / "coded" / "config.json").write_text(json.dumps(config))
    return where / "coded"


def test_roles_that_are_declared_to_be_coded_differently(tmp_path):
    groups = [(["re:.*(gate|up)_proj$"], W4), (["re:.*down_proj$"], FLOAT8)]
    first, second = (compressed(tmp_path / name, name, groups, format="mixed-precision") for name in ("int4-pack", "fp8-channel"))
    mine, theirs = (load_file(of / "model.safetensors") for of in (first, second))
    mixed = {name: tensor for name, tensor in mine.items() if "down_proj" not in name} | {name: theirs[name] for name in theirs if "down_proj" in name}
    save_file(mixed, first / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnknownFormat, match="quantized in a way that moeglot does not know") as refused:
        moeglot.open(first)
    told = refused.value.known
    assert "experts.0.gate_proj as int4:32 (int4-pack)" in told
    assert "experts.0.down_proj as fp8-channel (fp8-channel); in one format all matrices of an expert are coded in one way" in told
    assert "not qwen3-moe/" not in told


INT4_BYTES = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True}


def test_weights_of_four_bits_a_byte_each(tmp_path):
    source = compressed(tmp_path, "int8-channel", [(["Linear"], INT4_BYTES)], format="int-quantized")
    with pytest.raises(UnknownFormat, match="quantized in a way that moeglot does not know") as refused:
        moeglot.open(source)
    assert "'num_bits': 4, 'type': 'int'" in refused.value.known


def test_words_that_are_declared_to_be_bytes(tmp_path):
    with pytest.raises(MoeglotError, match="contradict each other"):
        moeglot.open(compressed(tmp_path, "int8-pack", [(["Linear"], {**INT4_BYTES, "num_bits": 8})], format="int-quantized"))


def test_mixed_precision_says_of_each_group_how_its_numbers_lie(tmp_path):
    source = compressed(tmp_path, "int8-channel", [(["Linear"], {**INT4_BYTES, "num_bits": 8})], format="mixed-precision")
    assert moeglot.open(source).format.name == "qwen3-moe/hub+int8-channel"
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["config_groups"]["0"]["format"] = "pack-quantized"
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoeglotError, match=r"no tensor is named .*gate_proj\.weight_packed"):
        moeglot.open(source)


def test_zero_points_that_are_declared_and_not_there(tmp_path):
    source = compressed(tmp_path, "int4-pack", [(["Linear"], {**W4, "symmetric": False})])
    with pytest.raises(Contradiction, match=r"no tensor is named .*gate_proj\.weight_zero_point") as refused:
        moeglot.open(source)
    assert "declares what qwen3-moe/hub+int4-pack has" in refused.value.known


def test_experts_of_a_layer_that_are_declared_to_be_coded_differently(tmp_path):
    groups = [(["re:.*experts\\.0\\..*"], W4), (["re:.*experts\\.[12]\\..*"], {**W4, "group_size": 64})]
    halved = {f"experts.{n}.{role}_proj.weight_scale": lambda scale: scale[:, ::2].contiguous() for n in (1, 2) for role in ("gate", "up", "down")}
    source, said = compressed(tmp_path, "int4-pack", groups, halved), "quantization_config says that it is"
    with pytest.raises(TensorMismatch, match=rf"experts\.1\.gate_proj: {said} int4:64, and .*experts\.0\.gate_proj int4:32") as refused:
        moeglot.open(source)
    assert "--format" not in refused.value.do


def test_stacked_experts_are_no_linear_modules(tmp_path):
    """No producer lists them among those that are left alone; of modules he does."""
    declared = {"quant_method": "compressed-tensors", "config_groups": {"a": GROUP}, "ignore": ["lm_head"]}
    assert moeglot.open(folder(tmp_path / "a", quantization=declared)).format.name == "qwen3-moe/transformers-5"
    with pytest.raises(moeglot.Contradiction):
        moeglot.open(folder(tmp_path / "b", "qwen3-moe/hub", declared))


def test_a_pattern_that_is_none(tmp_path):
    """What it was to leave alone, nobody knows."""
    declared = {"quant_method": "compressed-tensors", "config_groups": {"a": GROUP}, "ignore": ["re:.*experts[.*", "lm_head"]}
    with pytest.raises(Contradiction, match=r"(?s)'re:\.\*experts\[\.\*', which is no regular expression.*unterminated"):
        moeglot.open(folder(tmp_path / "a", quantization=declared))


def test_the_first_place_that_says_something(tmp_path):
    source = folder(tmp_path, "qwen3-moe/hub")
    moeglot.convert(source, "qwen3-moe/hub+fp8-block", tmp_path / "coded", allow_loss=True)
    config = json.loads((tmp_path / "coded" / "config.json").read_text())
    config["text_config"] = {"quantization_config": config["quantization_config"]}
    config["quantization_config"] = {}
    shutil.copytree(tmp_path / "coded", tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    assert moeglot.open(tmp_path / "other").format.name == "qwen3-moe/hub+fp8-block"


@pytest.mark.parametrize("name", ["hy-v4", "glm5-next"])
def test_a_limit_that_config_json_leaves_out(name):
    """As transformers 5.23 has it: configuration_hy_v4.py and configuration_glm5_next.py."""
    family = next(one for one in FAMILIES if one.name == name)
    assert Expert.of(family, {}, 0).numbers == {"limit": 10.0}


def test_the_name_of_an_activation_that_is_clamped_says_nothing():
    """MiniMax-M3's config.json has hidden_act = swigluoai, and transformers computes alpha and limit whatever it says."""
    family = next(one for one in FAMILIES if one.name == "minimax-m3-text" or one.name.startswith("minimax-m3"))
    expert = Expert.of(family, {"hidden_act": "swigluoai", "text_config": {"hidden_act": "swigluoai"}}, 0)
    x = {"gate": torch.linspace(-9, 9, 7), "up": torch.linspace(9, -9, 7)}
    gate, up = x["gate"].clamp(max=7), x["up"].clamp(-7, 7)
    assert torch.equal(expert.activate(x), gate * (gate * 1.702).sigmoid() * (up + 1))


@pytest.mark.parametrize("family", ["llama4", "qwen3-vl-moe"])
@pytest.mark.parametrize("size", [(128, 128), (256, 128)], ids=["square", "h=2i"])
def test_experts_taken_apart_as_llm_compressor_does(family, size, tmp_path):
    """Its SequentialLlama4TextExperts and SequentialQwen3VLMoeTextExperts: halves of the last axis, each turned; then quantized, and read back."""
    h, i = size
    source = write_checkpoint(tmp_path / "hub", f"{family}/hub", {"e": 3, "h": h, "i": i}, 2)
    moeglot.convert(source, f"{family}/llm-compressor", tmp_path / "apart")
    stacked, apart = load_file(source / "model.safetensors"), load_file(tmp_path / "apart" / "model.safetensors")
    name = next(key for key in stacked if key.endswith("experts.gate_up_proj"))
    gate, up = stacked[name].chunk(2, dim=-1)
    down = stacked[name.replace("gate_up_proj", "down_proj")]
    for expert in range(3):
        stem = name.replace("gate_up_proj", str(expert))
        for role, matrix in (("gate", gate), ("up", up), ("down", down)):
            assert torch.equal(apart[f"{stem}.{role}_proj.weight"], matrix[expert].t())
    moeglot.convert(tmp_path / "apart", f"{family}/llm-compressor+int4-pack", tmp_path / "coded", allow_loss=True)
    found = moeglot.open(tmp_path / "coded").experts(1)["gate"][2].decode(torch.float32)
    second = next(key for key in stacked if key.endswith("experts.gate_up_proj") and key != name)
    expected = stacked[second].float().chunk(2, dim=-1)[0][2].t()
    assert float((found - expected).norm() / expected.norm()) < 0.15


def test_two_models_in_one_folder(tmp_path):
    """transformers reads the single file, others what the index names."""
    source = folder(tmp_path)
    tensors = load_file(source / "model.safetensors")
    save_file(tensors, source / "model-00001-of-00001.safetensors", {"format": "pt"})
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}))
    with pytest.raises(BrokenFile, match="which does not name it"):
        moeglot.open(source)
    (source / "model.safetensors").unlink()
    assert moeglot.open(source).format.name == "qwen3-moe/transformers-5"


def test_verify_reads_every_weight_and_knows_every_certified_byte(tmp_path):
    source = folder(tmp_path)
    moeglot.convert(source, "qwen3-moe/hub", out := tmp_path / "out")
    assert [check.what for check in moeglot.verify(out).checks if check.verdict == "holds"][-1] == "as certified"
    path = out / "model.safetensors"
    data, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # the last byte of some number, whose other bits are as they were
    assert moeglot.verify(out).checks[-1].verdict == "does not hold"
    (out / "moeglot.json").unlink()
    assert moeglot.verify(out).verdict == "holds"
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    found = moeglot.verify(out)
    assert found.verdict == "does not hold"
    assert "model.norm.weight has NaN" in found.checks[1].detail


PROJECTION = "model.layers.0.self_attn.o_proj.weight"
FAULTS = {
    "scales that are NaN": lambda tensors: tensors[PROJECTION + "_scale_inv"].fill_(torch.nan),
    "scales that are NaN or infinite": lambda tensors: tensors[PROJECTION + "_scale_inv"].fill_(torch.inf),
    "under which codes are infinite": lambda tensors: tensors[PROJECTION + "_scale_inv"].fill_(3e38),
    "scales of 0 beside codes": lambda tensors: tensors[PROJECTION + "_scale_inv"].zero_(),
    "which are NaN in E4M3": lambda tensors: tensors[PROJECTION].view(torch.uint8)[0, 0].fill_(0x7F),
    f"{PROJECTION}_scale_inv is [3, 1], a matrix": lambda tensors: tensors.update({PROJECTION + "_scale_inv": torch.ones(3, 1)}),
    f"{PROJECTION}: missing, and {PROJECTION}_scale_inv means nothing": lambda tensors: tensors.pop(PROJECTION),
    f"{PROJECTION}_scale_inv: missing": lambda tensors: tensors.pop(PROJECTION + "_scale_inv"),
    "e_score_correction_bias has NaN": lambda tensors: tensors["model.layers.0.mlp.gate.e_score_correction_bias"][1].fill_(torch.inf),
}


@pytest.fixture(scope="module")
def with_fp8_attention(tmp_path_factory):
    """DeepSeek-V3 in FP8 blocks, a matrix that is no expert among them, as its producer writes it."""
    where = tmp_path_factory.mktemp("fp8")
    moeglot.convert(write_checkpoint(where / "plain", "deepseek-v3/hub", {**SIZES, "q": 6}, 1), "deepseek-v3/hub+fp8-block", where / "out", allow_loss=True)
    (where / "out" / "moeglot.json").unlink()
    tensors, config = load_file(where / "out" / "model.safetensors"), json.loads((where / "out" / "config.json").read_text())
    coded = FP8(scale="F32").encode(torch.randn(tensors[PROJECTION].shape))
    tensors |= {PROJECTION: coded["weight"], PROJECTION + "_scale_inv": coded["scale"]}
    save_file(tensors, where / "out" / "model.safetensors", {"format": "pt"})
    del config["quantization_config"]["modules_to_not_convert"]
    (where / "out" / "config.json").write_text(json.dumps(config))
    assert moeglot.verify(where / "out").verdict == "holds"
    return where / "out"


def test_a_plan_that_decodes_what_is_no_expert_reads_none_of_it(with_fp8_attention):
    """What it decodes to is known from headers."""
    fs = fsspec.filesystem("memory")
    upload(fs, with_fp8_attention, "/planned")
    source = moeglot.open("counted://planned")
    READ.clear()
    plan = moeglot.plan(source, "deepseek-v3/transformers-5")
    assert READ == []
    ((matrix,),) = [parts for parts in plan.dense.values() if parts[0].name == PROJECTION]
    assert matrix.shape == tuple(matrix.read().shape)
    assert {file for file, _ in READ} == {"model.safetensors"}
    fs.rm("/planned", recursive=True)


@pytest.mark.parametrize("fault", FAULTS)
def test_numbers_of_what_is_no_expert(fault, with_fp8_attention, tmp_path):
    source = Path(shutil.copytree(with_fp8_attention, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    FAULTS[fault](tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    found = moeglot.verify(source)
    assert [check.what for check in found.checks if check.verdict == "does not hold"] == ["finite numbers and scales"]
    assert fault in found.checks[1].detail
    assert "(1 tensors that are no experts)" in found.checks[1].detail
    with pytest.raises(BadNumbers, match=re.escape(fault)):
        moeglot.convert(source, "deepseek-v3/hub+fp8-block", tmp_path / "out")


def test_a_declared_type_that_other_tensors_need(tmp_path):
    """Who loads the folder as it says would round them."""
    plain = write_checkpoint(tmp_path / "plain", "qwen3-moe/transformers-5", {**SIZES, "q": 6, "d": 64}, 2, dtype=torch.float32)
    tensors = {name: tensor.bfloat16() if ".experts." in name else tensor for name, tensor in load_file(plain / "model.safetensors").items()}
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    key = "dtype" if "dtype" in config else "torch_dtype"
    (plain / "config.json").write_text(json.dumps({**config, key: "float32"}))
    moeglot.convert(plain, "qwen3-moe/hub", tmp_path / "out", encode="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())[key] == "float32"


def test_chat_templates_in_a_folder_of_their_own(tmp_path):
    source = folder(tmp_path)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    moeglot.convert(source, "qwen3-moe/hub", tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
    assert "additional_chat_templates/tool_use.jinja" in json.loads((tmp_path / "out" / "moeglot.json").read_text())["output"]["sha256"]


@pytest.fixture(scope="module")
def certified(tmp_path_factory):
    """The output of a conversion in several shards, with what lies beside weights."""
    where = tmp_path_factory.mktemp("certified")
    source = folder(where)
    (source / "additional_chat_templates").mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "README.md", "additional_chat_templates/rag.jinja", os.fsdecode(b"not\xff.txt")):
        (source / name).write_text("{}")
    moeglot.convert(source, "qwen3-moe/hub", where / "out", shard_size=100_000)
    return where / "out"


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without_a_shard(folder: Path) -> None:
    """The last one, which the index no longer names."""
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())["weight_map"]
    gone = next(file for file in set(told.values()) if not any(".experts." in name for name in told if told[name] == file))
    (folder / gone).unlink()
    rewrite(index, weight_map={name: file for name, file in told.items() if file != gone})


CHANGES = {
    "config.json is not as": lambda folder: rewrite(folder / "config.json", num_experts_per_tok=1),
    "tokenizer.json is not as": lambda folder: rewrite(folder / "tokenizer.json", a=1),
    "chat_template.jinja is missing": lambda folder: (folder / "chat_template.jinja").unlink(),
    "additional_chat_templates/rag.jinja is missing": lambda folder: (folder / "additional_chat_templates" / "rag.jinja").unlink(),
    "not\\udcff.txt is missing": lambda folder: (folder / os.fsdecode(b"not\xff.txt")).unlink(),
    "generation_config.json is not in moeglot.json": lambda folder: (folder / "generation_config.json").write_text("{}"),
    "tokenizer_config.json is not in moeglot.json": lambda folder: (folder / "tokenizer_config.json").write_text("{}"),
    "modeling_ours.py is not in moeglot.json": lambda folder: (folder / "modeling_ours.py").write_text(""),
    "-of-00013.safetensors is missing, model.safetensors.index.json is not as": without_a_shard,
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_certified_file_is_there_as_it_was(change, certified, tmp_path):
    out = Path(shutil.copytree(certified, tmp_path / "out"))
    assert moeglot.verify(out).verdict == "holds"
    CHANGES[change](out)
    found = moeglot.verify(out)
    assert [(check.what, check.verdict) for check in found.checks if check.verdict != "holds"] == [("as certified", "does not hold")]
    assert change in found.checks[-1].detail


def test_a_model_card_may_be_edited_after_a_conversion(certified, tmp_path):
    out = Path(shutil.copytree(certified, tmp_path / "out"))
    (out / "README.md").write_text("ours")
    (out / "added.txt").write_text("ours, too")
    check = moeglot.verify(out).checks[-1]
    assert (check.what, check.verdict) == ("as certified", "holds")
    assert "README.md is not as moeglot.json certifies it, which no program reads" in check.detail


def test_a_tokenizer_may_be_saved_beside_a_model_that_was_certified_without_one(tmp_path):
    """As whoever calls `moeglot.save` does; it is told."""
    moeglot.convert(folder(tmp_path), "qwen3-moe/hub", tmp_path / "out")
    (tmp_path / "out" / "tokenizer_config.json").write_text("{}")
    check = moeglot.verify(tmp_path / "out").checks[-1]
    assert (check.what, check.verdict) == ("as certified", "holds")
    assert "; tokenizer_config.json is not in moeglot.json" in check.detail


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_certificate_of_a_file_that_no_folder_can_hold(name, certified, tmp_path):
    out = Path(shutil.copytree(certified, tmp_path / "out"))
    told = json.loads((out / "moeglot.json").read_text())
    told["output"]["sha256"][name] = "0"
    (out / "moeglot.json").write_text(json.dumps(told))
    assert (moeglot.verify(out).checks[-1].verdict, moeglot.verify(out).verdict) == ("does not hold", "does not hold")


def test_a_certificate_is_no_fingerprint(certified):
    with pytest.raises(UsageError, match="a certificate, not a fingerprint") as found:
        moeglot.verify(certified, certified / "moeglot.json")
    assert f"run `moeglot verify {certified}`" in str(found.value)


@pytest.mark.parametrize("text", ['{"schema": "moeg', "[]", '{"output": {"sha256": {"../config.json": "0"}}}', '{"output": {"sha256": {}}}', "\udcff"])
def test_a_certificate_that_cannot_be_read(text, certified, tmp_path):
    out = Path(shutil.copytree(certified, tmp_path / "out"))
    (out / "moeglot.json").write_text(text, errors="surrogateescape")
    check = moeglot.verify(out).checks[-1]
    assert (check.what, check.verdict) == ("as certified", "cannot tell")
    assert check.detail.startswith("moeglot.json ")


def test_json_of_a_name_that_is_no_utf8(tmp_path):
    """A name on Linux is any bytes; what is printed is JSON in UTF-8 all the same, and says the name."""
    name = os.fsdecode(b"not\xff")
    text = dump(inspect_json(moeglot.open(folder(tmp_path).rename(tmp_path / name)))).encode("utf-8")
    assert os.fsencode(json.loads(text)["path"]).endswith(b"/not\xff")


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules", "llm_int8_skip_modules"])
@pytest.mark.parametrize("value", [True, 4, "lm_head", {"lm_head": 1}])
def test_modules_that_are_named_by_no_list(key, value, with_fp8_attention, tmp_path):
    config = json.loads((with_fp8_attention / "config.json").read_text())
    shutil.copytree(with_fp8_attention, tmp_path / "a")
    rewrite(tmp_path / "a" / "config.json", quantization_config={**config["quantization_config"], key: value})
    with pytest.raises(Contradiction, match=f"{key} = "):
        moeglot.open(tmp_path / "a")


def test_names_that_are_nowhere_are_not_looked_for_expert_by_expert(tmp_path):
    """However many experts each layer has in INT4, which is as many names that end as those of other formats do."""

    class Counted(dict):
        looked = 0

        def __contains__(self, key):
            self.looked += 1
            return super().__contains__(key)

    made = write_checkpoint(tmp_path / "plain", "qwen3-moe/hub", SIZES, 2)
    moeglot.convert(made, "qwen3-moe/hub+int4-pack", tmp_path / "coded", allow_loss=True)
    few, looked = read_source(tmp_path / "coded"), []
    for copies in (1, 64):
        layers = {name.replace("layers.1.", f"layers.{n}."): entry for name, entry in few.entries.items() for n in range(1, 1 + copies)}
        entries = Counted({name: entry._replace(name=name) for name, entry in layers.items()})
        config = {**few.config, "num_hidden_layers": 1 + copies}
        assert [form.name for form in identify(replace(few, entries=entries, config=config, metadata=())).candidates] == ["qwen3-moe/hub+int4-pack"]
        looked.append(entries.looked)
    assert looked[1] < 1.1 * looked[0], looked


def test_a_claim_of_many_experts_is_not_believed(tmp_path):
    """What is looked for is bounded by what is in the file, whatever config.json says: attention has biases, so that experts one by one could have some."""
    source = Path(shutil.copytree(BUNDLED, tmp_path / "a"))
    rewrite(source / "config.json", num_local_experts=10**9)
    start = time.monotonic()
    with pytest.raises(MoeglotError):
        moeglot.open(source)
    assert time.monotonic() - start < 5
