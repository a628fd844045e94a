"""Weights in MXFP4 beside activations in FP8, as AMD releases gpt-oss: one scale of activations for each Linear, whatever roles it holds."""

import json

import pytest
import torch
from reading import differing
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint

import moeglot
from moeglot.reports.report import plan_json

QUARK, OPENAI, APART = "gpt-oss/quark+mxfp4-quark", "gpt-oss/openai", "gpt-oss/llm-compressor-0.14+mxfp4-quark"
INPUTS = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "ch_axis": None, "is_dynamic": False, "symmetric": True, "observer_cls": "PerTensorMinMaxObserver"}


@pytest.fixture
def given(tmp_path):
    """The release in MXFP4, and the same numbers as AMD's releases hold them, each scale of activations another."""
    write_checkpoint(tmp_path / "openai", OPENAI, {"e": 2, "h": 64, "i": 64}, 2)
    moeglot.convert(tmp_path / "openai", QUARK, folder := tmp_path / "given")
    held, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    linears = sorted(key.removesuffix(".weight_scale") for key in held if key.endswith(".weight_scale"))
    assert linears[:2] == [f"model.layers.0.mlp.experts.0.{name}" for name in ("down_proj", "gate_up_proj")]
    scales = {f"{name}.input_scale": torch.tensor(0.25 * (n + 1)) for n, name in enumerate(linears)}
    save_file(held | scales, folder / "model.safetensors", {"format": "pt"})
    config["quantization_config"]["global_quant_config"]["input_tensors"] = INPUTS
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "moeglot.json").unlink()
    return folder


def test_it_is_read_and_written_again(given, tmp_path):
    assert moeglot.open(given).format.name == QUARK
    assert moeglot.compare(given, tmp_path / "openai").verdict == "holds"
    moeglot.convert(given, QUARK, tmp_path / "again")
    assert differing(given, tmp_path / "again") == []


def test_a_linear_each_has_its_own(given, tmp_path):
    """That of gate and up together is that of each of them."""
    moeglot.convert(given, APART, tmp_path / "apart")
    mine, theirs = load_file(given / "model.safetensors"), load_file(tmp_path / "apart" / "model.safetensors")
    for key in (key for key in theirs if key.endswith(".input_scale")):
        joined = key.replace("gate_proj", "gate_up_proj").replace(".up_proj", ".gate_up_proj")
        assert torch.equal(theirs[key].view(()), mine[joined])
    assert sum(key.endswith(".input_scale") for key in theirs) == 2 * 2 * 3


@pytest.mark.parametrize("target", [OPENAI, "gpt-oss/transformers", "gpt-oss/quark+nvfp4-modelopt"])
def test_whose_activations_are_rounded_otherwise_goes_without(target, given, tmp_path):
    plan = moeglot.plan(given, target)
    assert [told["tensors"] for told in plan_json(plan)["undeclared"]] == [8]
    moeglot.convert(given, target, tmp_path / "out")
    assert not any("input_scale" in key for key in load_file(tmp_path / "out" / "model.safetensors"))
    assert moeglot.compare(given, tmp_path / "out").verdict == "holds"


def test_one_that_is_no_number_is_refused(given):
    path = given / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.mlp.experts.0.gate_up_proj.input_scale": torch.tensor(float("nan"))}, path, {"format": "pt"})
    with pytest.raises(moeglot.MoeglotError, match="input_scale"):
        moeglot.convert(given, OPENAI, given.parent / "out")
