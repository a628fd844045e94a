"""`moeglot.save` of a model whose experts stay encoded: what it holds now is what is written, and stock transformers computes the same with it.

The reference is the stock model with the numbers of the source's file, decoded by the producers' rules (`held_models.matrix`, none of moeglot's), and changed
as the live one was. Where the format stays, the experts' bytes are those of the source's file.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import families
import pytest
import torch
import transformers
from held_models import CODINGS, FORMS, model_of, native_works, overwritten, quantized
from reading import relative, same
from safetensors.torch import load_file, save_file

import moeglot
from moeglot.demo import BUNDLED
from moeglot.errors import LossRefused
from moeglot.integrations.transformers import VERSION
from moeglot.nn import Experts

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

LIMIT, POWER = 1e-5, 1e-2
SIZES = ("square", "h=2i") if VERSION >= (5, 6) else ("square",)
ON_DISK = (("gpt-oss", "openai"), ("qwen3-moe", "hub+fp8-block"), ("qwen3-moe", "hub+nf4"), ("mixtral", "hub+int4-pack"), ("mixtral", "hub+nvfp4-pack"))
ON_THE_WAY = (
    ("gpt-oss", "mxfp4", "openai"),
    ("qwen3-moe", "mxfp4", "hub+mxfp4-pack"),
    ("qwen3-moe", "nf4", "hub+nf4"),
    ("mixtral", "fp8-block", "hub+fp8-block"),
)
PLAIN = {"gpt-oss": "gpt-oss/transformers", "qwen3-moe": "qwen3-moe/hub", "mixtral": "mixtral/hub"}
ROUTER = {"gpt-oss": "mlp.router.weight", "qwen3-moe": "mlp.gate.weight", "mixtral": "mlp.gate.weight"}
"""In memory, of the first layer."""
ON_HUB = {"mlp.gate.weight": "block_sparse_moe.gate.weight"}
"""Mixtral's router."""

Tensors = Mapping[str, torch.Tensor]


