"""NVFP4, FP8, MXFP8 and MXFP4 in NVIDIA's ModelOpt: its quantizer and ours write the same bytes, and each decodes the other's to the same bits."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moeglot
from moeglot.codings.hf_quant_config import told_beside
from moeglot.encoding import WHOLE
from moeglot.encodings.fp8 import FP8
from moeglot.encodings.mxfp4 import MXFP4
from moeglot.encodings.nvfp4 import NVFP4
from moeglot.errors import UnknownFormat

pytest.importorskip("modelopt.torch", reason="installed in an environment of its own")


def weights(seed: int = 1) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-9, 10, (192, 1), generator=random).float())
    values = torch.randn(192, 256, generator=random) * spread
    values[5, :32] = 0
    return values


def quantized(values: torch.Tensor) -> dict[str, torch.Tensor]:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    tensor, scale, whole = NVFP4QTensor.quantize(values.clone(), 16)
    return {"packed": tensor._quantized_data, "scale": scale, "global": whole.view(1, 1)}


def dequantized(parts: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    shape = torch.Size((parts["packed"].shape[0], parts["packed"].shape[1] * 2))
    tensor = NVFP4QTensor(shape, dtype, parts["packed"])
    return tensor.dequantize(dtype, scale=parts["scale"], double_scale=parts["global"].view(()), block_sizes={-1: 16})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4(dtype):
    given, ours = weights().to(dtype), NVFP4("modelopt")
    theirs = quantized(given)
    assert ours.check(theirs) is None
    read = ours.decode(theirs, torch.float32)
    assert torch.equal(read, dequantized(theirs))
    mine = ours.encode(given)
    assert torch.equal(dequantized(mine), ours.decode(mine, torch.float32))
    assert all(torch.equal(mine[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in theirs)
    again = ours.encode(read)
    assert all(torch.equal(again[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in theirs)


def test_fp8():
    from modelopt.torch.quantization.qtensor.fp8_tensor import FP8QTensor

    given, ours = weights(), FP8((WHOLE, WHOLE), "F32")
    tensor, scale = FP8QTensor.quantize(given.clone())
    theirs = {"weight": tensor._quantized_data, "scale": scale.float().view(1, 1)}
    assert ours.check(theirs) is None
    read = ours.decode(theirs, torch.float32)
    assert torch.equal(read, tensor.dequantize(torch.float32, scale=scale))
    mine = ours.encode(given)
    written = FP8QTensor(given.shape, torch.float32, mine["weight"]).dequantize(torch.float32, scale=mine["scale"].view(()))
    assert torch.equal(written, ours.decode(mine, torch.float32))
    assert torch.equal(mine["scale"], theirs["scale"])
    assert (ours.decode(ours.inverted(theirs), torch.float32) - read).norm() / read.norm() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp8(dtype):
    from modelopt.torch.quantization.qtensor.mxfp8_tensor import MXFP8QTensor

    given, ours = weights().to(dtype), FP8((1, 32), "U8")
    tensor, scale = MXFP8QTensor.quantize(given.clone())
    theirs = {"weight": tensor._quantized_data, "scale": scale}
    assert ours.check(theirs) is None
    read = ours.decode(theirs, torch.float32)
    assert torch.equal(read, MXFP8QTensor(given.shape, torch.float32, theirs["weight"]).dequantize(torch.float32, scale=scale))
    mine = ours.encode(given)
    assert torch.equal(mine["weight"].view(torch.uint8), theirs["weight"].view(torch.uint8))
    zeros = given.view(192, 8, 32).abs().amax(-1) == 0  # they write 2^-127 for a group of zeros, we write 1
    assert torch.equal(mine["scale"][~zeros], scale[~zeros])
    written = MXFP8QTensor(given.shape, torch.float32, mine["weight"]).dequantize(torch.float32, scale=mine["scale"])
    assert torch.equal(written, ours.decode(mine, torch.float32))
    assert (ours.decode(ours.inverted(theirs), torch.float32) - read).norm() / read.norm() > 1e-3


def test_a_global_that_two_matrices_share():
    """gate and up are exported under one global: the smaller one's largest scale is not 448, and its bytes return all the same."""
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    given, ours = weights(), NVFP4("modelopt")
    whole = given.abs().amax() * 1.37 / (6 * 448)
    tensor, scale, _ = NVFP4QTensor.quantize(given.clone(), 16, weights_scaling_factor_2=whole)
    theirs = {"packed": tensor._quantized_data, "scale": scale, "global": whole.view(1, 1)}
    again = ours.encode(ours.decode(theirs, torch.float32))
    assert all(torch.equal(again[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in theirs)
    assert ours.undetermined(theirs) == 0


def test_the_other_convention_and_mxfp4():
    ours, other = NVFP4("modelopt"), NVFP4("compressed-tensors")
    there = other.encode(weights())
    back = other.nearest(there, ours)
    read = dequantized(back)
    assert (read - other.decode(there, torch.float32)).norm() / read.norm() < 1e-7
    wrong = dequantized(there)
    assert (wrong - read).norm() / read.norm() > 1e-3

    values = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    mxfp4 = MXFP4().encode(values)
    assert torch.equal(dequantized(MXFP4().recode(mxfp4, ours)), MXFP4().decode(mxfp4, torch.float32))


def export(folder: Path, settings: dict) -> dict:
    """`export_hf_checkpoint` writes a folder -> name of each quantized matrix: (what rounds it, the matrix before it)."""
    from modelopt.torch import quantization
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, **heads, architectures=["Qwen3MoeForCausalLM"]), dtype=torch.float32).eval()
    tokens = torch.randint(0, 128, (8, 64))
    quantization.quantize(model, settings, lambda model: model(tokens))
    coded = {name: module for name, module in model.named_modules() if hasattr(module, "weight_quantizer") and module.weight_quantizer.is_enabled}
    before = {name: module.weight.detach().clone() for name, module in coded.items()}
    export_hf_checkpoint(model, dtype=torch.float32, export_dir=folder)  # which gives gate and up one scale
    return {f"{name}.weight": (module.weight_quantizer, before[name]) for name, module in coded.items()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(The folder that it writes of a model in FP8, the same matrices as its own quantizers round them.)"""
    from modelopt.torch import quantization

    folder = tmp_path_factory.mktemp("modelopt") / "fp8"
    return folder, {name: quantizer(matrix).detach() for name, (quantizer, matrix) in export(folder, quantization.FP8_DEFAULT_CFG).items()}


def test_a_folder_that_it_exports_in_mxfp4(tmp_path):
    """Its own tensor decodes the codes that it wrote, and those that we write."""
    from modelopt.torch import quantization
    from modelopt.torch.quantization.qtensor.mxfp4_tensor import MXFP4QTensor

    def theirs(folder: Path) -> dict[str, torch.Tensor]:
        file = tensors(folder)
        coded = {name: values for name, values in file.items() if f"{name}_scale" in file}
        shapes = {name: torch.Size((len(values), 2 * values.shape[1])) for name, values in coded.items()}
        of = {name: MXFP4QTensor(shapes[name], torch.float32, values) for name, values in coded.items()}
        return {name: one.dequantize(torch.float32, scale=file[f"{name}_scale"], block_sizes={-1: 32}) for name, one in of.items()}

    folder = tmp_path / "mxfp4"
    export(folder, quantization.MXFP4_MLP_WEIGHT_ONLY_CFG)
    assert moeglot.open(folder).format.name == "qwen3-moe/hub+mxfp4-modelopt"
    moeglot.convert(folder, "qwen3-moe/hub", tmp_path / "float32", encode="float32")
    decoded, right = tensors(tmp_path / "float32"), theirs(folder)
    assert len(right) == 2 * 4 * 3
    for name, values in right.items():
        assert torch.equal(decoded[name], values), name
        assert not torch.equal(decoded[name].roll(1, 0), values)
    moeglot.convert(tmp_path / "float32", "qwen3-moe/hub+mxfp4-modelopt", tmp_path / "coded")
    assert all(torch.equal(values, decoded[name]) for name, values in theirs(tmp_path / "coded").items())


@pytest.mark.parametrize("told", ["in config.json", "in hf_quant_config.json alone, as older releases", "nowhere"])
def test_a_folder_that_it_exports(exported, told, tmp_path):
    folder, rounded = exported
    shutil.copytree(folder, tmp_path / "fp8")
    if told != "in config.json":
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    if told == "nowhere":
        (tmp_path / "fp8" / "hf_quant_config.json").unlink()
        with pytest.raises(UnknownFormat):
            moeglot.open(tmp_path / "fp8")
        return
    moeglot.convert(tmp_path / "fp8", "qwen3-moe/hub", tmp_path / "out", encode="float32")
    written = tensors(tmp_path / "out")
    assert len(rounded) == 2 * (4 + 4 * 3)
    for name, values in rounded.items():
        assert (written[name] - values).norm() / values.norm() < 1e-6, name
        assert (written[name] - values.roll(1, 0)).norm() / values.norm() > 1
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


MIXED = {"a.b": {"quant_algo": "FP8"}, "a.c": {"quant_algo": "NVFP4", "group_size": 16}, "a.d": {"quant_algo": "FP8"}, "a.e": {"quant_algo": "other"}}
ALGORITHMS = ("FP8_PER_CHANNEL_PER_TOKEN", "W4A16_AWQ", "W4A16_NVFP4", "NVFP4_AWQ", "W4A8_AWQ", "W8A16", "W8A8_SQ_PER_CHANNEL", "W4A8_NVFP4_FP8", "MXFP8")


@pytest.mark.filterwarnings("ignore:Unsupported quantization algorithm")
@pytest.mark.parametrize(
    "told",
    [
        {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
        {"quant_algo": "NVFP4", "kv_cache_quant_algo": "NVFP4", "group_size": 16, "exclude_modules": None},
        {"quant_algo": "NVFP4", "kv_cache_quant_algo": None},
        {"quant_algo": "W4A16_NVFP4", "group_size": 32, "exclude_modules": []},
        {"quant_algo": None, "kv_cache_quant_algo": "FP8"},
        *({"quant_algo": algorithm, "exclude_modules": ["*router*"]} for algorithm in ("MXFP4", *ALGORITHMS)),
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": MIXED, "exclude_modules": ["lm_head"]},
        *({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a.b": {"quant_algo": algorithm}}} for algorithm in ALGORITHMS),
    ],
    ids=str,
)
def test_what_the_file_says_alone_in_the_words_of_config_json(told):
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    beside = {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": told}
    assert told_beside({"a": 1}, beside) == {"a": 1, "quantization_config": convert_hf_quant_config_format(beside)}


def test_a_folder_of_an_older_release_is_written_as_the_newer_ones_write_it(exported, tmp_path):
    folder, _ = exported
    shutil.copytree(folder, tmp_path / "fp8")
    config = json.loads((folder / "config.json").read_text())
    newer = config.pop("quantization_config")
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    moeglot.convert(tmp_path / "fp8", "qwen3-moe/hub+fp8-modelopt", tmp_path / "out", shard_size=60_000)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == newer
    assert (tmp_path / "out" / "hf_quant_config.json").read_bytes() == (folder / "hf_quant_config.json").read_bytes()


@pytest.mark.parametrize(("coding", "algorithm"), [("fp8-modelopt", "FP8"), ("nvfp4-modelopt", "NVFP4")])
def test_its_words_for_activations_that_have_scales(coding, algorithm):
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    from moeglot.codings import CODINGS
    from moeglot.encoding import Part

    ours = next(one for one in CODINGS if one.name == coding)
    with_scale = replace(ours.encoding, carried=(Part("input_scale", ("F32",), (WHOLE, WHOLE)),))
    assert ours.write(with_scale, ["lm_head"]) == convert_hf_quant_config_format({"quantization": {"quant_algo": algorithm, "exclude_modules": ["lm_head"]}})


def test_a_folder_whose_activations_have_scales(exported, tmp_path):
    """Exported by ModelOpt, through compressed-tensors' words and back: what it says of activations is what it said."""
    folder, _ = exported
    moeglot.convert(folder, "qwen3-moe/hub+fp8-tensor", tmp_path / "there", allow_loss=True)
    moeglot.convert(tmp_path / "there", "qwen3-moe/hub+fp8-modelopt", tmp_path / "back", allow_loss=True)
    before, after = (json.loads((where / "config.json").read_text())["quantization_config"] for where in (folder, tmp_path / "back"))
    assert before["config_groups"] == after["config_groups"]
    scales = [{name: t for name, t in tensors(where).items() if ".experts." in name and "input_scale" in name} for where in (folder, tmp_path / "back")]
    assert len(scales[0]) == 2 * 4 * 3
    assert all(torch.equal(scales[0][name], scales[1][name]) for name in scales[0])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: values for file in folder.glob("*.safetensors") for name, values in load_file(file).items()}
