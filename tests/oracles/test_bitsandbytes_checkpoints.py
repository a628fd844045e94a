"""Whole checkpoints in bitsandbytes' NF4 and FP4, their absmax nested or not: those that the library made we read, those that we make it reads."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeglot
from moeglot.encodings.bnb4 import names
from moeglot.planning.loss import Loss

sys.path.insert(0, str(Path(__file__).parents[1]))
from adapters import WRITERS, Job
from synthetic import write_checkpoint

bitsandbytes = pytest.importorskip("bitsandbytes", reason="installed in an environment of its own")

SIZES = {"e": 3, "h": 128, "i": 128}
"""H = I; a nested block is 256 absmax of 64 numbers, so that each expert's `down_proj` has one, and its `gate_up_proj` two."""
LAYOUTS = ["qwen3-moe/hub", "qwen3-moe/transformers-5"]


def made(
    tmp_path: Path, layout: str, kind: str, nested: bool, also: str = ".experts.", dtype: torch.dtype = torch.bfloat16
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint whose experts bitsandbytes quantized, and matrices that are named `also`; and its tensors as bitsandbytes decodes them."""
    plain = write_checkpoint(tmp_path / "plain", layout, SIZES, dtype=dtype)
    decoded, stored = load_file(plain / "model.safetensors"), {}
    for name, tensor in decoded.items():
        if ".experts." not in name and (also not in name or tensor.dim() < 2):
            stored[name] = tensor
            continue
        parts, decoded[name] = stacked(tensor, kind, nested) if tensor.dim() == 3 else linear(tensor, kind, nested)
        stored |= {name + suffix: part for suffix, part in parts.items()}
    out = tmp_path / "quantized"
    out.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, out / "model.safetensors", {"format": "pt"})
    told = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested}
    (out / "config.json").write_text(json.dumps({**json.loads((plain / "config.json").read_text()), "quantization_config": told}))
    return out, decoded


def linear(tensor: torch.Tensor, kind: str, nested: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    codes, state = bitsandbytes.functional.quantize_4bit(tensor, quant_type=kind, compress_statistics=nested)
    parts = {"": codes} | {f".{name}": part for name, part in state.as_dict(packed=True).items()}
    return parts, bitsandbytes.functional.dequantize_4bit(codes, state)


def stacked(tensor: torch.Tensor, kind: str, nested: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    module = torch.nn.Module()
    module.experts = torch.nn.Parameter(tensor.clone(), requires_grad=False)
    replace_parameter_4bit(module, "experts", quant_type=kind, compress_statistics=nested)
    return {name.removeprefix("experts"): part for name, part in module.state_dict().items()}, module.experts.detach().clone()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_it_wrote_is_read(tmp_path, layout, nested, kind):
    source, theirs = made(tmp_path, layout, kind, nested)
    assert moeglot.open(source).format.name == f"{layout}+{kind}"
    assert all(":nested" in line.encoding.name for line in moeglot.open(source).format.stored) == nested
    for to in LAYOUTS:
        written = moeglot.convert(source, to, tmp_path / to.replace("/", "-"), encode="bfloat16", allow_loss=True)
        assert written.report.verdict == "holds"
    ours = load_file(tmp_path / layout.replace("/", "-") / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("kind", "nested"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_attention_that_it_wrote_is_read(tmp_path, kind, nested):
    """load_in_4bit quantizes every Linear, not the experts' alone."""
    source, theirs = made(tmp_path, "qwen3-moe/hub", kind, nested, also="self_attn")
    moeglot.convert(source, "qwen3-moe/hub", tmp_path / "out", encode="bfloat16", allow_loss=True)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    moeglot.convert(source, f"qwen3-moe/hub+{kind}", tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name]) and not (".experts." in name and "quant_state" in name)] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_absmax_that_moved_is_seen(tmp_path, layout):
    """Nested absmax are codes of one byte: one of another place makes an expert compute something else."""
    source, _ = made(tmp_path, layout, "nf4", nested=True)
    moeglot.convert(source, layout, tmp_path / "right", encode="bfloat16", allow_loss=True)
    tensors = load_file(source / "model.safetensors")
    scales = next(tensor for name, tensor in tensors.items() if ".down_proj" in name and name.endswith(".absmax"))
    scales.copy_(scales.roll(1))
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    report = moeglot.verify(source, tmp_path / "right")
    assert report.verdict == "does not hold"
    assert max(check.figures.get("relative_error", 0) for check in report.checks if check.level == "forward") > 1e-3