def here(*cells: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The cells that this release can have native experts of; in the older ones gpt-oss is enough."""
    return [(*cell, size) for cell in cells for size in SIZES if native_works(cell[0]) and (VERSION >= (5, 6) or cell[0] == "gpt-oss")]


def coded(name: str, to: str, size: str, folder: Path, encode: str | None = None) -> tuple[torch.nn.Module, Path]:
    """A random stock model, and a folder that holds it quantized."""
    if to != "openai":
        return quantized(name, size, to.partition("+")[2], folder, encode)
    live = model_of(name, size)
    families.saved(live, folder / "saved", True)
    moeglot.convert(folder / "saved", f"{name}/{to}", folder / "out", allow_loss=True)
    return live, folder / "out"


def edited(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """The model with another embedding and another router."""
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
        model.get_submodule("model.layers.0").get_parameter(ROUTER[name]).copy_(model.get_submodule("model.layers.0").get_parameter(ROUTER[name]).roll(1, 0))
    return model


def written(model: torch.nn.Module, to: str, out: Path, **options: object) -> Tensors:
    certificate = moeglot.save(model, out, to=to, **options)
    assert certificate.report.verdict == "holds"
    assert moeglot.open(out).format.name == to
    return load_file(out / "model.safetensors")


def stock(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    """The logits of what transformers' own loader makes of a folder."""
    return families.logits(type(model).from_pretrained(folder, dtype=torch.float32).eval())


def differing(found: Tensors, expected: Tensors) -> set[str]:
    """The experts' keys whose tensors differ in dtype, shape or bytes."""
    mine = {key for key in (*found, *expected) if ".experts." in key}
    assert mine
    return {key for key in mine if key not in found or key not in expected or not same(found[key], expected[key])}


def swapped(model: torch.nn.Module) -> set[str]:
    """The first two experts of a layer change places in the buffers of one line; the keys on disk that this changes."""
    module = next(module for module in model.modules() if isinstance(module, Experts))
    line = next(line for line in module.lines if "down" in line.line.roles)
    before = {key: tensor.clone() for key, tensor in line.stored()}
    for buffer in line.buffers():
        if len(buffer) == line.experts and buffer.ndim > 1:
            buffer.copy_(buffer[[1, 0, *range(2, len(buffer))]])
    return {key for key, tensor in line.stored() if not same(tensor, before[key])}


# --- what is written -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "to", "size"), here(*ON_DISK))
def test_loaded_as_on_disk(name, to, size, tmp_path):
    live, folder = coded(name, to, size, tmp_path)
    file = load_file(folder / "model.safetensors")
    model = moeglot.load(folder, dtype="float32", native=True)
    before = families.logits(model)
    edited(model, name)
    holds(model, edited(overwritten(live, name, file, size), name), name, f"{name}/{to}", file, before, tmp_path)


@pytest.mark.parametrize(("name", "encode", "to", "size"), here(*ON_THE_WAY))
def test_quantized_on_the_way(name, encode, to, size, tmp_path):
    """The bytes are those that `convert` writes of the same plain checkpoint."""
    live, folder = coded(name, to, size, tmp_path, encode)
    file = load_file(folder / "model.safetensors")
    model = moeglot.load(tmp_path / "saved", dtype="float32", native=True, encode=encode)
    before = families.logits(model)
    edited(model, name)
    holds(model, edited(overwritten(live, name, file, size), name), name, f"{name}/{to}", file, before, tmp_path)


def holds(model: torch.nn.Module, reference: torch.nn.Module, name: str, to: str, file: Tensors, before: torch.Tensor, folder: Path) -> None:
    """Written as it is held and as plain floats, the live model is there with all that was changed, and with nothing else."""
    expected = families.logits(reference)
    assert relative(families.logits(model), expected) <= LIMIT
    assert relative(before, expected) > POWER
    again = written(model, to, folder / "again")
    assert not differing(again, file)
    carries_the_edit(again, model, name)
    assert relative(families.logits(moeglot.load(folder / "again", dtype="float32")), expected) <= LIMIT
    carries_the_edit(written(model, PLAIN[name], folder / "plain"), model, name)
    assert "quantization_config" not in json.loads((folder / "plain" / "config.json").read_text())
    assert relative(stock(reference, folder / "plain"), expected) <= LIMIT
    changed = swapped(model)
    assert changed
    assert differing(written(model, to, folder / "swapped"), file) == changed
    written(model, PLAIN[name], folder / "swapped plain")
    found = stock(reference, folder / "swapped plain")
    assert relative(found, families.logits(model)) <= LIMIT
    assert relative(found, expected) > POWER


def carries_the_edit(file: Tensors, model: torch.nn.Module, name: str) -> None:
    router = "model.layers.0." + ROUTER[name]
    key = router.replace(ROUTER[name], ON_HUB[ROUTER[name]]) if name == "mixtral" else router
    assert same(file["model.embed_tokens.weight"], model.get_input_embeddings().weight.detach())
    assert same(file[key], model.get_parameter(router).detach())


def test_an_untouched_model_is_its_checkpoint_byte_for_byte(tmp_path):
    """gpt-oss as it was released: experts in MXFP4, all else in bfloat16."""
    file, found = load_file(BUNDLED / "model.safetensors"), written(moeglot.load(BUNDLED, native=True), "gpt-oss/openai", tmp_path / "out")
    assert found.keys() == file.keys()
    assert all(same(found[key], tensor) for key, tensor in file.items())


def test_keys_of_another_producer(tmp_path):
    """Loaded from openai's names, written under the Hub's."""
    moeglot.convert(BUNDLED, "gpt-oss/original", tmp_path / "original")
    model = moeglot.load(tmp_path / "original", native=True)
    assert not differing(written(model, "gpt-oss/openai", tmp_path / "out"), load_file(BUNDLED / "model.safetensors"))
    found, file = written(model, "gpt-oss/original", tmp_path / "again"), load_file(tmp_path / "original" / "model.safetensors")
    assert found.keys() == file.keys()
    assert all(same(found[key], tensor) for key, tensor in file.items())


@pytest.mark.skipif(VERSION < (5, 6), reason="the same code in all")
@pytest.mark.parametrize("layout", ["megatron-te", "megatron-grouped", "megatron-torch-dist", "megatron-torch-dist-singleton"])
def test_megatron(layout, tmp_path):
    """A shape that is not how the numbers lie, and names that are Megatron's alone."""
    live = model_of("mixtral", "square")
    families.saved(live, tmp_path / "plain", True)
    moeglot.convert(tmp_path / "plain", f"mixtral/{layout}", tmp_path / "source")
    model = moeglot.load(tmp_path / "source", dtype="float32", native=True)
    assert moeglot.save(model, tmp_path / "again", to=f"mixtral/{layout}").report.verdict == "holds"
    assert moeglot.compare(tmp_path / "source", tmp_path / "again").verdict == "holds"
    written(model, "mixtral/hub", tmp_path / "out")
    assert relative(stock(live, tmp_path / "out"), families.logits(live)) <= LIMIT
    for encode in ("mxfp4", "fp8-block"):
        model = moeglot.load(tmp_path / "source", dtype="float32", native=True, encode=encode)
        written(model, "mixtral/hub", tmp_path / encode)
        assert relative(stock(live, tmp_path / encode), families.logits(model)) <= LIMIT
        assert relative(families.logits(model), families.logits(live)) > 1e-3


@pytest.mark.parametrize("to", ["unsloth", "unsloth+nf4", "openai"])
def test_lines_of_nobody_else(to, tmp_path):
    """NF4 of gpt-oss on the way is held in upright lines that no producer has."""
    live = model_of("gpt-oss", "square")
    families.saved(live, tmp_path / "plain", True)
    model = moeglot.load(tmp_path / "plain", dtype="float32", native=True, encode="nf4")
    expected = families.logits(overwritten(live, "gpt-oss", model.state_dict(), "square"))
    if to == "openai":
        with pytest.raises(LossRefused):
            moeglot.save(model, tmp_path / "out", to=f"gpt-oss/{to}")
        assert not (tmp_path / "out").exists()
    written(model, f"gpt-oss/{to}", tmp_path / "out", allow_loss=to == "openai")
    assert (relative(families.logits(moeglot.load(tmp_path / "out", dtype="float32")), expected) <= LIMIT) == (to != "openai")


@pytest.mark.skipif(VERSION < (5, 6), reason="the same code in all")
@pytest.mark.parametrize("coding", CODINGS)
def test_every_coding(coding, tmp_path):
    """In `hub`, and repacked into one tensor where its producer has names for that; quantization_config says that all else is plain."""
    _, folder = quantized("qwen3-moe", "square", coding, tmp_path)
    model = moeglot.load(folder, dtype="float32", native=True)
    assert not differing(written(model, f"qwen3-moe/hub+{coding}", tmp_path / "again"), load_file(folder / "model.safetensors"))
    assert said(tmp_path / "again") == said(folder)
    if f"qwen3-moe/transformers-5+{coding}" not in FORMS:
        return
    if coding.startswith("fp8-block"):  # a block of 128 rows would hold rows of gate and of up
        with pytest.raises(LossRefused):
            moeglot.save(model, tmp_path / "stacked", to=f"qwen3-moe/transformers-5+{coding}")
        return
    written(model, f"qwen3-moe/transformers-5+{coding}", tmp_path / "stacked")
    assert relative(families.logits(moeglot.load(tmp_path / "stacked", dtype="float32")), families.logits(model)) <= LIMIT


def said(folder: Path) -> dict[str, object]:
    """quantization_config, without an order of its lists."""
    found = json.loads((folder / "config.json").read_text())["quantization_config"]
    return {key: sorted(value) if isinstance(value, list) else value for key, value in found.items()}


@pytest.mark.skipif(VERSION < (5, 6), reason="the same code in all")
def test_what_was_quantized_and_is_no_expert_is_plain_now(tmp_path):
    """The live model has it decoded, so that is what the file has and what quantization_config says."""
    _, folder = quantized("qwen3-moe", "square", "fp8-block", tmp_path)
    file, module = load_file(folder / "model.safetensors"), "model.layers.0.self_attn.q_proj"
    file |= {f"{module}.weight": file[f"{module}.weight"].to(torch.float8_e4m3fn), f"{module}.weight_scale_inv": torch.tensor([[0.75]])}
    save_file(file, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"].remove(module)
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    (folder / "config.json").write_text(json.dumps(config))
    model = moeglot.load(folder, dtype="float32", native=True)
    again = written(model, "qwen3-moe/hub+fp8-block", tmp_path / "again")
    assert not differing(again, file)
    assert same(again[f"{module}.weight"], file[f"{module}.weight"].float() * 0.75)
    now = said(tmp_path / "again")
    assert module in now["modules_to_not_convert"]
    assert now["scale_fmt"] == "ue8m0"  # what else the producer declares
    written(model, "qwen3-moe/hub+fp8-block-compressed", tmp_path / "other")
    assert module in said(tmp_path / "other")["ignore"]
    assert not {"scale_fmt", "weight_block_size"} & said(tmp_path / "other").keys()


@pytest.mark.skipif(VERSION < (5, 6), reason="the same code in all")
@pytest.mark.parametrize("encode", [None, "fp8-block"])
def test_a_layer_that_is_left_alone_stays_so(encode, tmp_path):
    live = model_of("qwen3-moe", "h=2i")
    families.saved(live, tmp_path / "plain", True)
    kept = {"native": True, "dtype": "float32"}
    model = moeglot.load(tmp_path / "plain", **kept, encode="fp8-block", modules_to_not_convert=["layers.0.mlp"])
    found = written(model, "qwen3-moe/hub+fp8-block", tmp_path / "out")
    if encode is None:  # and again, from the disk
        model = moeglot.load(tmp_path / "out", **kept)
        assert not differing(found, found := written(model, "qwen3-moe/hub+fp8-block", tmp_path / "again"))
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    mine = {key for key in plain if ".experts." in key}
    first = {key for key in mine if ".layers.0." in key}
    assert first
    assert {key for key in mine if same(plain[key], found[key])} == first
    assert relative(families.logits(moeglot.load(tmp_path / "out", dtype="float32")), families.logits(model)) <= LIMIT


@pytest.mark.skipif(VERSION < (5, 6), reason="the same code in all")
@pytest.mark.parametrize("name", ["deepseek-v3", "glm4-moe", "llama4-text", "nemotron-h", "gemma4-text", "phimoe", "minimax", "olmoe", "hy-v4"])
def test_other_families(name, tmp_path):
    """Also those whose other tensors have other names in memory than on the Hub, and plain experts held as they are."""
    live = model_of(name, "h=2i")
    families.saved(live, tmp_path / "plain", True)
    model = moeglot.load(tmp_path / "plain", dtype="float32", native=True)
    form = moeglot.open(tmp_path / "plain").format.name
    found, file = written(model, form, tmp_path / "out"), load_file(tmp_path / "plain" / "model.safetensors")
    assert found.keys() == file.keys()
    assert all(same(found[key], tensor) for key, tensor in file.items())
    assert relative(stock(live, tmp_path / "out"), families.logits(live)) <= LIMIT
    model = moeglot.load(tmp_path / "plain", dtype="float32", native=True, encode="fp8-block")
    written(model, form, tmp_path / "decoded")
    assert relative(stock(live, tmp_path / "decoded"), families.logits(model)) <= LIMIT
    assert relative(families.logits(live), families.logits(model)) > 1e-3
