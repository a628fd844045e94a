"""Laws of checkpoints of which a part is quantized: config.json says which layers are left alone, the tensors must agree, and a conversion keeps it so."""

import json
import shutil
from functools import cache, partial

import pytest
import torch
from adapters import WRITERS, Job
from reading import differing, tensors
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint

import moeglot
from moeglot.codings import CODINGS
from moeglot.codings.rules import sparing
from moeglot.errors import LossRefused, MoeglotError, TensorMismatch
from moeglot.planning.units import estimate
from moeglot.reports.report import plan_json

HUB, STACKED = "qwen3-moe/hub", "qwen3-moe/transformers-5"
SIZES = {"e": 3, "h": 128, "i": 128}
KEEPING = [coding for coding in CODINGS if coding.kept and not coding.families]
LAYERS = 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(coding, encode) -> a checkpoint in it, made once, beside the plain one that all are made of: to be read, or copied."""
    base = tmp_path_factory.mktemp("whole")
    plain = write_checkpoint(base / "plain", HUB, SIZES, LAYERS)

    @cache
    def of(coding, encode=None):
        if coding is None:
            return plain
        out = base / f"{coding} {encode}"
        moeglot.convert(plain, f"{HUB}+{coding}", out, encode=encode, allow_loss=True)
        return out

    return of


@pytest.fixture
def mixed(whole):
    return partial(_mixed, whole)


def _mixed(whole, folder, coding, left=(1,), named="_proj", encode=None):
    """A checkpoint whose layers `left` are not quantized, as its producer writes it: no mark of ours, modules listed by name. `named`: only these.

    Beside it in `folder`, copies of the two that it is put together from: "plain" and "whole".
    """
    for name, made in (("plain", whole(None)), ("whole", whole(coding.name, encode))):
        shutil.copytree(made, folder / name)
    tensors, given = load_file(folder / "whole" / "model.safetensors"), load_file(folder / "plain" / "model.safetensors")
    here = tuple(f"model.layers.{layer}.mlp.experts." for layer in left)
    alone = [{key for key in names if key.startswith(here) and named in key} for names in (tensors, given)]
    kept = {key: tensor for key, tensor in tensors.items() if key not in alone[0]} | {key: given[key] for key in alone[1]}
    config = json.loads((folder / "whole" / "config.json").read_text())
    modules = sorted({key.removesuffix(".weight") for key in alone[1]})
    config["quantization_config"] = sparing(config["quantization_config"], coding.kept, modules)
    (folder / "mixed").mkdir()
    save_file(kept, folder / "mixed" / "model.safetensors", {"format": "pt"})
    (folder / "mixed" / "config.json").write_text(json.dumps(config))
    return folder / "mixed"


@pytest.mark.parametrize(("coding", "left"), [(coding, ((0,), (1,), (0, 2))[n % 3]) for n, coding in enumerate(KEEPING)], ids=lambda v: getattr(v, "name", v))
def test_it_is_read_and_returns_as_it_is(coding, left, mixed, tmp_path):
    source = moeglot.open(mixed(tmp_path, coding, left))
    assert source.format.name == f"{HUB}+{coding.name}"
    given = moeglot.open(tmp_path / "plain")
    for layer in range(LAYERS):
        for role in ("gate", "up", "down"):
            found, expected = source.experts(layer)[role], given.experts(layer)[role]
            equal = all(torch.equal(found[n].decode(torch.float32), expected[n].decode(torch.float32)) for n in range(SIZES["e"]))
            assert equal == (layer in left), (layer, role)
    certificate = moeglot.convert(source, source.format.name, tmp_path / "again")
    assert certificate.report.verdict == "holds"
    assert differing(source.source.folder, tmp_path / "again") == []


@pytest.mark.parametrize(("coding", "role"), [(coding, ("gate", "down")[n % 2]) for n, coding in enumerate(KEEPING)], ids=lambda v: getattr(v, "name", v))
def test_a_role_that_is_left_alone_in_every_layer(coding, role, mixed, tmp_path):
    """llm-compressor's recipes name such by pattern. The numbers are those of the two checkpoints that it was put together from."""
    encode = "int4:64" if coding.name == "int4-pack" else None
    folder = mixed(tmp_path, coding, range(LAYERS), named=f"{role}_proj", encode=encode)
    source, whole, given = moeglot.open(folder), moeglot.open(tmp_path / "whole"), moeglot.open(tmp_path / "plain")
    assert source.format.name == f"{HUB}+{coding.name}"
    for each in ("gate", "up", "down"):
        found, expected = source.experts(1)[each][2], (given if each == role else whole).experts(1)[each][2]
        assert torch.equal(found.decode(torch.float32), expected.decode(torch.float32))
    certificate = moeglot.convert(source, source.format.name, tmp_path / "again")
    assert certificate.report.verdict == "holds"
    assert differing(folder, tmp_path / "again") == []