def test_what_we_wrote_it_reads(tmp_path):
    plain = write_checkpoint(tmp_path / "plain", "qwen3-moe/hub", SIZES, dtype=torch.bfloat16)
    moeglot.convert(plain, "qwen3-moe/hub+nf4", tmp_path / "nested", encode="nf4:nested", allow_loss=True)
    moeglot.convert(tmp_path / "nested", "qwen3-moe/hub", tmp_path / "back", encode="bfloat16", allow_loss=True)
    stored, ours = load_file(tmp_path / "nested" / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    experts = [name for name in ours if ".experts." in name]
    for name in experts:
        told = {"weight" + suffix: stored[name + suffix] for suffix in names("nf4").values() if suffix and name + suffix in stored}
        state = bitsandbytes.functional.QuantState.from_dict(told, device=torch.device("cpu"))
        assert state.nested
        assert torch.equal(bitsandbytes.functional.dequantize_4bit(stored[name], state), ours[name])
    assert json.loads((tmp_path / "nested" / "config.json").read_text())["quantization_config"]["bnb_4bit_use_double_quant"] is True


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_nested_absmax_of_a_stack(tmp_path, kind):
    """One offset for all experts, as the library has it for a 3-D parameter: the same codes, and the experts that it computes with."""
    layout = "qwen3-moe/transformers-5"
    theirs, _ = made(tmp_path, layout, kind, nested=True)
    moeglot.convert(tmp_path / "plain", f"{layout}+{kind}", tmp_path / "ours", encode=f"{kind}:nested", allow_loss=True)
    ours, wanted = load_file(tmp_path / "ours" / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert ours.keys() == wanted.keys()
    differ = {name for name in ours if not torch.equal(ours[name], wanted[name])}
    assert all(name.endswith((".absmax", ".nested_absmax", f".bitsandbytes__{kind}")) for name in differ)
    for name in (name for name in ours if ".experts." in name and name + ".absmax" in ours):
        told = {
            part: {"weight" + suffix: file[name + suffix] for suffix in names(kind).values() if suffix} for part, file in (("ours", ours), ("theirs", wanted))
        }
        states = {part: bitsandbytes.functional.QuantState.from_dict(parts, device=torch.device("cpu")) for part, parts in told.items()}
        read = {part: bitsandbytes.functional.dequantize_4bit(ours[name], state).double() for part, state in states.items()}
        assert abs(states["ours"].offset / states["theirs"].offset - 1) < 1e-6
        assert float((read["ours"] - read["theirs"]).norm() / read["theirs"].norm()) < 1e-4


def test_a_stack_of_nested_absmax_keeps_its_bytes(tmp_path):
    source, _ = made(tmp_path, "qwen3-moe/transformers-5", "nf4", nested=True)
    moeglot.convert(source, "qwen3-moe/transformers-5+nf4", tmp_path / "again")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    told = {name for name in before if name.endswith("bitsandbytes__nf4")}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - told)
    assert all(json.loads(bytes(before[name].tolist())) == json.loads(bytes(after[name].tolist())) for name in told)


def test_a_merge_into_a_stack_of_nested_absmax(tmp_path):
    """The offset stays the base's; a change of nothing gives back every byte, another one is read by the library as it must be."""
    source, before = made(tmp_path, "qwen3-moe/transformers-5", "nf4", nested=True)
    base = moeglot.open(source)
    adapter = WRITERS["PEFT"][2](Job("qwen3-moe", SIZES["e"], SIZES["h"], SIZES["i"], 4, layers=2))
    key, changes = "model.layers.0.mlp.experts.down_proj", adapter.changes
    for strength in (0.0, 1.0):
        tensors = {name: tensor * strength if "lora_B" in name else tensor for name, tensor in adapter.tensors.items()}
        folder = replace(adapter, tensors=tensors).save(tmp_path / f"adapter{strength}")
        out = tmp_path / f"merged{strength}"
        assert moeglot.merge(base, moeglot.open_adapter(folder, base, "peft"), out, threshold=0).report.verdict == "holds"
        stored = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
        told = [{"weight" + suffix: file[key + suffix] for suffix in names("nf4").values() if suffix} for file in stored]
        states = [bitsandbytes.functional.QuantState.from_dict(parts, device=torch.device("cpu")) for parts in told]
        assert states[0].offset == states[1].offset
        read = bitsandbytes.functional.dequantize_4bit(stored[1][key], states[1]).double()
        if not strength:
            assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0] if not name.endswith("bitsandbytes__nf4"))
            continue
        for expert in range(SIZES["e"]):
            wanted = before[key][expert].double() + changes[0, "down", expert]
            assert float((read[expert] - wanted).norm() / wanted.norm()) < 0.15, "what NF4 itself costs"
            assert float((read[expert] - before[key][expert].double()).norm() / wanted.norm()) > 0.3, "the change is no small one"


