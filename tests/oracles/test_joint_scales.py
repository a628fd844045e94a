"""Mistral-Small-4 as released: mistral3 around mistral4, in FP8 with one scale for gate and up of an expert, which lie in one tensor for all.

Names and scales are those that NVIDIA's AutoModel reads: https://github.com/NVIDIA-NeMo/Automodel (nemo_automodel/components/models/mistral4). The judge is
the stock model with code × scale written into it; transformers' own loader leaves these scales aside on a CPU.
"""

import json

import families
import pytest
import torch
from reading import differing, relative
from safetensors.torch import load_file, save_file

import moeglot
from moeglot.formats import FAMILIES

FAMILY = next(family for family in FAMILIES if family.name == "mistral-small4")
HUB = "mistral-small4/hub+fp8-block"
DECLARED = {
    "quant_method": "fp8",
    "activation_scheme": "static",
    "weight_block_size": None,
    "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head", "mlp.gate"],
}

pytestmark = pytest.mark.skipif(families.why_not(FAMILY) is not None, reason=str(families.why_not(FAMILY)))


def is_quantized(key):
    return ".mlp.experts." in key or (key.startswith("language_model.model.layers.") and ("_proj" in key) and key.endswith(".weight"))


@pytest.fixture(scope="module", params=["square", "h=2i", "neither"])
def released(request, tmp_path_factory):
    """(stock model that holds code × scale, folder of the release)"""
    folder = tmp_path_factory.mktemp("released")
    live = families.model_of(FAMILY, request.param)
    held, found, values = families.saved(live, folder / "plain", True), {}, {}
    for n, (saved, tensor) in enumerate(sorted(held.items())):
        key = saved.removeprefix("model.")  # which 5.5 puts before every name, and the release has not
        if not is_quantized(key):
            found[key] = tensor
            continue
        scale = tensor.abs().amax((-2, -1), keepdim=True) / 448
        found[key] = (tensor / scale).to(torch.float8_e4m3fn)
        values[key.replace("language_model.model.", "model.language_model.")] = found[key].float() * scale
        stacked = tensor.ndim == 3
        found[key + "_scale_inv"] = scale if stacked else scale.view(())
        found[key + "_activation_scale" if stacked else key.removesuffix("weight") + "activation_scale"] = torch.full(tensor.shape[:-2], 0.01 * (n + 1))
    unexpected = live.load_state_dict(values, strict=False).unexpected_keys
    assert not unexpected
    (folder / "release").mkdir()
    save_file(found, folder / "release" / "model.safetensors")
    config = json.loads((folder / "plain" / "config.json").read_text())
    (folder / "release" / "config.json").write_text(json.dumps({**config, "quantization_config": DECLARED}))
    return live, folder / "release"


def test_it_computes_what_its_codes_say(released, tmp_path):
    live, folder = released
    assert moeglot.open(folder).format.name == HUB
    expected = families.logits(live)
    for native in (False, True):
        assert relative(families.logits(moeglot.load(folder, dtype="float32", native=native)), expected) < 1e-5
    certificate = moeglot.convert(folder, "mistral-small4/hub", tmp_path / "plain", encode="float32")
    assert certificate.report.verdict == "holds"
    assert not any(loss.changed for loss in certificate.losses.values())
    stock = type(live).from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    assert relative(families.logits(stock), expected) < 1e-5
    scales = load_file(folder / "model.safetensors")
    name = "language_model.model.layers.1.mlp.experts.gate_up_proj_scale_inv"
    louder = tmp_path / "turned"
    louder.mkdir()
    (louder / "config.json").write_text((folder / "config.json").read_text())
    save_file({**scales, name: 2 * scales[name]}, louder / "model.safetensors")
    assert relative(families.logits(moeglot.load(louder, dtype="float32", native=True)), expected) > 1e-2


def test_its_bytes_return(released, tmp_path):
    """By way of the names in memory; and where nothing else is asked for, codes, scales and those of activations stay as they are."""
    _, folder = released
    there = moeglot.convert(folder, "mistral-small4/transformers-5+fp8-block", tmp_path / "memory")
    moeglot.convert(tmp_path / "memory", HUB, tmp_path / "back")
    moeglot.convert(folder, None, tmp_path / "own")
    assert "undeclared" not in there.document
    for out in ("back", "own"):
        assert not differing(folder, tmp_path / out)
        assert json.loads((tmp_path / out / "config.json").read_text())["quantization_config"] == DECLARED


def test_a_scale_for_each_of_gate_and_up_is_none_for_both(released, tmp_path):
    """transformers' own module has two: a file with two is read so, one with three is not read."""
    _, folder = released
    found, config = load_file(folder / "model.safetensors"), (folder / "config.json").read_text()
    names = [key for key in found if key.endswith("gate_up_proj_scale_inv")]
    for count in (2, 3):
        (out := tmp_path / str(count)).mkdir()
        (out / "config.json").write_text(config)
        factors = torch.tensor([1.0, 0.5, 1.0])[:count].view(1, count, 1)
        save_file({**found, **{name: found[name] * factors for name in names}}, out / "model.safetensors")
    half, whole = (moeglot.open(path).experts(1)["up"][0] for path in (tmp_path / "2", folder))
    assert torch.equal(2 * half.decode(torch.float32), whole.decode(torch.float32))
    with pytest.raises(moeglot.Contradiction, match=r"\[3, 3, 1\]"):
        moeglot.open(tmp_path / "3")
