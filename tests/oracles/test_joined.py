"""Gate and up as servers join them, under the global of gate for both: compressed-tensors and ModelOpt decode `up` so to the numbers that we mean."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint

import moeglot

HUB, STACKED = "qwen3-moe/hub", "qwen3-moe/transformers-5"
SIZES = {"e": 2, "h": 128, "i": 128}


def by_compressed_tensors(packed: torch.Tensor, scale: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    compressed_tensors = pytest.importorskip("compressed_tensors", reason="installed beside transformers 5.23 only")
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor as Compressor

    assert compressed_tensors
    arguments = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True, "scale_dtype": torch.float8_e4m3fn}
    scheme = compressed_tensors.quantization.QuantizationScheme(
        targets=["Linear"], weights=compressed_tensors.quantization.QuantizationArgs(**arguments), format="nvfp4-pack-quantized"
    )
    parts = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": by.view(1)}
    return Compressor.decompress(parts, scheme)["weight"]


def by_modelopt(packed: torch.Tensor, scale: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    pytest.importorskip("modelopt.torch", reason="installed in an environment of its own")
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    tensor = NVFP4QTensor(torch.Size((len(packed), 2 * packed.shape[1])), torch.float32, packed)
    return tensor.dequantize(torch.float32, scale=scale, double_scale=by.view(()), block_sizes={-1: 16})


THEIRS = {
    "nvfp4-pack": (by_compressed_tensors, ("weight_packed", "weight_scale", "weight_global_scale")),
    "nvfp4-modelopt": (by_modelopt, ("weight", "weight_scale", "weight_scale_2")),
}


def plain(folder):
    """`up` is as large as gate in the first expert, four times as large in the second, and a quarter of it in the second layer."""
    write_checkpoint(folder, HUB, SIZES, 2, dtype=torch.bfloat16)
    found = load_file(folder / "model.safetensors")
    for name in found:
        if "experts.1.up_proj" in name:
            found[name] *= 4.0 if "layers.0." in name else 0.25
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    return folder


def adapter(folder, module, strength):
    """Of one matrix of every expert. Its change is of full size in a few numbers, so that one is larger than any before."""
    folder.mkdir()
    factors = {}
    for layer in range(2):
        for expert in range(SIZES["e"]):
            name = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{module}.lora_"
            a, b = torch.zeros(1, SIZES["h"]), torch.zeros(SIZES["i"], 1)
            a[0, 3 + expert], b[5 + layer, 0] = 1.0, strength
            factors |= {f"{name}A.weight": a, f"{name}B.weight": b}
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [module]}))
    return folder


def joined(folder, coding):
    """Key of each `up` and gate -> its values, as the other library reads it under the global of gate."""
    found = load_file(next(folder.glob("*.safetensors")))
    decode, parts = THEIRS[coding]
    read = {}
    for packed in [name for name in found if re.search(rf"(gate|up)_proj\.{parts[0]}$", name)]:
        module = packed.removesuffix(f".{parts[0]}")
        gate = module.replace("up_proj", "gate_proj")
        read[module] = decode(found[packed], found[f"{module}.{parts[1]}"], found[f"{gate}.{parts[2]}"])
    assert len(read) == 2 * 2 * SIZES["e"]
    return read


def meant(folder):
    """The same, as we read each matrix."""
    checkpoint = moeglot.open(folder)
    places = [(layer, expert, role) for layer in range(2) for expert in range(SIZES["e"]) for role in ("gate", "up")]
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{role}_proj": checkpoint.experts(layer)[role][expert].decode(torch.float32)
        for layer, expert, role in places
    }


def agree(folder, coding):
    ours, theirs = meant(folder), joined(folder, coding)
    return all(torch.equal(ours[name].to(theirs[name].dtype), theirs[name]) for name in ours)


@pytest.fixture(params=THEIRS)
def coding(request):
    return request.param


@pytest.mark.parametrize("given", ["bfloat16", "mxfp4-pack", "by way of a stack", "merged"])
def test_what_is_written(given, coding, tmp_path):
    source, options = plain(tmp_path / "plain"), {}
    if given == "mxfp4-pack":
        moeglot.convert(source, f"{HUB}+mxfp4-pack", tmp_path / "given", allow_loss=True)
        source = tmp_path / "given"
    elif given == "by way of a stack":
        moeglot.convert(source, f"{STACKED}+{coding}", tmp_path / "given", allow_loss=True)
        source = tmp_path / "given"
    elif given == "merged":
        options = {"adapter": adapter(tmp_path / "adapter", "up_proj", 50.0)}
    assert moeglot.convert(source, f"{HUB}+{coding}", tmp_path / "out", allow_loss=True, **options).report.verdict == "holds"
    assert agree(tmp_path / "out", coding)
    if given == "mxfp4-pack":  # whose values stay
        mine, before = meant(tmp_path / "out"), meant(source)
        assert all(torch.equal(mine[name], before[name]) for name in mine)
    if given == "bfloat16":  # and the values find the global again that they had
        moeglot.convert(tmp_path / "out", HUB, tmp_path / "decoded", encode="float32")
        moeglot.convert(tmp_path / "decoded", f"{HUB}+{coding}", tmp_path / "again")
        assert agree(tmp_path / "again", coding)


@pytest.mark.parametrize("module", ["gate_proj", "up_proj"])
@pytest.mark.parametrize("strength", [0.1, 20.0])
def test_a_merge_that_needs_a_larger_global(module, strength, coding, tmp_path):
    """Both get it, the one that does not change without a change of its values."""
    base = tmp_path / "base"
    moeglot.convert(plain(tmp_path / "plain"), f"{HUB}+{coding}", base, allow_loss=True)
    changed = adapter(tmp_path / "adapter", module, strength)
    assert moeglot.merge(base, changed, tmp_path / "out", threshold=0).report.verdict == "holds"
    assert agree(tmp_path / "out", coding)
    before, after = meant(base), meant(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before if module not in name)
    for name in (name for name in before if module in name):
        layer, expert = int(name.split(".")[2]), int(name.split(".")[5])
        assert float((after[name] - before[name])[5 + layer, 3 + expert]) == pytest.approx(strength, rel=0.2, abs=0.1)


def test_native_experts_that_are_saved(coding, tmp_path):
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("a release of before 5")
    model = moeglot.load(plain(tmp_path / "plain"), native=True, encode="nvfp4" if coding == "nvfp4-modelopt" else "nvfp4:compressed-tensors")
    moeglot.save(model, tmp_path / "out", to=f"{HUB}+{coding}")
    assert agree(tmp_path / "out", coding)