@pytest.mark.parametrize("coding", [c for c in KEEPING if c.stacked and not any(part.flat for part in c.encoding.parts)], ids=lambda c: c.name)
def test_stacked_and_back_each_layer_keeps_its_encoding(coding, mixed, tmp_path):
    folder = mixed(tmp_path, coding)
    plan = moeglot.plan(folder, f"{STACKED}+{coding.name}")
    assert {step.layer for step in plan.steps if step.line.is_plain} == {1}
    assert moeglot.convert(folder, f"{STACKED}+{coding.name}", tmp_path / "stacked").report.verdict == "holds"
    path = tmp_path / "stacked" / "model.safetensors"
    save_file(load_file(path), path, {"format": "pt"})  # as another producer would have written it
    assert moeglot.convert(tmp_path / "stacked", f"{HUB}+{coding.name}", tmp_path / "back").report.verdict == "holds"
    assert differing(folder, tmp_path / "back") == []


def test_in_another_encoding_what_was_left_alone_stays_alone(mixed, tmp_path):
    by_name = {coding.name: coding for coding in KEEPING}
    folder = mixed(tmp_path, by_name["int4-pack"])
    certificate = moeglot.convert(folder, f"{HUB}+fp8-block", tmp_path / "fp8", allow_loss=True)
    assert certificate.report.verdict == "holds"
    found, given = tensors(tmp_path / "fp8"), tensors(tmp_path / "plain")
    assert all(torch.equal(found[key], given[key]) for key in given if "layers.1.mlp.experts" in key)
    assert found["model.layers.0.mlp.experts.0.up_proj.weight"].dtype == torch.float8_e4m3fn
    kept = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert "model.layers.1.mlp.experts.2.down_proj" in kept


def test_where_the_target_cannot_say_it_the_plan_states_the_loss(tmp_path):
    """MXFP4 of DeepSeek-V4 has no list of what is left alone: the layer is encoded, which is refused without --allow-loss."""
    layout, fp8 = "deepseek-v4/hub", "deepseek-v4/hub+fp8-block-scale"
    write_checkpoint(tmp_path / "plain", layout, {"e": 2, "h": 128, "i": 128}, 2)
    moeglot.convert(tmp_path / "plain", fp8, tmp_path / "whole", allow_loss=True)
    path = tmp_path / "whole" / "model.safetensors"
    given = load_file(tmp_path / "plain" / "model.safetensors")
    coded = {key: tensor for key, tensor in load_file(path).items() if not key.startswith("layers.1.ffn.experts")}
    save_file(coded | {key: given[key] for key in given if key.startswith("layers.1.ffn.experts")}, path, {"format": "pt"})
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"].append("layers.1.ffn.experts")
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config))
    plan = estimate(moeglot.plan(tmp_path / "whole", "deepseek-v4/hub+fp4-experts"))
    assert any(verb.startswith("encode bfloat16") for verb in plan.expected_loss)
    with pytest.raises(LossRefused):
        moeglot.convert(tmp_path / "whole", "deepseek-v4/hub+fp4-experts", tmp_path / "out")


