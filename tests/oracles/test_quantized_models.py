"""Whole quantized checkpoints: real transformers, with compressed-tensors, loads what we quantize and holds the numbers that we decode."""

import json

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import moeglot
from moeglot.formats import FAMILIES
from moeglot.integrations.transformers import VERSION

pytest.importorskip("compressed_tensors", reason="installed beside transformers 5.23 only")
pytestmark = pytest.mark.skipif(VERSION < (5, 23), reason="the release that dequantizes experts on a CPU")

HUB = "qwen3-moe/hub"
SIZES = {"square": (128, 128), "h=2i": (256, 128)}


@pytest.fixture(params=SIZES, ids=list(SIZES))
def plain(request, tmp_path):
    """A random model as transformers saves it."""
    hidden, intermediate = SIZES[request.param]
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=intermediate, intermediate_size=64, num_hidden_layers=2, num_experts=4, num_experts_per_tok=2,
        vocab_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def load(path):
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    return model


def experts_of(folder, layer=1):
    """Expert -> (gate over up, down) in float32, as we decode them."""
    experts = moeglot.open(folder).experts(layer)
    decoded = {role: lazy.decode(torch.float32) for role, lazy in experts.items()}
    return torch.cat([decoded["gate"], decoded["up"]], 1), decoded["down"]


@pytest.mark.parametrize("coding", ["fp8-block", "fp8-channel", "fp8-tensor", "mxfp4-pack", "int4-pack", "mxfp8-minimax"])
def test_it_holds_the_numbers_that_we_decode(plain, coding, tmp_path):
    moeglot.convert(plain, f"{HUB}+{coding}", tmp_path / "coded", allow_loss=True)
    theirs = load(tmp_path / "coded").model.layers[1].mlp.experts
    gate_up, down = experts_of(tmp_path / "coded")
    assert torch.equal(theirs.gate_up_proj.data, gate_up.bfloat16())
    assert torch.equal(theirs.down_proj.data, down.bfloat16())
    given, _ = experts_of(plain)
    assert float((gate_up - given).norm() / given.norm()) > 1e-3  # the power of it: quantized numbers are not the given ones


def test_mxfp8_by_tencents_names(plain, tmp_path):
    """compressed-tensors, that has the same names and another quantization_config, decodes such a matrix to the same numbers."""
    from compressed_tensors.compressors.mxfp8.base import MXFP8QuantizationCompressor as Compressor
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    moeglot.convert(plain, f"{HUB}+mxfp8-hunyuan", tmp_path / "coded", allow_loss=True)
    assert json.loads((tmp_path / "coded" / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp8"
    held, (gate_up, down) = load_file(tmp_path / "coded" / "model.safetensors"), experts_of(tmp_path / "coded")
    for expert, whole in enumerate(gate_up):
        ours = {"gate": whole[: len(whole) // 2], "up": whole[len(whole) // 2 :], "down": down[expert]}
        for role, matrix in ours.items():
            name = f"model.layers.1.mlp.experts.{expert}.{role}_proj.weight"
            scheme = preset_name_to_scheme("MXFP8", targets=["Linear"])
            theirs = Compressor.decompress({"weight": held[name], "weight_scale": held[f"{name}_scale"]}, scheme)["weight"]
            assert torch.equal(theirs.float(), matrix)


@pytest.mark.parametrize("coding", ["fp8-block", "fp8-channel", "fp8-modelopt", "mxfp8", "mxfp4-pack", "int4-pack"])
def test_stacked_experts_are_not_decoded(plain, coding, tmp_path):
    """`inspect` says it of them, and of no others."""
    words = "decodes no stacked experts"
    moeglot.convert(plain, f"qwen3-moe/transformers-5+{coding}", tmp_path / "stacked", allow_loss=True)
    assert any(words in finding.what for finding in moeglot.lint(moeglot.open(tmp_path / "stacked"), sample=False))
    moeglot.convert(plain, f"{HUB}+{coding}", tmp_path / "one-each", allow_loss=True)
    assert not any(words in finding.what for finding in moeglot.lint(moeglot.open(tmp_path / "one-each"), sample=False))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "stacked", dtype=torch.bfloat16, output_loading_info=True)
    assert {key for key in info["unexpected_keys"] if key.endswith(("scale", "scale_inv"))}
    gate_up, _ = experts_of(tmp_path / "stacked")
    assert float((model.model.layers[1].mlp.experts.gate_up_proj.data.float() - gate_up).norm() / gate_up.norm()) > 0.5


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_what_autofp8_writes(plain, scheme, tmp_path):
    """Every Linear module but a few, attention too; compressed-tensors decodes such a matrix, transformers does not.

    https://github.com/neuralmagic/AutoFP8 (quantize.py)
    """
    from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme_of = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True))
    written, decoded = {}, {}
    for key, tensor in load_file(plain / "model.safetensors").items():
        written[key] = decoded[key] = tensor
        if key.endswith("_proj.weight"):
            inverse = 448 / tensor.abs().amax()
            written[key] = (tensor * inverse).clamp(-448, 448).to(torch.float8_e4m3fn)
            written[f"{key}_scale"] = inverse.float().reciprocal()
            state = {"weight": written[key], "weight_scale": written[f"{key}_scale"].view(1)}
            decoded[key] = FloatQuantizationCompressor.decompress(state, scheme_of)["weight"].float()
            if scheme == "static":
                written[key.replace("weight", "input_scale")] = torch.tensor(0.5)
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": scheme, "ignored_layers": ["lm_head"]}
    for name, tensors, told in (("given", written, config), ("decoded", decoded, {**config, "quantization_config": None})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({key: value for key, value in told.items() if value is not None}))
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    given = moeglot.open(tmp_path / "given")
    assert given.format.name == f"{HUB}+autofp8"
    assert any("leaves these scales aside" in finding.what for finding in moeglot.lint(given, sample=False))
    right = families.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "decoded", dtype=torch.float32))
    for native in (False, True):
        found = families.logits(moeglot.load(tmp_path / "given", "float32", native=native))
        assert float((found - right).norm() / right.norm()) < 1e-5
    stock = load(plain).float()
    assert float((families.logits(stock) - right).norm() / right.norm()) > 1e-3  # the power of it
    moeglot.convert(tmp_path / "given", HUB, tmp_path / "float32", encode="float32")
    assert all(torch.equal(a, b) for a, b in zip(experts_of(tmp_path / "float32"), experts_of(tmp_path / "decoded"), strict=True))


