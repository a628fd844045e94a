"""What quantization_config has a server do beside the weights: activations rounded under scales of calibration, keys and values in FP8."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint

import moeglot
from moeglot.codings import CODINGS
from moeglot.reports.report import plan_json

HUB = "qwen3-moe/hub"
SIZES = {"e": 3, "h": 128, "i": 128}
STATIC = {
    "autofp8": (("activation_scheme",), "static"),
    "fp8-tensor": (("config_groups", "group_0", "input_activations"), {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}),
    "fp8-channel": (("config_groups", "group_0", "input_activations"), {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}),
    "int8-channel": (("config_groups", "group_0", "input_activations"), {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}),
    "fp8-modelopt": ((), None),  # its name of the algorithm says it
    "fp8-quark": (("global_quant_config", "input_tensors"), {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}),
    "fp8-channel-quark": (("global_quant_config", "input_tensors"), {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}),
    "nvfp4-modelopt": ((), None),
    "nvfp4-pack": (("config_groups", "group_0", "input_activations"), {"num_bits": 4, "type": "float", "strategy": "tensor_group", "dynamic": "local"}),
}
"""Coding -> where its producer says that activations are rounded so, and how."""
KINDS = (("autofp8", "fp8-tensor", "fp8-modelopt", "fp8-quark"), ("fp8-channel", "fp8-channel-quark"), ("nvfp4-modelopt", "nvfp4-pack"))
CACHE = {
    "compressed-tensors": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True},
    "modelopt": {"num_bits": 8, "type": "float", "dynamic": False},
}
KEYS = ("model.layers.0.self_attn.k_scale", "model.layers.1.self_attn.k_proj.k_scale", "model.layers.1.self_attn.v_proj.output_scale")


def folder(where: Path, coding: str, static: bool = True, cache: object = None, scales: bool = True) -> Path:
    """A checkpoint as a producer exports it who saw a model compute."""
    plain = write_checkpoint(where / "plain", HUB, SIZES, 2)
    moeglot.convert(plain, f"{HUB}+{coding}", where / "coded", allow_loss=True)
    suffix = next(one for one in CODINGS if one.name == coding).linear.get("input_scale", ".input_scale")
    tensors = load_file(where / "coded" / "model.safetensors")
    modules = sorted(key.removesuffix(".weight") for key in load_file(plain / "model.safetensors") if ".experts." in key)
    found = {module + suffix: torch.full((1,) if coding == "nvfp4-pack" else (), 2.0**-n) for n, module in enumerate(modules)}
    tensors |= (found if scales else {}) | ({name: torch.tensor(0.5) for name in KEYS} if cache else {})
    save_file(tensors, where / "coded" / "model.safetensors", {"format": "pt"})
    (where / "coded" / "moeglot.json").unlink()
    config = json.loads((where / "coded" / "config.json").read_text())
    said = config["quantization_config"]
    path, value = STATIC.get(coding, ((), None))
    if static and path:
        for key in path[:-1]:
            said = said[key]
        said[path[-1]] = value
    if cache:
        config["quantization_config"]["kv_cache_scheme"] = cache
    (where / "coded" / "config.json").write_text(json.dumps(config))
    return where / "coded"


def declared(out: Path) -> dict:
    return json.loads((out / "config.json").read_text()).get("quantization_config", {})


def dug(said: dict, path: tuple[str, ...]):
    for key in path:
        said = said[key]
    return said


def scales(out: Path, suffix: str) -> dict[str, torch.Tensor]:
    return {name.removesuffix(suffix): tensor for name, tensor in load_file(out / "model.safetensors").items() if name.endswith(suffix)}


@pytest.mark.parametrize(("source", "target"), [(a, b) for kind in KINDS for a in kind for b in kind if a != b])
def test_another_producer_rounds_activations_under_the_same_scales(source, target, tmp_path):
    out, linear = tmp_path / "out", {one.name: one.linear["input_scale"] for one in CODINGS if "input_scale" in one.linear}
    certificate = moeglot.convert(folder(tmp_path, source), f"{HUB}+{target}", out, allow_loss=True)
    assert certificate.report.verdict == "holds"
    assert "undeclared" not in certificate.document
    before, after = scales(tmp_path / "coded", linear[source]), scales(out, linear[target])
    assert len(before) == 2 * 3 * 3
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert float(after[name]) == (float(tensor) if ("pack" in source) == ("pack" in target) else 1 / float(tensor))
    path, value = STATIC[target]
    said = dug(declared(out), path or ("config_groups", "group_0", "input_activations"))
    assert said == value if isinstance(value, str) else (value or {"dynamic": False}).items() <= said.items()


@pytest.mark.parametrize(
    ("source", "target", "static"),
    [
        ("int8-channel", f"{HUB}+int8-pack", True),
        ("int8-channel", HUB, True),
        ("fp8-tensor", f"{HUB}+autofp8", False),
        ("autofp8", f"{HUB}+fp8-quark", False),
        ("fp8-block-compressed", f"{HUB}+fp8-block", True),
        ("fp8-tensor", f"{HUB}+nvfp4-modelopt", True),
        ("nvfp4-modelopt", HUB, True),
        ("autofp8", "qwen3-moe/transformers-5", True),
    ],
)
def test_scales_that_the_output_does_not_declare_are_left_out_and_told(source, target, static, tmp_path):
    given = folder(tmp_path, source, static)
    told = plan_json(plan := moeglot.plan(given, target))["undeclared"]
    assert [(one["what"], one["tensors"]) for one in told] == [("scales of activations", 2 * 3 * 3)]
    assert ("rounded under them" in told[0]["why"]) == (static and source in STATIC)
    assert plan.target.name == target
    certificate = moeglot.convert(given, target, tmp_path / "out", allow_loss=True)
    assert certificate.report.verdict == "holds"
    assert certificate.document["undeclared"] == told
    assert not [name for file in (tmp_path / "out").glob("*.safetensors") for name in load_file(file) if "input_scale" in name or "input_global" in name]
    if source in ("fp8-tensor", "autofp8", "fp8-block-compressed") and "+fp8" in target:
        assert all(step.moves_codes for step in plan.steps)  # what is left out costs no decode


@pytest.mark.parametrize("static", [True, False])
def test_a_scale_of_activations_of_the_attention_alone(static, tmp_path):
    """Beside experts that are not quantized: what config.json says of the module that has it is why it is left out."""
    source = write_checkpoint(tmp_path / "plain", HUB, SIZES, 2)
    tensors, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    for name in (f"model.layers.1.self_attn.{name}_proj" for name in "okv"):
        scale = tensors[f"{name}.weight"].float().abs().amax() / 448
        tensors |= {f"{name}.weight": (tensors[f"{name}.weight"].float() / scale).to(torch.float8_e4m3fn), f"{name}.weight_scale": scale}
        tensors |= {f"{name}.input_scale": torch.tensor(0.5)} if "v_proj" not in name else {}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    group = {"targets": ["re:.*o_proj$"], "weights": weights, "input_activations": {**weights, "dynamic": not static}}
    groups = {"group_0": group, "group_1": {"targets": ["re:.*[kv]_proj$"], "weights": weights, "input_activations": None}}
    said = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups, "ignore": ["re:.*layers.0.*"]}
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    (told,) = plan_json(moeglot.plan(source, f"{HUB}+nf4"))["undeclared"]
    assert (told["what"], told["tensors"]) == ("scales of activations", 2)
    assert ("rounded under them" in told["why"]) == static
    assert ("config.json does not use them" in told["why"]) == (not static)
    assert not plan_json(moeglot.plan(source, "qwen3-moe/transformers-5")).get("undeclared")  # where the quantization stays, they do


@pytest.mark.parametrize(("target", "method"), [("fp8-modelopt", "modelopt"), ("nvfp4-pack", "compressed-tensors"), ("int4-pack", "compressed-tensors")])
@pytest.mark.parametrize(
    ("source", "cache"), [("fp8-tensor", CACHE["compressed-tensors"]), ("fp8-modelopt", CACHE["modelopt"]), ("fp8-modelopt", "FP8"), ("autofp8", "static")]
)
def test_keys_and_values_stay_in_fp8_where_the_producer_can_say_so(source, cache, target, method, tmp_path):
    if source == target:
        pytest.skip("nothing changes")
    given = folder(tmp_path, source, cache=cache)
    encode = {"encode": "int4:32"} if target == "int4-pack" else {}
    certificate = moeglot.convert(given, f"{HUB}+{target}", tmp_path / "out", allow_loss=True, **encode)
    assert certificate.report.verdict == "holds"
    assert declared(tmp_path / "out")["kv_cache_scheme"] == (CACHE[method] if method != {"fp8-tensor": "compressed-tensors"}.get(source) else cache)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() >= set(KEYS)


@pytest.mark.parametrize("target", [HUB, f"{HUB}+autofp8", f"{HUB}+fp8-quark", f"{HUB}+nf4"])
def test_scales_of_keys_and_values_go_with_what_declares_them(target, tmp_path):
    given = folder(tmp_path, "fp8-tensor", cache=CACHE["compressed-tensors"], scales=False)
    told = plan_json(moeglot.plan(given, target))["undeclared"]
    assert [(one["what"], one["tensors"]) for one in told] == [("scales of keys and values", len(KEYS))]
    certificate = moeglot.convert(given, target, tmp_path / "out", allow_loss=True)
    assert (certificate.report.verdict, certificate.document["undeclared"]) == ("holds", told)
    assert not load_file(tmp_path / "out" / "model.safetensors").keys() & set(KEYS)
    assert "kv_cache_scheme" not in declared(tmp_path / "out")
    if target == HUB:
        check = next(one for one in moeglot.compare(given, tmp_path / "out").checks if one.what == "other tensors")
        assert (check.verdict, f"{len(KEYS)} scales of keys and values" in check.detail) == ("holds", True)


def test_another_scheme_has_no_word_elsewhere(tmp_path):
    """In groups, or as they come: of ModelOpt's words there are none for it."""
    given = folder(tmp_path, "fp8-tensor", cache={**CACHE["compressed-tensors"], "dynamic": True})
    assert "kv_cache_scheme" not in moeglot.plan(given, f"{HUB}+fp8-modelopt").config["quantization_config"]
    assert moeglot.plan(given, f"{HUB}+nvfp4-pack").config["quantization_config"]["kv_cache_scheme"]["dynamic"] is True