def test_the_tensors_refute_what_config_says(mixed, tmp_path):
    """Said to be quantized and not so; said to be left alone and quantized: both are refused, and nothing is inferred from what is there."""
    by_name = {coding.name: coding for coding in KEEPING}
    folder = mixed(tmp_path, by_name["int4-pack"])
    config = json.loads((folder / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    config["quantization_config"]["ignore"] = [name for name in ignored if "layers.1.mlp.experts" not in name]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoeglotError, match="not quantized") as refused:
        moeglot.open(folder)
    assert "add it to ignore" in refused.value.do
    config["quantization_config"]["ignore"] = [*ignored, "re:model\\.layers\\.2\\.mlp\\.experts\\..*"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoeglotError, match=r"layers\.2\.mlp\.experts\.0\.\w+_proj\.weight: missing"):
        moeglot.open(folder)


def test_numbers_that_are_wrong_are_named_as_the_layer_stores_them(mixed, tmp_path):
    """A layer that is left alone has other keys than the lines of its format."""
    by_name, key = {coding.name: coding for coding in KEEPING}, "model.layers.2.mlp.experts.0.gate_proj.weight"
    folder = mixed(tmp_path, by_name["nvfp4-pack"], (2,))
    held = load_file(folder / "model.safetensors")
    held[key][0, 0] = float("nan")
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    told = f"{key}, expert 0: holds NaN or infinite numbers"
    assert f"{told} (1 experts)" in [check.detail for check in moeglot.verify(folder).checks]
    assert [told] == [finding.what for finding in moeglot.lint(folder) if finding.about == "numbers"]


def test_patterns_of_each_producer(mixed, tmp_path):
    by_name = {coding.name: coding for coding in KEEPING}
    for name, pattern in {
        "int4-pack": "re:model\\.layers\\.1\\.mlp\\.experts\\..*",
        "nvfp4-modelopt": "model.layers.1.mlp.experts*",
        "fp8-block": "model.layers.1.mlp.experts",
        "nf4": "model.layers.1.mlp.experts",
    }.items():
        folder = mixed(tmp_path / name, by_name[name])
        config = json.loads((folder / "config.json").read_text())
        key = by_name[name].kept
        config["quantization_config"][key] = [*(one for one in config["quantization_config"][key] if "layers.1.mlp.experts" not in one), pattern]
        (folder / "config.json").write_text(json.dumps(config))
        assert moeglot.open(folder).format.unlike.keys() == {1}, name


def test_a_layer_that_is_left_alone_is_said(mixed, tmp_path):
    by_name = {coding.name: coding for coding in KEEPING}
    found = [finding for finding in moeglot.lint(moeglot.open(mixed(tmp_path, by_name["int4-pack"]))) if finding.about == "experts are not quantized"]
    assert len(found) == 1
    assert "1 of 3 layers" in found[0].what
    assert found[0].figures["bytes"] == 2 * SIZES["e"] * 3 * SIZES["h"] * SIZES["i"]


def test_attention_in_fp8_beside_experts_in_nvfp4(mixed, tmp_path):
    """As config groups say it: the experts' codes are moved and the attention's carried; to plain floats, each is decoded by its own declaration."""
    folder = mixed(tmp_path, next(coding for coding in KEEPING if coding.name == "nvfp4-pack"))
    given = attention_in_fp8(folder, {"config_groups": {"attention": GROUP}})
    source = moeglot.open(folder)
    assert source.format.name == f"{HUB}+nvfp4-pack"
    moeglot.convert(folder, source.format.name, tmp_path / "again")
    assert differing(folder, tmp_path / "again") == []
    moeglot.convert(folder, HUB, tmp_path / "plain again", encode="float32", allow_loss=True)
    assert torch.equal(tensors(tmp_path / "plain again")[f"{ATTENTION}.weight"].float(), given)


def test_attention_in_fp8_beside_experts_that_are_not_quantized(tmp_path):
    """The quantization stays in config.json as long as codes stay; decoded, both are gone."""
    folder = write_checkpoint(tmp_path / "plain", HUB, SIZES, 1)
    ignored = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["re:.*mlp.*", "lm_head"]}
    given = attention_in_fp8(folder, {**ignored, "config_groups": {"attention": GROUP}})
    assert moeglot.open(folder).format.name == HUB
    moeglot.convert(folder, STACKED, tmp_path / "stacked")
    assert "quantization_config" in json.loads((tmp_path / "stacked" / "config.json").read_text())
    moeglot.convert(tmp_path / "stacked", HUB, tmp_path / "back")
    assert differing(folder, tmp_path / "back") == []
    moeglot.convert(folder, f"{HUB}+nf4", tmp_path / "nf4", allow_loss=True)
    assert torch.equal(tensors(tmp_path / "nf4")[f"{ATTENTION}.weight"].float(), given.bfloat16().float())


def test_a_merge_that_keeps_all_experts_in_bfloat16_beside_attention_in_fp8(mixed, tmp_path):
    """Nothing of the experts is quantized any more, and what is no expert stays so; decoded on request, the plan counts it apart from what is copied."""
    folder = mixed(tmp_path, next(coding for coding in KEEPING if coding.name == "nvfp4-pack"), left=())
    given = attention_in_fp8(folder, {"config_groups": {"attention": GROUP}})
    base = moeglot.open(folder)
    made = WRITERS["PEFT"][2](Job("qwen3-moe", SIZES["e"], SIZES["h"], SIZES["i"], 4, layers=LAYERS))
    adapter = moeglot.open_adapter(made.save(tmp_path / "adapter"), base, "peft")
    assert moeglot.merge(base, adapter, tmp_path / "out", keep_touched="bf16", allow_loss=True).report.verdict == "holds"
    found, before = tensors(tmp_path / "out"), tensors(folder)
    assert all(tensor.dtype == torch.bfloat16 for name, tensor in found.items() if ".experts." in name)
    assert all(torch.equal(found[name].view(torch.uint8), before[name].view(torch.uint8)) for name in before if ".experts." not in name)
    merged = moeglot.open(tmp_path / "out")
    assert merged.format.name == HUB
    assert torch.equal(merged.decoded("F32")[f"{ATTENTION}.weight"].read(), given)
    told = plan_json(moeglot.plan(base, HUB, encode="bfloat16", adapter=adapter))
    assert [(step["do"], step["tensors"]) for step in told["steps"] if "outside" in step["do"]] == [("decode fp8-channel to bfloat16 outside the experts", 1)]