@pytest.mark.parametrize(("source", "coding"), [("autofp8", "fp8-tensor"), ("nvfp4-modelopt", "nvfp4-pack"), ("fp8-channel-quark", "fp8-channel")])
def test_activations_that_another_producer_rounds_under_scales_of_calibration(plain, source, coding, tmp_path):
    """compressed-tensors reads from the config that we write that a Linear module of experts has such a scale, under the name that the file has."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from transformers import AutoConfig

    moeglot.convert(plain, f"{HUB}+{source}", tmp_path / "given", allow_loss=True)
    tensors, config = load_file(tmp_path / "given" / "model.safetensors"), json.loads((tmp_path / "given" / "config.json").read_text())
    experts = {key.removesuffix(".weight") for key in load_file(plain / "model.safetensors") if ".experts." in key}
    (tmp_path / "given" / "moeglot.json").unlink()
    save_file(tensors | {f"{name}.input_scale": torch.tensor(0.25) for name in experts}, tmp_path / "given" / "model.safetensors", {"format": "pt"})
    said = config["quantization_config"]
    if source == "autofp8":
        said["activation_scheme"] = "static"
    if source == "fp8-channel-quark":
        said["global_quant_config"]["input_tensors"] = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}
    (tmp_path / "given" / "config.json").write_text(json.dumps(config))
    moeglot.convert(tmp_path / "given", f"{HUB}+{coding}", tmp_path / "coded", allow_loss=True)
    written = {key: tensor for key, tensor in load_file(tmp_path / "coded" / "model.safetensors").items() if ".input_" in key and ".experts." in key}
    assert {float(tensor) for tensor in written.values()} == {4.0 if coding == "nvfp4-pack" else 0.25}

    declared = json.loads((tmp_path / "coded" / "config.json").read_text())["quantization_config"]
    model = torch.nn.ModuleDict({"experts": torch.nn.Linear(128, 128)})
    apply_quantization_config(model, QuantizationConfig.model_validate({key: value for key, value in declared.items() if key != "quant_method"}))
    theirs = {name for name, _ in model["experts"].named_parameters() if name.startswith("input_")}
    assert {key.rpartition(".")[2] for key in written} <= theirs
    assert len(written) == len(experts)
    assert AutoConfig.from_pretrained(tmp_path / "coded").quantization_config["config_groups"]["group_0"]["input_activations"]["dynamic"] in (False, "local")


@pytest.mark.parametrize("name", ["laguna", "hy-v3"])
def test_modules_of_another_name_in_memory(name, tmp_path):
    """What is left in floats is left alone under the names that its readers look for, wherever the disk has others."""
    family = next(family for family in FAMILIES if family.name == name)
    settings = dict.fromkeys(("intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 64)
    config = families.config_of(family, {"e": 4, "h": 64, "i": 64})
    for key in settings.keys() & config.to_dict().keys():
        setattr(config, key, settings[key])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path / "plain")
    moeglot.convert(tmp_path / "plain", f"{name}/hub+int4-pack", tmp_path / "coded", allow_loss=True)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "coded", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert families.logits(model.eval()).isfinite().all()


@pytest.mark.parametrize("coding", ["fp8-block", "fp8-channel", "mxfp4-pack", "int4-pack"])
def test_a_layer_that_is_left_alone(plain, coding, tmp_path):
    """Layer 0 as it was, layer 1 quantized: it loads the folder that we write, and holds BF16 there and what we decode here.

    Packed codes it refuses to load so, whoever wrote them; `inspect` says it, and `moeglot.load` loads them.
    """
    moeglot.convert(plain, f"{HUB}+{coding}", tmp_path / "whole", allow_loss=True)
    path, first = tmp_path / "whole" / "model.safetensors", "model.layers.0.mlp.experts."
    given = {key: tensor for key, tensor in load_file(plain / "model.safetensors").items() if key.startswith(first)}
    save_file({key: tensor for key, tensor in load_file(path).items() if not key.startswith(first)} | given, path, {"format": "pt"})
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    kept = "modules_to_not_convert" if coding == "fp8-block" else "ignore"
    config["quantization_config"][kept] += [key.removesuffix(".weight") for key in given]
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config))

    stacked, back = tmp_path / "stacked", tmp_path / "back"
    moeglot.convert(tmp_path / "whole", f"qwen3-moe/transformers-5+{coding}", stacked)
    moeglot.convert(stacked, f"{HUB}+{coding}", back)
    packed = coding.endswith("-pack")
    if packed:
        with pytest.raises(RuntimeError, match="automatic conversion"):
            load(tmp_path / "whole")
        assert any("not quantized everywhere" in finding.what for finding in moeglot.lint(moeglot.open(back), sample=False))
    model = moeglot.load(back, "bfloat16") if packed else load(back)
    for layer in (0, 1):
        theirs, (gate_up, down) = model.model.layers[layer].mlp.experts, experts_of(back, layer)
        assert torch.equal(theirs.gate_up_proj.data, gate_up.bfloat16())
        assert torch.equal(theirs.down_proj.data, down.bfloat16())
        before, _ = experts_of(plain, layer)
        assert torch.equal(gate_up, before) == (layer == 0)


def test_nvfp4_it_dequantizes_without_the_global_scale(plain, tmp_path):
    """A defect of this release that `inspect` names: its experts are ours times their global scale, without a word."""
    moeglot.convert(plain, f"{HUB}+nvfp4-pack", tmp_path / "coded", allow_loss=True)
    theirs = load(tmp_path / "coded").model.layers[1].mlp.experts
    checkpoint = moeglot.open(tmp_path / "coded")
    _, down = experts_of(tmp_path / "coded")
    scales = torch.stack([checkpoint.experts(1)["down"][expert].parts["global"] for expert in range(4)])
    found = theirs.down_proj.data.float() / scales
    assert float((found - down).norm() / down.norm()) < 5e-3
    assert float((theirs.down_proj.data.float() - down).norm() / down.norm()) > 100
    assert any(finding.about == "misread by transformers 5.23" and "global" in finding.what for finding in moeglot.lint(checkpoint))


def test_what_is_no_expert_is_decoded_as_it_decodes_it(plain, tmp_path):
    """An attention matrix in FP8 too, coded here by the producer's formula: decoded with the experts, carried as it is where FP8 stays."""
    moeglot.convert(plain, f"{HUB}+fp8-block", tmp_path / "coded", allow_loss=True)
    path, name = tmp_path / "coded" / "model.safetensors", "model.layers.1.self_attn.o_proj"
    tensors, config = load_file(path), json.loads((tmp_path / "coded" / "config.json").read_text())
    weight = tensors[f"{name}.weight"].float()
    rows, columns = weight.shape
    blocks = weight.view(rows // 128, 128, columns // 128, 128)
    scale = blocks.abs().amax((1, 3)) / 448
    tensors[f"{name}.weight"] = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(rows, columns)
    tensors[f"{name}.weight_scale_inv"] = scale
    config["quantization_config"]["modules_to_not_convert"].remove(name)
    save_file(tensors, path, {"format": "pt"})
    (tmp_path / "coded" / "config.json").write_text(json.dumps(config))

    with pytest.raises(moeglot.LossRefused, match="decode"):
        moeglot.convert(tmp_path / "coded", HUB, tmp_path / "bf16")
    certificate = moeglot.convert(tmp_path / "coded", HUB, tmp_path / "bf16", allow_loss=True)
    assert any("outside the experts" in verb for verb in certificate.losses)
    theirs, ours = load(tmp_path / "coded"), load(tmp_path / "bf16")
    for (key, x), (other, y) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert key == other
        assert torch.equal(x, y), key
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    moeglot.convert(tmp_path / "coded", f"{HUB}+fp8-block", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert torch.equal(again[f"{name}.weight"].view(torch.uint8), tensors[f"{name}.weight"].view(torch.uint8))
    assert torch.equal(again[f"{name}.weight_scale_inv"], scale)