def test_a_stack_is_written_from_nested_experts(tmp_path):
    """Each has an offset of its own, the stack has one: their absmax are rounded anew, and that is said to be a loss."""
    source, _ = made(tmp_path, "qwen3-moe/hub", "nf4", nested=True)
    with pytest.raises(moeglot.MoeglotError, match="allow-loss"):
        moeglot.convert(source, "qwen3-moe/transformers-5+nf4", tmp_path / "stack", encode="nf4:nested")
    written = moeglot.convert(source, "qwen3-moe/transformers-5+nf4", tmp_path / "stack", encode="nf4:nested", allow_loss=True)
    assert written.report.verdict == "holds"
    assert 0 < sum(written.losses.values(), Loss()).relative < 0.05


@pytest.mark.parametrize(("dtype", "nested"), [("bfloat16", True), ("float16", True), ("bfloat16", False)])
def test_a_merge_into_experts_and_attention(tmp_path, dtype, nested):
    """The library reads the sums, in the dtype that its quant_state said before, also where sums lie beyond their absmax."""
    source, before = made(tmp_path, "qwen3-moe/hub", "nf4", nested, also="self_attn", dtype=getattr(torch, dtype))
    modules = [key.removesuffix(".weight") for key in before if "down_proj" in key or "q_proj" in key]
    factors, generator = {}, torch.Generator().manual_seed(3)
    for name in modules:
        rows, columns = before[f"{name}.weight"].shape
        a, b = torch.randn(4, columns, generator=generator), torch.randn(rows, 4, generator=generator) * 0.02
        factors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["down_proj", "q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    certificate = moeglot.merge(source, folder, tmp_path / "out", threshold=0)
    assert certificate.report.verdict == "holds"
    assert all(role["clipped"] for role in certificate.document["merge"]["survived"].values())
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name in modules:
        key = f"{name}.weight"
        state = {"weight" + suffix: after[key + suffix] for suffix in names("nf4").values() if suffix and key + suffix in after}
        read = bitsandbytes.functional.QuantState.from_dict(state, device=torch.device("cpu"))
        assert read.dtype == getattr(torch, dtype)
        a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        wanted = before[key].double() + b @ a
        found = bitsandbytes.functional.dequantize_4bit(after[key], read).double()
        assert float((found - wanted).norm() / wanted.norm()) < 0.15, "what NF4 itself costs"
