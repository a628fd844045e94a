"""AMD's Quark: what it exports is read to the numbers that it reads again itself, and it reads what we write."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

import moeglot
from moeglot.errors import Contradiction, UnknownFormat
from moeglot.integrations.transformers import VERSION

pytest.importorskip("quark", reason="installed in an environment of its own")
if not all(map(shutil.which, ("g++", "ninja"))):
    pytest.skip("it compiles its kernel when it is imported, with g++ and ninja; tests/golden has what it wrote", allow_module_level=True)
pytestmark = pytest.mark.skipif(VERSION < (5, 23), reason="the release that its environment has")

SHARED = {"num_hidden_layers": 2, "vocab_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts_per_tok": 2}
CONFIGS = {
    "qwen3-moe": Qwen3MoeConfig(**SHARED, hidden_size=128, moe_intermediate_size=128, intermediate_size=128, num_experts=4),
    "mixtral": MixtralConfig(**SHARED, hidden_size=256, intermediate_size=128, num_local_experts=4),
}
LAYOUTS = {"qwen3-moe": "qwen3-moe/hub", "mixtral": "mixtral/quark"}
CODINGS = ("mxfp4-quark", "fp8-quark", "fp8-channel-quark", "int8-quark", "int8-channel-quark")
EACH = pytest.mark.parametrize(
    ("plain", "coding"), [*(("qwen3-moe", coding) for coding in CODINGS), *(("mixtral", coding) for coding in CODINGS[::2])], indirect=["plain"]
)
INT8 = {"is_dynamic": False, "round_method": "half_even", "scale_type": "float"}


@pytest.fixture(scope="module", params=CONFIGS)
def plain(request, tmp_path_factory):
    """(Family, a random model as transformers saves it.)"""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.bfloat16).save_pretrained(folder)
    return request.param, folder


def spec(coding):
    from quark.torch.quantization.config import config

    if coding == "mxfp4-quark":
        return config.OCP_MXFP4Spec(ch_axis=-1, is_dynamic=False).to_quantization_spec()
    if coding == "fp8-quark":
        return config.FP8E4M3PerTensorSpec(observer_method="min_max", is_dynamic=False).to_quantization_spec()
    if coding == "fp8-channel-quark":
        return config.FP8E4M3PerChannelSpec(ch_axis=0, is_dynamic=False).to_quantization_spec()
    if coding == "int4":
        return config.Int4PerGroupSpec(ch_axis=1, group_size=32, is_dynamic=False).to_quantization_spec()
    if coding == "int8-quark":
        return config.Int8PerTensorSpec(observer_method="min_max", symmetric=True, **INT8).to_quantization_spec()
    if coding in ("int8-channel-quark", "int8-channel-asymmetric"):
        return config.Int8PerChannelSpec(symmetric="asymmetric" not in coding, ch_axis=0, **INT8).to_quantization_spec()
    if coding == "int8-group":
        return config.Int8PerGroupSpec(symmetric=True, ch_axis=1, group_size=32, **INT8).to_quantization_spec()
    if coding == "fp6":
        return config.OCP_MXFP6E3M2Spec(ch_axis=-1, is_dynamic=False).to_quantization_spec()
    return config.AmdFP4Spec(ch_axis=-1, group_size=32, is_dynamic=False).to_quantization_spec()


def exported(plain, to, coding, exclude=("lm_head", "*.mlp.gate"), weight_format="real_quantized", layers=None, inputs=None):
    """The folder that Quark exports."""
    from quark.torch import ModelQuantizer, export_safetensors
    from quark.torch.quantization.config.config import QConfig, QLayerConfig
    from quark.torch.utils.llm.model_preparation import preprocess_for_quantization

    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16).eval()
    preprocess_for_quantization(model)
    of_layers = {pattern: QLayerConfig(weight=spec(other)) for pattern, other in (layers or {}).items()}
    config = QConfig(
        global_quant_config=QLayerConfig(weight=spec(coding), input_tensors=inputs and spec(inputs)), layer_quant_config=of_layers, exclude=list(exclude)
    )
    quantizer = ModelQuantizer(config)
    model = quantizer.quantize_model(model, [{"input_ids": torch.arange(96)[None]}])
    export_safetensors(quantizer.freeze(model), to, weight_format=weight_format)
    return to


def imported(folder):
    """(The model as Quark reads it, module -> the matrix that it computes with, for the quantized ones.)"""
    from quark.torch import import_model_from_safetensors
    from quark.torch.export.nn.modules.qparamslinear import QParamsLinear
    from quark.torch.utils.llm.model_preparation import preprocess_for_quantization

    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    preprocess_for_quantization(model, reload=True)
    model = import_model_from_safetensors(model, str(folder))
    found = {name: module for name, module in model.named_modules() if isinstance(module, QParamsLinear)}
    return model.float(), {name: module._get_qweight(module.weight).float() for name, module in found.items()}


def ours(folder, layer):
    """Suffix of a module -> its matrix, as we decode it."""
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    return {
        f"layers.{layer}.mlp.experts.{expert}.{names[role]}": lazy[expert].decode(torch.float32)
        for role, lazy in moeglot.open(folder).experts(layer).items()
        for expert in range(len(lazy))
    }


def off(found, right):
    return float((found - right).norm() / right.norm())


def logits(model):
    with torch.no_grad():
        return model(torch.arange(0, 96, 3)[None]).logits.float()


@EACH
def test_a_folder_that_it_exports(plain, coding, tmp_path):
    family, folder = plain
    given = exported(folder, tmp_path / "given", coding)
    assert moeglot.open(given).format.name == f"{LAYOUTS[family]}+{coding}"
    model, theirs = imported(given)
    for layer in (0, 1):
        for name, values in ours(given, layer).items():
            assert torch.equal(values, theirs["model." + name]), name
            assert not torch.equal(values.roll(1, 0), theirs["model." + name])
    right = logits(model)
    for native in (False, True):
        assert off(logits(moeglot.load(given, "float32", native=native)), right) < 1e-5
    assert moeglot.verify(given).verdict == "holds"
    moeglot.convert(given, f"{family}/hub", tmp_path / "float32", encode="float32")
    assert off(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.float32)), right) < 1e-5
    assert off(logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)), right) > 1e-3
    moeglot.convert(given, f"{family}/hub+{coding}", tmp_path / "other")
    moeglot.convert(tmp_path / "other", f"{LAYOUTS[family]}+{coding}", tmp_path / "back")
    (before, after) = (load_file(path / "model.safetensors") for path in (given, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)) for key in before if before[key].shape)


@EACH
def test_it_reads_what_we_write(plain, coding, tmp_path):
    family, folder = plain
    moeglot.convert(folder, f"{LAYOUTS[family]}+{coding}", tmp_path / "coded", allow_loss=True)
    model, theirs = imported(tmp_path / "coded")
    assert len(theirs) == 2 * 4 * 3
    for name, values in ours(tmp_path / "coded", 1).items():
        assert torch.equal(values, theirs["model." + name]), name
    assert off(logits(moeglot.load(tmp_path / "coded", "float32")), logits(model)) < 1e-5


@pytest.mark.parametrize("plain", ["qwen3-moe"], indirect=True)
def test_int8_with_zero_points_and_activations_under_a_scale(plain, tmp_path):
    """Other producers' files say the same numbers, and of activations the same, in channels that have zero points or not."""
    _, folder = plain
    given = exported(folder, tmp_path / "given", "int8-channel-asymmetric", inputs="int8-quark")
    _, theirs = imported(given)
    for name, values in ours(given, 0).items():
        assert torch.equal(values, theirs["model." + name]), name
    tensors = load_file(given / "model.safetensors")
    assert moeglot.convert(given, "qwen3-moe/hub+int8-channel-quark", tmp_path / "same").report.verdict == "holds"
    same = load_file(tmp_path / "same" / "model.safetensors")
    assert all(torch.equal(same[name], tensor) for name, tensor in tensors.items())
    moeglot.convert(given, "qwen3-moe/hub+int8-channel", tmp_path / "other", allow_loss=True)
    other = load_file(tmp_path / "other" / "model.safetensors")
    assert all(torch.equal(other[name].view(-1), tensor.view(-1)) for name, tensor in tensors.items() if ".experts." in name)
    said = json.loads((tmp_path / "other" / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert said["weights"]["symmetric"] is False
    assert (said["input_activations"]["strategy"], said["input_activations"]["dynamic"]) == ("tensor", False)


@pytest.mark.parametrize("plain", ["qwen3-moe"], indirect=True)
def test_patterns(plain, tmp_path):
    """Attention coded otherwise than the experts, an activation's scales, and a layer whose experts are left alone."""
    _, folder = plain
    layers = {"*self_attn.q_proj": "fp8-quark", "*self_attn.[kvo]_proj": "fp8-channel-quark"}
    given = exported(folder, tmp_path / "given", "mxfp4-quark", ["lm_head", "*.mlp.gate", "*layers.0.mlp.experts*"], layers=layers)
    model, theirs = imported(given)
    assert off(logits(moeglot.load(given, "float32")), logits(model)) < 1e-5
    assert moeglot.open(given).format.name == "qwen3-moe/hub+mxfp4-quark"
    assert all(line.is_plain for line in moeglot.open(given).format.lines(0))
    assert all(torch.equal(values, theirs["model." + name]) for name, values in ours(given, 1).items())
    scaled = exported(folder, tmp_path / "scaled", "fp8-quark", ["lm_head", "*.mlp.gate"], inputs="fp8-quark")
    moeglot.convert(scaled, "qwen3-moe/hub+fp8-quark", tmp_path / "again")
    assert sum(key.endswith("input_scale") for key in load_file(tmp_path / "again" / "model.safetensors")) == 2 * (4 + 4 * 3)


@pytest.mark.parametrize("plain", ["qwen3-moe"], indirect=True)
def test_activations_are_rounded_as_before_where_another_producer_was_between(plain, tmp_path):
    """Its own modules compute with both; without a word on activations, the numbers are others."""
    _, folder = plain
    exclude = ["lm_head", "*.mlp.gate", "*self_attn*"]
    given = exported(folder, tmp_path / "given", "fp8-quark", exclude, inputs="fp8-quark")
    moeglot.convert(given, "qwen3-moe/hub+fp8-tensor", tmp_path / "there", allow_loss=True)
    moeglot.convert(tmp_path / "there", "qwen3-moe/hub+fp8-quark", tmp_path / "back", allow_loss=True)
    right = logits(imported(given)[0])
    assert off(logits(imported(tmp_path / "back")[0]), right) < 1e-5
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    config["quantization_config"]["global_quant_config"]["input_tensors"] = None
    (tmp_path / "back" / "config.json").write_text(json.dumps(config))
    assert off(logits(imported(tmp_path / "back")[0]), right) > 1e-3


@pytest.mark.parametrize("plain", ["qwen3-moe"], indirect=True)
@pytest.mark.parametrize(
    ("coding", "wanted", "said"),
    [
        ("int4", {}, "'dtype': 'int4'"),
        ("int8-group", {}, "'dtype': 'int8', 'qscheme': 'per_group'"),
        ("fp6", {}, "'dtype': 'fp6_e3m2'"),
        ("amdfp4", {}, "'scale_format': 'e5m3'"),
        ("fp8-quark", {"weight_format": "fake_quantized"}, "'weight_format': 'fake_quantized'"),
        ("mxfp4-quark", {"layers": {"*layers.1.*": "amdfp4"}}, r"layers\.1\..* is declared as another coding(.|\n)*'scale_format': 'e5m3'"),
        ("fp8-quark", {"layers": {"*layers.1.*": "fp8-channel-quark"}}, r"layers\.1\..* is declared as another coding(.|\n)*'per_channel'"),
    ],
)
def test_what_is_refused_by_name(plain, coding, wanted, said, tmp_path):
    given = exported(plain[1], tmp_path / "given", coding, **wanted)
    with pytest.raises((UnknownFormat, Contradiction), match=said):
        moeglot.open(given)


@pytest.mark.parametrize("plain", ["qwen3-moe"], indirect=True)
def test_stock_transformers(plain, tmp_path):
    """A defect of this release that `inspect` names: with Quark installed it takes codes for weights, and only warns of scales that it did not expect."""
    moeglot.convert(plain[1], "qwen3-moe/hub+fp8-quark", tmp_path / "coded", allow_loss=True)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "coded", dtype=torch.bfloat16, output_loading_info=True)
    assert any(key.endswith("scale") for key in info["unexpected_keys"])
    assert float(model.model.layers[0].mlp.experts.down_proj.abs().max()) == 448
    assert any("codes for weights" in finding.what for finding in moeglot.lint(moeglot.open(tmp_path / "coded"), sample=False))
    assert json.loads((tmp_path / "coded" / "config.json").read_text())["quantization_config"]["quant_method"] == "quark"
