"""The names that llm-compressor 0.14 and AutoRound 0.15 give experts, of numbers that compressed-tensors compresses: they are read as it decompresses them.

Both take stacked experts apart into Linear modules, save each as gate_proj, up_proj and down_proj below the release's own prefix, and name modules in
config.json as they are in memory. They are in none of our environments: what stands here are the names in folders that they wrote.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint

import moeglot

pytest.importorskip("compressed_tensors", reason="installed beside transformers 5.23 only")

SPARSE = "model.layers.{layer}.block_sparse_moe.experts."
PREFIXES = {
    "mixtral": SPARSE,
    "phimoe": SPARSE,
    "minimax": SPARSE,
    "minimax-m2": SPARSE,
    "granitemoe": SPARSE,
    "lfm2-moe": "model.layers.{layer}.feed_forward.experts.",
    "gemma4-text": "model.layers.{layer}.experts.",
    "gpt-oss": "model.layers.{layer}.mlp.experts.",
}
RELEASES = {"gpt-oss": ("transformers", "llm-compressor-0.14")}
SHARED = {"hy-v3": "shared_mlp", "laguna": "shared_expert"}
"""Of modules that memory calls shared_experts."""
COUNT = 3
IN_MEMORY = "re:.*experts\\..*"


def matrices(h: int, i: int, layer: int, expert: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(10 * layer + expert)
    shapes = {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}
    return {name: torch.randn(shape, generator=random) * torch.exp2(torch.randn(shape[0], 1, generator=random)) for name, shape in shapes.items()}


def compressed(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict]:
    """(What compressed-tensors stores of it, what it decompresses that to, how its config says so.)"""
    from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor as Compressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme(targets=[IN_MEMORY], weights=QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True))
    scale = calculate_qparams(weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True), scheme.weights)[0].bfloat16()
    state = Compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    read = Compressor.decompress({**state, "weight_scale": scale.float()}, scheme)["weight"]
    return {name: state[name] for name in ("weight", "weight_scale")}, read, scheme.model_dump(mode="json")


def write(folder: Path, release: str, prefix: str, size: tuple[int, int], beside: str = "") -> tuple[Path, dict[str, torch.Tensor]]:
    """(A folder whose experts are compressed under these names, name -> matrix or bias.) `beside`: a module of every layer that is quantized too."""
    h, i = size
    source = write_checkpoint(folder, release, {"e": COUNT, "h": h, "i": i}, 2)
    plain = moeglot.open(source)
    config, tensors, truth = json.loads((source / "config.json").read_text()), {name: dense.read() for name, dense in plain.dense.items()}, {}
    for layer in plain.layers:
        modules = {f"{prefix.format(layer=layer)}{expert}": matrices(h, i, layer, expert) for expert in range(COUNT)}
        modules |= {beside.format(layer=layer): matrices(h, i, layer, COUNT)} if beside else {}
        for stem, found in modules.items():
            for name, weight in found.items():
                state, truth[f"{stem}.{name}.weight"], scheme = compressed(weight)
                tensors |= {f"{stem}.{name}.{part}": tensor for part, tensor in state.items()}
                if release.startswith("gpt-oss"):
                    truth[f"{stem}.{name}.bias"] = tensors[f"{stem}.{name}.bias"] = torch.randn(len(weight)).bfloat16()
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": scheme}, "ignore": []}
    (source / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, source / "model.safetensors", {"format": "pt"})
    return source, truth


@pytest.mark.parametrize("family", PREFIXES)
@pytest.mark.parametrize("size", [(64, 64), (128, 64)], ids=["square", "h=2i"])
def test_experts_under_its_names(family, size, tmp_path):
    release, name = RELEASES.get(family, ("hub", "llm-compressor"))
    source, truth = write(tmp_path / "source", f"{family}/{release}", PREFIXES[family], size)
    read = moeglot.open(source)
    assert read.format.name == f"{family}/{name}+fp8-channel"
    out = tmp_path / "out"
    assert moeglot.convert(source, f"{family}/{release}", out, encode="float32").report.verdict == "holds"
    for found in (read, moeglot.open(out)):
        for layer in found.layers:
            experts = found.experts(layer)
            for expert in range(COUNT):
                stem = f"{PREFIXES[family].format(layer=layer)}{expert}"
                for role in ("gate", "up", "down"):
                    assert torch.equal(experts[role][expert].decode(torch.float32), truth[f"{stem}.{role}_proj.weight"])
                    if family == "gpt-oss":
                        assert torch.equal(experts[f"{role}_bias"][expert].decode(torch.float32), truth[f"{stem}.{role}_proj.bias"].float())
    assert set(found.dense) == set(read.dense)


def test_gpt_oss_as_its_releases_before_had_it(tmp_path):
    source, _ = write(tmp_path / "source", "gpt-oss/transformers", "model.layers.{layer}.mlp.experts.experts.", (64, 64))
    assert moeglot.open(source).format.name == "gpt-oss/llm-compressor+fp8-channel"


def test_attention_that_alone_is_quantized_is_decoded_where_all_is_to_be_floats(tmp_path):
    source = write_checkpoint(tmp_path / "source", "qwen3-moe/hub", {"e": COUNT, "h": 128, "i": 64}, 2)
    tensors, truth = load_file(source / "model.safetensors"), {}
    for name in [name for name in tensors if ".self_attn." in name and tensors[name].dim() == 2]:
        state, truth[name], scheme = compressed(tensors.pop(name).float())
        tensors |= {name.removesuffix("weight") + part: tensor for part, tensor in state.items()}
    scheme |= {"targets": ["re:.*self_attn.*"]}
    said = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    save_file(tensors, source / "model.safetensors", {"format": "pt"})

    def converted(folder: Path, to: str, **options) -> tuple[dict[str, torch.Tensor], dict]:
        out = tmp_path / str(len([*tmp_path.iterdir()]))
        assert moeglot.convert(folder, to, out, **options).report.verdict == "holds"
        return load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text()) | {"path": out}

    assert len(truth) == 8
    kept, config = converted(source, "qwen3-moe/transformers-5")
    assert all(torch.equal(kept[name], tensors[name]) for name in tensors if ".self_attn." in name)
    assert config["quantization_config"]
    for to in ("qwen3-moe/hub", "qwen3-moe/megatron"):
        found, config = converted(source, to, encode="float32")
        assert "quantization_config" not in config
        assert {tensor.dtype for name, tensor in found.items() if "experts" in name or "qkv.weight" in name} == {torch.float32}
        back, _ = converted(config["path"], "qwen3-moe/hub")
        assert all(torch.equal(back[name], weight) for name, weight in truth.items())
    _, config = converted(source, "qwen3-moe/megatron", allow_loss=True)  # without a word from the user: there is no place for codes
    assert "quantization_config" not in config


@pytest.mark.parametrize("family", SHARED)
def test_modules_that_config_json_names_as_in_memory(family, tmp_path):
    shared = "model.layers.{layer}.mlp." + SHARED[family]
    source, truth = write(tmp_path / "source", f"{family}/hub", "model.layers.{layer}.mlp.experts.", (128, 64), shared)
    config = json.loads((source / "config.json").read_text())
    assert moeglot.open(source).matrices.keys() == {name.removesuffix(".weight") for name in truth if SHARED[family] in name}
    moeglot.convert(source, f"{family}/hub", tmp_path / "out", encode="float32")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in truth.items())
    assert not [name for name in found if name.endswith("_scale")]
    moeglot.convert(source, f"{family}/hub+fp8-channel", tmp_path / "same")
    assert moeglot.open(tmp_path / "same").matrices.keys() == moeglot.open(source).matrices.keys()

    config["quantization_config"]["config_groups"]["group_0"]["targets"] = [f"re:.*{SHARED[family]}\\..*", "re:.*experts\\.[0-9]+\\..*"]  # as on disk
    (source / "config.json").write_text(json.dumps(config))
    assert moeglot.open(source).matrices.keys() == {name.removesuffix(".weight") for name in truth if SHARED[family] in name}