ATTENTION = "model.layers.0.self_attn.q_proj"
GROUP = {
    "targets": [f"re:{ATTENTION}$"],
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
    "format": "float-quantized",
}


def attention_in_fp8(folder, declared):
    """Code one matrix of the attention, by hand, and declare it; what it decodes to in float32."""
    path = folder / "model.safetensors"
    found, config = load_file(path), json.loads((folder / "config.json").read_text())
    weight = found[f"{ATTENTION}.weight"].float()
    scale = weight.abs().amax(-1, keepdim=True) / 448
    found[f"{ATTENTION}.weight"], found[f"{ATTENTION}.weight_scale"] = (weight / scale).to(torch.float8_e4m3fn), scale
    before = config.setdefault("quantization_config", {})
    groups = {**before.get("config_groups", {}), **declared["config_groups"]}
    ignore = [name for name in [*before.get("ignore", ()), *declared.get("ignore", ())] if name != ATTENTION]
    config["quantization_config"] = {**before, **declared, "config_groups": groups, "ignore": ignore}
    save_file(found, path, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return found[f"{ATTENTION}.weight"].float() * scale


def test_modelopts_list_of_what_is_quantized_how(mixed, tmp_path):
    """MIXED_PRECISION: `quantized_layers` names each module with its algorithm, and what it does not name is left alone."""
    folder = mixed(tmp_path, next(coding for coding in KEEPING if coding.name == "nvfp4-modelopt"))
    config = json.loads((folder / "config.json").read_text())
    layers = {f"model.layers.{n}.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16} for n in (0, 2)}
    declared = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": declared}))
    found = moeglot.open(folder)
    assert (found.format.name, found.format.unlike.keys()) == (f"{HUB}+nvfp4-modelopt", {1})
    layers["model.layers.2.mlp.experts"]["quant_algo"] = "FP8"
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": declared}))
    with pytest.raises(MoeglotError):
        moeglot.open(folder)


def test_one_role_in_other_groups_and_all_alike_again(mixed, tmp_path):
    """A role's group size is declared by a group of its own; coded as the others are, the declaration is no longer the source's."""
    whole = mixed(tmp_path, next(coding for coding in KEEPING if coding.name == "int4-pack"), encode="int4:64")
    other = tmp_path / "other"
    moeglot.convert(tmp_path / "plain", f"{HUB}+int4-pack", other, encode="int4:32", allow_loss=True)
    found = {name: tensor for name, tensor in tensors(whole).items() if "down_proj" not in name or "layers.1." in name}
    save_file(found | {name: tensor for name, tensor in tensors(other).items() if "down_proj" in name and "layers.1." not in name}, whole / "model.safetensors")
    config = json.loads((whole / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    groups = {"a": group, "b": {**group, "targets": ["re:.*down_proj$"], "weights": {**group["weights"], "group_size": 32}}}
    config["quantization_config"] |= {"config_groups": groups}
    (whole / "config.json").write_text(json.dumps(config))
    assert moeglot.convert(whole, f"{HUB}+int4-pack", tmp_path / "same").report.verdict == "holds"
    assert differing(whole, tmp_path / "same") == []
    moeglot.convert(whole, f"{HUB}+int4-pack", tmp_path / "alike", encode="int4:32", allow_loss=True)
    said = json.loads((tmp_path / "alike" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [group["weights"]["group_size"] for group in said.values()] == [32]
    groups["b"]["targets"] = ["re:.*layers\\.2\\..*"]
    (whole / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoeglotError, match=r"layers\.2\.mlp\.experts\.0\.gate_proj is declared as int4:32, and such of layers before it as int4:64"):
        moeglot.open(whole)


@pytest.mark.parametrize(("alone", "quantized"), [(2, 0), (0, 1)])
@pytest.mark.parametrize("name", ["int4-pack", "fp8-channel"])
def test_an_expert_that_is_left_alone(alone, quantized, name, mixed, tmp_path):
    """The experts of a layer are stored alike: the refusal says which is which, not that a list lacks what it has."""
    folder = mixed(tmp_path, next(coding for coding in KEEPING if coding.name == name), named=f".{alone}.up_proj")
    with pytest.raises(TensorMismatch, match=r"experts\.\d\.up_proj: quantization_config says .* and \S+experts\.0\.up_proj") as refused:
        moeglot.open(folder)
    assert f"experts.{max(alone, quantized)}.up_proj" in refused.value.wrong
    assert "experts of a layer are stored alike" in refused.value.known
