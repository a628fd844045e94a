"""What `inspect` finds worth knowing: each finding on a folder that has it, and none on one that does not."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint

import moeglot
from moeglot.checkpoints.outline import outline
from moeglot.demo import BUNDLED
from moeglot.dtypes import DTYPES
from moeglot.files.source import read_source

HUB, STACKED = "qwen3-moe/hub", "qwen3-moe/transformers-5"
SIZES = {"e": 4, "h": 128, "i": 128}


def change_config(folder, **changes):
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, **changes}))


def change(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def findings(folder):
    return {finding.about: finding for finding in moeglot.lint(moeglot.open(folder))}


@pytest.fixture
def plain(tmp_path):
    return write_checkpoint(tmp_path / "plain", HUB, SIZES, 2)


def test_a_good_folder_has_nothing_to_say(plain):
    assert findings(plain) == {}


def test_experts_left_unquantized(tmp_path):
    """As bitsandbytes does in transformers 5: it says 4 bits and leaves stacked experts BF16."""
    folder = write_checkpoint(tmp_path / "a", STACKED, SIZES, 2)
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    found = findings(folder)["experts are not quantized"]
    numbers = 2 * 4 * 3 * 128 * 128
    assert found.figures["bytes"] == 2 * numbers
    assert found.figures["could_save"] == 2 * numbers - numbers // 2


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}


@pytest.mark.parametrize(
    ("said", "bits"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4),
        ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, 8),
        ({"quant_method": "gptq", "bits": 4}, 4),
        ({"quant_method": "gptq", "bits": 8}, 8),
        ({"quant_method": "awq", "w_bit": 4}, 4),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": GROUP}, "ignore": ["re:.*experts.*"]}, 4),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["*experts*"]}, 4),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["*experts*"]}, 8),
        ({"quant_method": "fp8", "modules_to_not_convert": ["experts"]}, 8),
    ],
)
def test_how_many_bits_would_do(said, bits, tmp_path):
    folder = write_checkpoint(tmp_path / "a", STACKED, SIZES, 1)
    change_config(folder, quantization_config=said)
    found = findings(folder)["experts are not quantized"]
    numbers = 4 * 3 * 128 * 128
    assert (found.figures["bytes"], found.figures["could_save"]) == (2 * numbers, 2 * numbers - numbers * bits // 8)
    assert f"{bits} bits a number" in found.what


def test_numbers_that_no_training_gives(plain):
    change(plain, lambda tensors: tensors["model.layers.1.mlp.experts.3.up_proj.weight"].mul_(1153))
    found = findings(plain)["numbers"]
    assert "a scale is wrong or missing" in found.what
    assert (found.figures["layer"], found.figures["expert"]) == (1, 3)


def test_an_expert_of_zeros_hides_no_other(plain):
    """Where one is the least that there is, the next one is what others are compared with; and none is compared with itself."""

    def spoil(tensors):
        tensors["model.layers.1.mlp.experts.0.up_proj.weight"].zero_()
        tensors["model.layers.1.mlp.experts.3.up_proj.weight"].mul_(700)
        for expert in range(4):
            tensors[f"model.layers.0.mlp.experts.{expert}.down_proj.weight"].fill_(4000)

    change(plain, spoil)
    told = [finding.what for finding in moeglot.lint(plain) if finding.about == "numbers"]
    assert [what for what in told if "layer 1, expert 0: all weights are zero" in what]
    assert [what for what in told if "layer 1, expert 3: the largest weight is" in what and "elsewhere" in what]
    assert [what for what in told if "layer 0, expert 3: the largest weight is 4e+03; a scale" in what]
    assert len(told) == 5


def test_either_of_two_in_one_tensor_and_no_bias(tmp_path):
    stacked = write_checkpoint(tmp_path / "a", STACKED, SIZES, 1)
    change(stacked, lambda tensors: tensors["model.layers.0.mlp.experts.gate_up_proj"][3, 128:].mul_(700))
    assert findings(stacked)["numbers"].figures["expert"] == 3
    biased = write_checkpoint(tmp_path / "b", "gpt-oss/transformers", SIZES, 1)
    change(biased, lambda tensors: [tensor.zero_() for name, tensor in tensors.items() if name.endswith("proj_bias")])
    assert "numbers" not in findings(biased)


def test_experts_that_differ_as_trained_ones_do(plain):
    """Ten times as loud, and quiet ones; and what is not looked at, the middle of a model."""
    change(plain, lambda tensors: tensors["model.layers.1.mlp.experts.3.up_proj.weight"].mul_(10))
    assert findings(plain) == {}


def test_an_expert_that_is_not_read_hides_no_other(plain):
    """Large numbers may all be negative."""

    def spoil(tensors):
        tensors["model.layers.1.mlp.experts.0.up_proj.weight"][0, 0] = torch.nan
        tensors["model.layers.1.mlp.experts.3.up_proj.weight"].abs_().mul_(-700)

    change(plain, spoil)
    first, second = (finding for finding in moeglot.lint(plain) if finding.about == "numbers")
    assert (first.figures["expert"], "NaN" in first.what) == (0, True)
    assert (second.figures["expert"], "elsewhere" in second.what) == (3, True)
    assert moeglot.lint(plain, sample=False) == ()


def test_zero_scales(plain, tmp_path):
    moeglot.convert(plain, f"{HUB}+fp8-block", tmp_path / "fp8", allow_loss=True)
    change(tmp_path / "fp8", lambda tensors: tensors["model.layers.0.mlp.experts.0.down_proj.weight_scale_inv"].zero_())
    assert "never filled" in findings(tmp_path / "fp8")["numbers"].what


def test_scales_that_belong_to_nothing(plain):
    change(plain, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.weight_scale_inv": torch.ones(1, 1)}))
    assert "q_proj.weight_scale_inv is there" in findings(plain)["unused scales"].what
    change(plain, lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.weight"))
    assert "q_proj.weight_scale_inv is there" in findings(plain)["orphan tensor"].what


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("there", "about", "words"),
    [
        ({".weight_scale": "F32"}, "orphan tensor", f"none of {Q}.weight, {Q}.weight_packed"),
        ({".weight_scale": "F32", ".weight": "BF16"}, "unused scales", f"{Q}.weight is BF16"),
        ({".weight_scale": "F32", ".weight": "F8_E4M3"}, None, ""),
        ({".weight_scale": "F32", ".weight_packed": "U8"}, None, ""),
        ({".weight_packed": "U8"}, "orphan tensor", f"none of {Q}.weight_scale"),
        ({".weight_scale_inv": "F32", ".weight": "F8_E4M3"}, None, ""),
        ({"_blocks": "U8"}, "orphan tensor", f"{Q}_blocks is there, and none of {Q}_scales"),
        ({"_scales": "U8"}, "orphan tensor", f"{Q}_scales is there, and none of {Q}_blocks"),
        ({"_blocks": "U8", "_scales": "U8"}, None, ""),
        ({".weight": "F8_E4M3"}, None, ""),
    ],
)
def test_what_belongs_together_outside_the_experts(there, about, words, plain):
    def put(tensors):
        tensors.pop(f"{Q}.weight")
        tensors.update({Q + suffix: torch.ones(64, 128, dtype=DTYPES[dtype].torch) for suffix, dtype in there.items()})

    change(plain, put)
    found = [(finding.about, words in finding.what) for finding in moeglot.lint(plain) if finding.about != "not aligned"]
    assert found == ([(about, True)] if about else [])


def test_tensors_that_are_not_aligned(plain):
    raw = (plain / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    (plain / "model.safetensors").write_bytes((length + 4).to_bytes(8, "little") + raw[8 : 8 + length] + b"    " + raw[8 + length :])
    assert findings(plain)["not aligned"].figures["tensors"] == 2 * 4 * 3  # the experts' alone


def test_a_scale_that_is_not_aligned_is_copied_anyway(plain, tmp_path):
    moeglot.convert(plain, f"{HUB}+fp8-block", tmp_path / "fp8", allow_loss=True)
    raw = (tmp_path / "fp8" / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    moved = (length + 8).to_bytes(8, "little") + raw[8 : 8 + length] + b" " * 8 + raw[8 + length :]
    (tmp_path / "fp8" / "model.safetensors").write_bytes(moved)
    assert findings(tmp_path / "fp8")["not aligned"].figures["tensors"] == 2 * 4 * 3  # 48 tensors start there, half of them scales of 4 bytes


def test_rows_that_grouped_gemms_refuse(tmp_path):
    folder = write_checkpoint(tmp_path / "a", HUB, {"e": 2, "h": 64, "i": 36}, 1)
    assert findings(folder)["rows not aligned"].figures["row_bytes"] == 72
    assert "down_proj" in findings(folder)["rows not aligned"].what
    assert "rows not aligned" not in findings(write_checkpoint(tmp_path / "b", HUB, {"e": 2, "h": 64, "i": 36}, 1, dtype=torch.float32))
    assert "rows not aligned" not in findings(_coded(tmp_path / "c", "fp8-channel", {"e": 2, "h": 72, "i": 72}))  # in 16 bits, 144 bytes


def test_a_layer_of_another_layout_for_multi_token_prediction(plain):
    change_config(plain, num_nextn_predict_layers=1)
    change(plain, lambda tensors: tensors.update({"model.layers.2.mlp.experts.gate_up_proj": torch.ones(4, 256, 128).bfloat16()}))
    assert "model.layers.{n}.mlp.experts.gate_up_proj" in findings(plain)["mixed layouts"].what


def test_a_layer_for_multi_token_prediction_that_is_stored_as_others_are(plain, tmp_path):
    """The first layer is left in BF16, as producers do: such a layer is as most are, until it is left so, too, and none of the others is."""
    moeglot.convert(plain, f"{HUB}+fp8-block", tmp_path / "fp8", allow_loss=True)
    (tmp_path / "fp8" / "moeglot.json").unlink()
    told, given = json.loads((tmp_path / "fp8" / "config.json").read_text()), load_file(plain / "model.safetensors")
    change_config(tmp_path / "fp8", num_nextn_predict_layers=1)
    coded = load_file(tmp_path / "fp8" / "model.safetensors")

    def third(tensors):
        return {key.replace("layers.1", "layers.2"): tensor.clone() for key, tensor in tensors.items() if "layers.1.mlp.experts" in key}

    save_file(coded | third(given), tmp_path / "fp8" / "model.safetensors", {"format": "pt"})
    assert "experts of BF16, the others of F32 and F8_E4M3" in findings(tmp_path / "fp8")["mixed layouts"].what
    kept = [*(told["quantization_config"].get("modules_to_not_convert") or []), "model.layers.0.mlp.experts"]
    change_config(tmp_path / "fp8", quantization_config={**told["quantization_config"], "modules_to_not_convert": kept})
    first = {key: tensor for key, tensor in given.items() if "layers.0.mlp.experts" in key}
    rest = {key: tensor for key, tensor in coded.items() if "layers.0.mlp.experts" not in key}
    save_file(rest | first | third(coded), tmp_path / "fp8" / "model.safetensors", {"format": "pt"})
    assert "mixed layouts" not in findings(tmp_path / "fp8")


def test_such_a_layer_that_is_counted_apart(plain):
    change(plain, lambda tensors: tensors.update({"mtp.layers.0.mlp.experts.gate_up_proj": torch.ones(4, 256, 128).bfloat16()}))
    assert "mtp.layers.{n}.mlp.experts.gate_up_proj" in findings(plain)["mixed layouts"].what


def test_such_a_layer_whose_name_begins_with_its_number(tmp_path):
    folder = write_checkpoint(tmp_path / "a", "deepseek-v4/hub", SIZES, 2)
    change_config(folder, num_nextn_predict_layers=1)
    change(folder, lambda tensors: tensors.update({"layers.2.ffn.experts.gate_up_proj": torch.ones(4, 256, 128).bfloat16()}))
    assert "layers.{n}.ffn.experts.gate_up_proj" in findings(folder)["mixed layouts"].what


@pytest.mark.parametrize(
    ("make", "reader", "words"),
    [
        (lambda path: write_checkpoint(path, STACKED, SIZES, 2), "transformers 4.57", "leaves the experts random"),
        (lambda path: BUNDLED, "transformers 5.5", "bfloat16 without a word"),
        (lambda path: _with_rope_parameters(path, 1e6), "transformers 4.57", "takes rope_theta 10000.0, where the file says 1000000.0"),
        (lambda path: _coded(path, "fp8-block", {"e": 2, "h": 192, "i": 192}), "transformers 5.23", "10 % off"),
        (lambda path: _coded(path, "fp8-block", SIZES), "transformers 5.5", "drops the FP8 scales"),
        (lambda path: _coded(path, "nf4", SIZES), "transformers 5.5", "packed bytes"),
        (lambda path: _coded(path, "int4-pack", SIZES, "int4:32:asymmetric"), "transformers 5.23", "INT4 and INT8 experts with zero points"),
        (lambda path: _coded(path, "int8-pack", SIZES, "int8-pack:128:asymmetric"), "transformers 5.23", "INT8 experts with zero points"),
        (lambda path: _coded(path, "int8-channel", SIZES), "transformers 5.23", "a byte each"),
        (lambda path: _coded(path, "nf4", {"e": 4, "h": 96, "i": 96}), "bitsandbytes 0.50", "AVX512"),
    ],
)
def test_loaders_that_would_misread_it(make, reader, words, tmp_path):
    found = [finding.what for finding in moeglot.lint(moeglot.open(make(tmp_path / "a")), sample=False) if finding.about == f"misread by {reader}"]
    assert any(words in what for what in found), found


STACKED_57 = ("transformers 4.57", "leaves the experts random")
STACKED_23 = ("transformers 5.23", "decodes no stacked experts")
DROPPED = ("transformers 5.5", "drops the FP8 scales")
RAGGED = ("transformers 5.23", "ragged last block")
QUARK = ("transformers 5.23", "without amd-quark")
ZEROS = ("transformers 5.23", "with zero points")
BYTES = ("transformers 5.23", "a byte each")
ONE_BY_ONE = {("transformers 5.5", "packed bytes of 4-bit"), ("transformers 5.23", "stored one by one")}
NATIVE = {("transformers 4.57", "forward of dequantized MXFP4"), ("transformers 5.5", "without a word"), ("transformers 5.23", "under the names of blocks")}
BY_SHAPE = {("transformers 5", "decides by shape")}


@pytest.mark.parametrize(
    ("form", "coding", "encode", "h", "i", "told"),
    [
        (HUB, None, None, 128, 128, set()),
        (STACKED, None, None, 128, 128, {STACKED_57}),
        ("gpt-oss/transformers", None, None, 128, 128, set()),
        ("gpt-oss/openai", None, None, 128, 128, NATIVE),
        ("gpt-oss/original", None, None, 128, 128, set()),
        (HUB, "fp8-block", None, 128, 128, {DROPPED}),
        (HUB, "fp8-block", None, 128, 192, {DROPPED, RAGGED}),
        (STACKED, "fp8-block", None, 128, 128, {DROPPED, STACKED_57, STACKED_23}),
        (HUB, "fp8-channel", None, 72, 72, set()),
        (HUB, "autofp8", None, 128, 128, {("transformers", "`weight_scale_inv` alone")}),
        (HUB, "fp8-quark", None, 128, 128, {QUARK}),
        (HUB, "int8-channel-quark", None, 128, 128, {QUARK}),
        (HUB, "nvfp4-pack", None, 128, 128, {("transformers 5.23", "without their global scale")}),
        (HUB, "nvfp4-modelopt", None, 128, 128, set()),
        (STACKED, "nvfp4-modelopt", None, 128, 128, {STACKED_57, STACKED_23}),
        (HUB, "int4-pack", None, 128, 128, set()),
        (HUB, "int4-pack", "int4:32:asymmetric", 128, 128, {ZEROS}),
        (HUB, "int8-pack", None, 128, 128, set()),
        (HUB, "int8-pack", "int8-pack:128:asymmetric", 128, 128, {ZEROS}),
        (HUB, "int8-channel", None, 128, 128, {BYTES}),
        (STACKED, "int8-channel", None, 128, 128, {STACKED_57, STACKED_23}),
        (HUB, "nf4", None, 128, 128, ONE_BY_ONE),
        (HUB, "fp4", None, 72, 72, ONE_BY_ONE),
        (HUB, "nf4", None, 128, 96, ONE_BY_ONE | {("bitsandbytes 0.50", "AVX512")}),
        (STACKED, "fp4", None, 128, 128, {STACKED_57}),
        ("qwen3-vl-moe/hub", None, None, 128, 128, BY_SHAPE),
        ("qwen3-vl-moe/hub", None, None, 128, 64, BY_SHAPE),
        ("qwen3-vl-moe/hub", None, None, 64, 128, set()),
        ("inkling2/transformers-5", None, None, 128, 128, {STACKED_57, ("transformers 5.24", "leaves attention random")}),
        ("inkling2-text/transformers-5", None, None, 128, 128, {STACKED_57, ("transformers 5.24", "leaves attention random")}),
        ("inkling/transformers-5", None, None, 128, 128, {STACKED_57}),
        ("inkling2/hub", None, None, 128, 128, set()),
    ],
)
def test_each_loader_that_would_misread_it_is_told_and_no_other(form, coding, encode, h, i, told, tmp_path):
    source = write_checkpoint(tmp_path / "source", form, {"e": 2, "h": h, "i": i}, 1)
    if coding:
        moeglot.convert(source, f"{form}+{coding}", tmp_path / "coded", encode=encode, allow_loss=True)
    found = [(one.figures["reader"], one.what) for one in moeglot.lint(tmp_path / "coded" if coding else source, sample=False) if "reader" in one.figures]
    assert len(found) == len(told)
    assert all(any(reader == one and words in what for one, what in found) for reader, words in told), found


@pytest.mark.parametrize(
    ("form", "changes", "words"),
    [
        (HUB, {"num_experts": None, "num_local_experts": 4}, "does not know num_local_experts"),
        (HUB, {"num_local_experts": 4}, None),
        ("mixtral/hub", {}, None),
        ("llama4/hub", {"architectures": ["Llama4ForConditionalGeneration"]}, "image_outputs"),
        ("llama4/hub", {"architectures": ["Llama4ForCausalLM"]}, None),
        ("llama4/hub", {"architectures": None}, None),
    ],
)
def test_what_config_json_has_a_loader_misread(form, changes, words, tmp_path):
    folder = write_checkpoint(tmp_path / "a", form, SIZES, 1)
    told = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in told.items() if value is not None or key == "architectures"}))
    found = [one.what for one in moeglot.lint(folder, sample=False) if "reader" in one.figures]
    assert len(found) == (words is not None)
    assert words is None or words in found[0]


def test_what_save_pretrained_writes_one_by_one_is_not_called_stacked(tmp_path):
    source = write_checkpoint(tmp_path / "a", "deepseek-v4/transformers", {"e": 2, "h": 64, "i": 64}, 2)
    assert not [found.what for found in moeglot.lint(moeglot.open(source), sample=False) if "stacked" in found.what]


def _with_rope_parameters(path, theta, form=HUB, **more):
    folder = write_checkpoint(path, form, SIZES, 1)
    told = json.loads((folder / "config.json").read_text())
    told.pop("rope_theta", None)
    told["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"} | more
    (folder / "config.json").write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize(("form", "theta"), [(HUB, 10_000), ("mixtral/hub", 1e6)])
def test_a_rope_that_an_older_release_takes_by_default(form, theta, tmp_path):
    """What it does not read is what it takes: no word on that."""
    assert "misread by transformers 4.57" not in findings(_with_rope_parameters(tmp_path / "a", theta, form))
    found = findings(_with_rope_parameters(tmp_path / "b", theta, form, rope_type="linear", factor=2.0))["misread by transformers 4.57"]
    assert found.figures["takes"] == {"rope_scaling": None}
    assert "rope_theta" in findings(_with_rope_parameters(tmp_path / "c", 5e5, form))["misread by transformers 4.57"].figures["takes"]


YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("form", "rope", "beside", "takes"),
    [
        ("gpt-oss/transformers", {"rope_type": "default", "rope_theta": 150_000}, {}, {"rope_scaling": YARN}),
        ("gpt-oss/transformers", {**YARN, "rope_theta": 150_000}, {}, {}),
        (HUB, {"rope_type": "default", "rope_theta": 10_000, "partial_rotary_factor": 0.5}, {}, {"partial_rotary_factor": 1.0}),
        ("glm4-moe/hub", {"rope_type": "default", "rope_theta": 10_000, "partial_rotary_factor": 0.5}, {}, {}),
        ("glm4-moe/hub", {"rope_type": "default", "rope_theta": 10_000, "partial_rotary_factor": 1.0}, {}, {"partial_rotary_factor": 0.5}),
        (HUB, {"rope_type": "default", "rope_theta": 5e6}, {"rope_theta": 5e6}, {}),  # as one may write it for both
        (HUB, {"rope_type": "default", "rope_theta": 5e6}, {"rope_theta": 1e6}, {"rope_theta": 1e6}),
        ("qwen3-vl-moe/hub", {"rope_type": "default", "rope_theta": 1e6}, {}, {"rope_theta": 5e6}),
        ("qwen3-vl-moe/hub", {"rope_type": "default", "rope_theta": 5e6}, {}, {}),
        ("granitemoehybrid/hub", {"rope_type": "default", "rope_theta": 1e6}, {"position_embedding_type": "rope"}, {"rope_theta": 1e4}),
        ("granitemoehybrid/hub", {"rope_type": "default", "rope_theta": 1e6}, {"position_embedding_type": "nope"}, {}),
    ],
)
def test_what_an_older_release_takes_for_a_rope(form, rope, beside, takes, tmp_path):
    folder = write_checkpoint(tmp_path / "a", form, SIZES, 1)
    told = json.loads((folder / "config.json").read_text())
    part = told.get("text_config", told)
    for key in ("rope_theta", "rope_scaling"):
        part.pop(key, None)
    part |= {"rope_parameters": rope, **beside}
    (folder / "config.json").write_text(json.dumps(told))
    found = [one.figures["takes"] for one in moeglot.lint(folder, sample=False) if "takes" in one.figures]
    assert found == ([takes] if takes else [])


def _coded(path, coding, sizes, encode=None):
    moeglot.convert(write_checkpoint(path.parent / "before", HUB, sizes, 1), f"{HUB}+{coding}", path, encode=encode, allow_loss=True)
    return path


@pytest.mark.parametrize(("coding", "whole"), [("nvfp4-pack", "weight_global_scale"), ("nvfp4-modelopt", "weight_scale_2")])
def test_globals_that_servers_take_for_both(coding, whole, tmp_path):
    folder = _coded(tmp_path / "a", coding, SIZES)
    assert "globals of gate and up" not in findings(folder)
    change(folder, lambda tensors: tensors[f"model.layers.0.mlp.experts.3.up_proj.{whole}"].mul_(1.25))
    found = findings(folder)["globals of gate and up"]
    assert found.figures["expert"] == 3
    assert "vLLM and TensorRT-LLM take one for both" in found.what


def test_an_unknown_family_is_outlined_and_refused(plain):
    change_config(plain, model_type="brand_new_moe")
    rows = {row.template: row for row in outline(read_source(plain, headers_only=True))}
    experts = rows["model.layers.{}.mlp.experts.{}.up_proj.weight"]
    assert experts.ranges == ((0, 1), (0, 3))
    assert experts.shapes == ((128, 128),)
    assert experts.tensors == 8
    with pytest.raises(moeglot.UnknownFormat, match="brand_new_moe"):
        moeglot.open(plain)
