"""hf_quant_config.json beside config.json, or without a word there: what is read, carried over, left out or refused."""

import json
from pathlib import Path

import pytest
from adapters import WRITERS, Job
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint

import moeglot
from moeglot.codings.coding import leaves_alone
from moeglot.errors import Contradiction

SIZES = {"e": 4, "h": 64, "i": 64}
HUB, FILE = "qwen3-moe/hub", "hf_quant_config.json"


def folder(where: Path, alone: bool, exclude=None, **said) -> Path:
    """NVFP4 as ModelOpt exports it. `alone`: as it did before release .31, config.json says nothing. `exclude`, `said`: what the file says otherwise."""
    moeglot.convert(write_checkpoint(where / "plain", HUB, SIZES, 2), f"{HUB}+nvfp4-modelopt", where / "coded", allow_loss=True)
    (where / "coded" / "moeglot.json").unlink()
    tensors = where / "coded" / "model.safetensors"
    save_file(load_file(tensors), tensors, {"format": "pt"})
    config = json.loads((where / "coded" / "config.json").read_text())
    kept = config["quantization_config"]["ignore"]
    quantization = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": kept if exclude is None else exclude, **said}
    if alone:
        del config["quantization_config"]
        (where / "coded" / "config.json").write_text(json.dumps(config))
    (where / "coded" / FILE).write_text(json.dumps({"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": quantization}))
    return where / "coded"


def declared(out: Path) -> dict:
    return json.loads((out / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("layout", [HUB, "qwen3-moe/transformers-5"])
@pytest.mark.parametrize("alone", [False, True])
def test_it_is_carried_over_while_nothing_changes(alone, layout, tmp_path):
    """And config.json lists under `ignore` what is not quantized: there servers look, before they look into this file."""
    source = folder(tmp_path, alone)
    assert moeglot.convert(source, f"{layout}+nvfp4-modelopt", tmp_path / "out").report.verdict == "holds"
    assert (tmp_path / "out" / FILE).read_bytes() == (source / FILE).read_bytes()
    listed = json.loads((source / FILE).read_text())["quantization"]["exclude_modules"]
    assert len(listed) == 12
    assert declared(tmp_path / "out")["ignore"] == listed
    assert "exclude_modules" not in declared(tmp_path / "out")


@pytest.mark.parametrize("alone", [False, True])
def test_it_is_left_out_where_more_is_left_in_floats(alone, tmp_path):
    source = folder(tmp_path, alone)
    made = WRITERS["PEFT"][2](Job("qwen3-moe", 4, 64, 64, 4))
    made.tensors = {key.replace(".base_layer", ""): tensor for key, tensor in made.tensors.items() if ".base_layer.lora" in key}
    made.config["target_parameters"] = ["mlp.experts.gate_up_proj"]
    adapter = moeglot.open_adapter(made.save(tmp_path / "adapter"), moeglot.open(source), "peft")
    moeglot.merge(source, adapter, tmp_path / "out", keep_touched="bf16", allow_loss=True, threshold=0)
    said = declared(tmp_path / "out")
    here, there = (f"model.layers.0.mlp.experts.3.{role}_proj" for role in ("gate", "down"))
    assert leaves_alone({"ignore": said["ignore"]}, here)
    assert not leaves_alone(said, there)
    assert "exclude_modules" not in said
    assert not (tmp_path / "out" / FILE).exists()
    assert moeglot.verify(tmp_path / "out").verdict == "holds"


EXPERT = "model.layers.0.mlp.experts.1.up_proj"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"quant_algo": "FP8"}, "config.json says quant_algo = NVFP4, and hf_quant_config.json FP8"),
        ({"quant_algo": None}, "config.json says quant_algo = NVFP4, and hf_quant_config.json None"),
        ({"exclude": [EXPERT]}, f"config.json says that {EXPERT} is quantized, and hf_quant_config.json that it is left alone"),
        ({"exclude": ["*mlp.experts.1.*"]}, "config.json says that .* is quantized, and hf_quant_config.json that it is left alone"),
        ({"exclude": 4}, "exclude_modules|ignore = 4"),
    ],
)
def test_both_speak_and_do_not_agree(said, told, tmp_path):
    with pytest.raises(Contradiction, match=told):
        moeglot.open(folder(tmp_path, False, **said))


def test_it_leaves_out_experts_that_config_json_names(tmp_path):
    """As a layer of experts that was left in floats since the file was written."""
    source = folder(tmp_path, False)
    config, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    here = "model.layers.0.mlp.experts."
    floats = {key: tensor for key, tensor in load_file(tmp_path / "plain" / "model.safetensors").items() if key.startswith(here)}
    save_file({key: tensor for key, tensor in tensors.items() if not key.startswith(here)} | floats, source / "model.safetensors", {"format": "pt"})
    config["quantization_config"]["ignore"].append(f"{here}*")
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(Contradiction, match=f"says that {here}.* is left alone, and {FILE} that it is quantized"):
        moeglot.open(source)
    (source / FILE).unlink()
    assert moeglot.open(source).format.name == f"{HUB}+nvfp4-modelopt"


@pytest.mark.parametrize("alone", [False, True])
def test_no_quantization_is_in_it(alone, tmp_path):
    source = folder(tmp_path, alone)
    (source / FILE).write_text(json.dumps({"quantization": "x"}))
    with pytest.raises(Contradiction, match=f"{FILE} says quantization = x"):
        moeglot.open(source)


@pytest.mark.parametrize(
    "exclude",
    [
        ["lm_head", "model.embed_tokens", "*self_attn*", "*mlp.gate"],
        ["lm_head", "*self_attn*", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "model.layers.7.mlp.gate"],
        ["lm_head", "*self_attn*"],
    ],
    ids=["patterns", "and a layer that there is not", "no word on routers and embeddings"],
)
def test_the_same_in_other_words(exclude, tmp_path):
    source = folder(tmp_path, False, exclude)
    assert moeglot.convert(source, f"{HUB}+nvfp4-modelopt", tmp_path / "out").report.verdict == "holds"


def test_config_json_is_of_another_producer(tmp_path):
    source = folder(tmp_path, False)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(Contradiction, match=r"says quant_method = fp8, and hf_quant_config\.json quant_algo = NVFP4, which is ModelOpt's"):
        moeglot.open(source)
