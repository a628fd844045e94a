"""GPTQ, AWQ and AutoRound as their own tools write them: what their quantization_config says is read, kept, written for its readers, or refused."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint

import moeglot
from moeglot.codings.coding import leaves_alone
from moeglot.codings.rules import sparing, telling_apart
from moeglot.errors import Contradiction, TensorMismatch, UnknownFormat

HUB = "qwen3-moe/hub"
SIZES = {"e": 3, "h": 64, "i": 64}
GROUP = 32
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "sym": True, "data_type": "int", "packing_format": "auto_round:auto_gptq"}


def words(codes: torch.Tensor, axis: int, bits: int, order=None) -> torch.Tensor:
    """Integers along an axis -> I32, the lowest bits first, those of a word in this order."""
    split = codes.unflatten(axis, (-1, 32 // bits))
    places = order or range(32 // bits)
    found = sum(split.select(axis + 1, place) << (bits * n) for n, place in enumerate(places))
    return torch.where(found >= 1 << 31, found - (1 << 32), found).to(torch.int32)


def packed(weight: torch.Tensor, bits=4, symmetric=True, less=True, shuffled=False, awq=False, group=GROUP) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """weight [out, in] -> its tensors as GPTQ or AWQ has them, and the float32 that they mean, written from the definition alone."""
    values, half = weight.float().T, 1 << (bits - 1)
    of_input = torch.arange(len(values)) // group
    of_input = of_input[torch.randperm(len(values), generator=torch.Generator().manual_seed(1))] if shuffled else of_input
    zero = torch.full((len(values) // group, values.shape[1]), half) if symmetric else torch.arange(len(values) // group).unsqueeze(1) + half - 3
    zero = zero.expand(-1, values.shape[1]).contiguous()
    scale = torch.stack([values[of_input == n].abs().amax(0) / (half - 4) for n in range(len(zero))]).half()
    codes = (values / scale.float()[of_input] + zero[of_input]).round().clamp(0, 2 * half - 1).long()
    meant = ((codes - zero[of_input]) * scale.float()[of_input]).T.contiguous()
    if awq:
        interleaved = [0, 2, 4, 6, 1, 3, 5, 7]
        return {"qweight": words(codes, 1, 4, interleaved), "qzeros": words(zero, 1, 4, interleaved), "scales": scale}, meant
    return {
        "qweight": words(codes, 0, bits),
        "qzeros": words(zero - int(less), 1, bits),
        "scales": scale,
        "g_idx": of_input.to(torch.int32),
    }, meant


def folder(where, quantization, layers=1, beside=None, layout=HUB, coded=".experts.", unlike=None, **how):
    """A checkpoint whose matrices of these names are packed as `how` says, or as `unlike` says of a name; and what they mean."""
    plain = write_checkpoint(where, layout, SIZES, layers)
    found, meant = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        meant[name] = tensor.float()
        if coded in name and name.endswith("_proj.weight"):
            parts, meant[name] = packed(tensor, **{**how, **(unlike(name) if unlike else {})})
            found |= {name.removesuffix("weight") + part: one.contiguous() for part, one in parts.items()}
        else:
            found[name] = tensor
    save_file(found, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": quantization}
    (plain / "config.json").write_text(json.dumps(config))
    for name, said in (beside or {}).items():
        (plain / name).write_text(json.dumps(said))
    return plain, meant


def experts(where) -> dict[str, torch.Tensor]:
    """What moeglot reads of the experts of each layer, in float32, by their names on the Hub."""
    checkpoint, found = moeglot.open(where), {}
    for layer in checkpoint.layers:
        for role, encoded in checkpoint.experts(layer).items():
            for n in range(SIZES["e"]):
                found[f"model.layers.{layer}.mlp.experts.{n}.{role}_proj.weight"] = encoded[n].decode(torch.float32)
    return found


def agrees(where, meant, limit=0.0) -> bool:
    found = experts(where)
    assert found.keys() == {name for name in meant if ".experts." in name}
    return all((one - meant[name]).norm() <= limit * meant[name].norm() for name, one in found.items())


def without(said: dict, *keys: str) -> dict:
    return {key: value for key, value in said.items() if key not in keys}


@pytest.mark.parametrize("key", ["checkpoint_format", "format"])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_either_key_says_how_zero_points_are_stored(key, version, tmp_path):
    said = without(GPTQ, "checkpoint_format") | {"sym": False, key: version}
    where, meant = folder(tmp_path / "in", said, symmetric=False, less=version == "gptq")
    assert agrees(where, meant)
    moeglot.convert(where, HUB, tmp_path / "out", allow_loss=True)
    assert agrees(tmp_path / "out", meant, 3e-3)


@pytest.mark.parametrize("said", [GPTQ | {"format": "gptq_v2"}, AWQ | {"format": "gemv"}, AWQ | {"checkpoint_format": "gemv"}])
def test_two_keys_that_disagree_are_refused(said, tmp_path):
    """GPTQModel goes by the one, transformers by the other."""
    where, _ = folder(tmp_path / "in", said, awq=said["quant_method"] == "awq")
    with pytest.raises(Contradiction, match=r"format = (gptq_v2|gemv)"):
        moeglot.open(where)


def test_awq_that_is_no_gemm_by_its_other_key(tmp_path):
    where, _ = folder(tmp_path / "in", without(AWQ, "version") | {"format": "gemv"}, awq=True, symmetric=False)
    with pytest.raises(moeglot.MoeglotError, match="gemv"):
        moeglot.open(where)


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        (AUTO_ROUND | {"rotation_config": {"hadamard_type": "hadamard", "block_size": 32}}, True),
        (AUTO_ROUND | {"spinquant_config": {"r4": True}}, True),
        (GPTQ | {"rotation": "hadamard"}, True),
        (AUTO_ROUND | {"rotation_config": {}}, False),
        (GPTQ | {"rotation": None}, False),
    ],
    ids=str,
)
def test_rotations_of_activations_are_in_no_weight(said, refused, tmp_path):
    """AutoRound's and GPTQModel's loaders turn the inputs of these matrices as the model computes."""
    where, meant = folder(tmp_path / "in", said)
    if refused:
        with pytest.raises(UnknownFormat, match=r"says (rotation|rotation_config|spinquant_config) = "):
            moeglot.open(where)
    else:
        assert agrees(where, meant)


OLD_AWQ = {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"}


@pytest.mark.parametrize(
    ("said", "name", "beside", "told"),
    [
        (GPTQ, "quantize_config.json", GPTQ | {"meta": {}, "dynamic": None}, None),
        (GPTQ, "quantize_config.json", {"bits": 4, "group_size": GROUP, "model_file_base_name": "model"}, None),
        (AWQ, "quant_config.json", OLD_AWQ, None),
        (AUTO_ROUND, "quantization_config.json", AUTO_ROUND | {"quant_method": "intel/auto-round"}, None),
        (GPTQ, "quantization_config.json", {"quant_type": "int4"}, None),
        (
            GPTQ,
            "quantize_config.json",
            without(GPTQ, "checkpoint_format") | {"format": "gptq_v2"},
            "= gptq, and quantize_config.json gptq_v2",
        ),
        (without(GPTQ, "checkpoint_format"), "quant_config.json", GPTQ | {"checkpoint_format": "gptq_v2"}, "= gptq, and quant_config.json gptq_v2"),
        (GPTQ, "quantize_config.json", GPTQ | {"sym": False}, "sym = True, and quantize_config.json False"),
        (GPTQ, "quantize_config.json", GPTQ | {"quant_method": "awq"}, "quant_method = gptq, and quantize_config.json awq"),
        (GPTQ, "quantize_config.json", GPTQ | {"rotation": "hadamard"}, "rotation = False, and quantize_config.json hadamard"),
        (GPTQ | {"dynamic": {}}, "quantize_config.json", GPTQ | {"dynamic": {"-:lm_head": {}}}, "dynamic = "),
        (AWQ, "quant_config.json", OLD_AWQ | {"q_group_size": 64}, f"group_size = {GROUP}, and quant_config.json 64"),
        (AUTO_ROUND, "quantization_config.json", AUTO_ROUND | {"packing_format": "auto_round:gptqmodel"}, "packing_format = auto_gptq, and "),
    ],
    ids=str,
)
def test_a_file_that_says_it_again_says_the_same(said, name, beside, told, tmp_path):
    where, meant = folder(tmp_path / "in", said, beside={name: beside}, awq=said["quant_method"] == "awq", symmetric=said["quant_method"] != "awq")
    if told is None:
        assert agrees(where, meant)
    else:
        with pytest.raises(Contradiction, match=told):
            moeglot.open(where)


CODES = {
    "act-order": (GPTQ | {"desc_act": True}, {"shuffled": True}),
    "8 bits": (GPTQ | {"bits": 8}, {"bits": 8}),
    "8 bits in act-order": (GPTQ | {"bits": 8, "desc_act": True}, {"bits": 8, "shuffled": True}),
    "plain": (GPTQ, {}),
    "asymmetric": (GPTQ | {"sym": False}, {"symmetric": False}),
    "awq": (AWQ, {"awq": True, "symmetric": False}),
}
MOVED = {("plain", "awq"), ("asymmetric", "awq"), ("awq", "awq"), ("8 bits", "auto-round"), ("plain", "auto-round"), ("asymmetric", "auto-round")}
MOVED |= {("awq", "auto-round"), *((name, "gptq") for name in CODES)}


@pytest.mark.parametrize("target", ["gptq", "awq", "auto-round"])
@pytest.mark.parametrize("name", CODES)
def test_codes_are_moved_where_the_target_can_say_them_and_made_anew_in_the_same_groups(name, target, tmp_path):
    """AWQ and AutoRound have no word for inputs in any group, and AWQ none for 8 bits."""
    where, meant = folder(tmp_path / "in", CODES[name][0], **CODES[name][1])
    steps = moeglot.plan(where, f"{HUB}+{target}").steps
    assert all(step.moves_codes for step in steps) == ((name, target) in MOVED)
    assert {getattr(step.target, "group", None) for step in steps} == {GROUP}
    certificate = moeglot.convert(where, f"{HUB}+{target}", tmp_path / "out", allow_loss=(name, target) not in MOVED)
    assert certificate.report.verdict == "holds"
    assert agrees(tmp_path / "out", meant, 0 if (name, target) in MOVED else 0.2)
    if target == "awq":
        assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["zero_point"] is True


def skipped_by_servers(said: dict, prefix: str) -> bool:
    """Whether vLLM (gptq_utils.get_dynamic_override, quant_utils.is_layer_skipped) and SGLang (is_layer_skipped_awq) leave the module of this prefix alone."""
    if said["quant_method"] == "awq":
        return any(name in prefix for name in said["modules_to_not_convert"])
    return any(re.match(pattern.removeprefix("-:"), prefix) for pattern in said["dynamic"] if pattern.startswith("-:"))


@pytest.mark.parametrize("target", ["gptq", "awq"])
def test_servers_find_what_is_left_alone_by_the_names_that_they_ask_for(target, tmp_path):
    """All experts of a layer are one module for them, and q, k and v are one matrix."""
    where, meant = folder(tmp_path / "in", GPTQ | {"dynamic": {r"-:.*layers\.1\..*": {}}}, layers=3, coded="layers.")
    given, plain = load_file(where / "model.safetensors"), load_file(write_checkpoint(tmp_path / "plain", HUB, SIZES, 3) / "model.safetensors")
    given = {name: tensor for name, tensor in given.items() if ".layers.1." not in name} | {name: one for name, one in plain.items() if ".layers.1." in name}
    save_file(given, where / "model.safetensors", {"format": "pt"})
    meant |= {name: one.float() for name, one in plain.items() if ".layers.1." in name}
    moeglot.convert(where, f"{HUB}+awq", tmp_path / "out", allow_loss=True)
    if target == "gptq":
        moeglot.convert(tmp_path / "out", f"{HUB}+gptq", tmp_path / "again", allow_loss=True)
    out = tmp_path / ("again" if target == "gptq" else "out")
    assert agrees(out, meant)
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert [skipped_by_servers(said, f"model.layers.{n}.mlp.experts") for n in range(3)] == [False, True, False]
    assert all(skipped_by_servers(said, f"model.layers.{n}.self_attn.{name}") for n in range(3) for name in ("q_proj", "qkv_proj", "o_proj"))
    assert not any(".experts.0" in str(name) for name in said.get("modules_to_not_convert", said["dynamic"]))


@pytest.mark.parametrize("target", ["awq", "gptq", "fp8-block"])
def test_what_servers_make_of_several_matrices_is_listed_where_they_ask_for_it(target, tmp_path):
    """DeepSeek's two first matrices of attention, and those of its shared experts; of three that make qkv_proj it has none. Others ask for each."""
    source = write_checkpoint(tmp_path / "plain", "deepseek-v3/hub", {"e": 3, "h": 128, "i": 128, "q": 6}, 2)
    said = moeglot.plan(source, f"deepseek-v3/hub+{target}").config["quantization_config"]
    names = [f"model.layers.{n}.{name}" for n in range(2) for name in ("self_attn.fused_qkv_a_proj_with_mqa", "mlp.shared_experts.gate_up_proj")]
    if target == "fp8-block":
        assert not set(names) & set(said["modules_to_not_convert"])
        assert all(leaves_alone(said, f"model.layers.1.self_attn.{name}") for name in ("q_a_proj", "kv_a_proj_with_mqa"))
        return
    assert all(skipped_by_servers(said, name) for name in names)
    assert not skipped_by_servers(said, "model.layers.1.self_attn.qkv_proj")
    assert not any(skipped_by_servers(said, f"model.layers.{n}.mlp.experts") for n in range(2))


@pytest.mark.parametrize("target", ["awq", "gptq"])
def test_one_matrix_of_each_expert_that_is_left_alone(target, tmp_path):
    """What holds the experts is not, so that it is not named; each is."""
    alone = re.compile(r".*layers\.1\..*down_proj")
    where, meant = folder(tmp_path / "in", GPTQ | {"dynamic": {f"-:{alone.pattern}.*": {}}}, layers=2)
    given, plain = load_file(where / "model.safetensors"), load_file(write_checkpoint(tmp_path / "plain", HUB, SIZES, 2) / "model.safetensors")
    kept = {name: tensor for name, tensor in plain.items() if alone.match(name)}
    assert len(kept) == SIZES["e"]
    save_file({name: one for name, one in given.items() if not alone.match(name)} | kept, where / "model.safetensors", {"format": "pt"})
    moeglot.convert(where, f"{HUB}+awq", tmp_path / "awq", allow_loss=True)
    if target == "gptq":
        moeglot.convert(tmp_path / "awq", f"{HUB}+gptq", tmp_path / "gptq", allow_loss=True)
    assert agrees(tmp_path / target, meant | {name: one.float() for name, one in kept.items()})
    said = json.loads((tmp_path / target / "config.json").read_text())["quantization_config"]
    assert not any(skipped_by_servers(said, f"model.layers.{n}.mlp.experts") for n in range(2))
    named = [f"model.layers.{n}.mlp.experts.{e}.{role}_proj" for n in range(2) for e in range(3) for role in ("gate", "up", "down")]
    assert [name for name in named if skipped_by_servers(said, name)] == [f"model.layers.1.mlp.experts.{e}.down_proj" for e in range(3)]


def test_awq_in_its_older_words(tmp_path):
    where, meant = folder(tmp_path / "in", OLD_AWQ | {"quant_method": "awq"}, awq=True, symmetric=False)
    assert agrees(where, meant)
    where, _ = folder(tmp_path / "3 bits", OLD_AWQ | {"quant_method": "awq", "w_bit": 3}, awq=True, symmetric=False)
    with pytest.raises(UnknownFormat, match="'w_bit': 3, 'q_group_size': 32, 'zero_point': True, 'version': 'GEMM'"):
        moeglot.open(where)


@pytest.mark.parametrize(
    ("said", "rule"),
    [
        (GPTQ, {"sym": False}),
        (GPTQ | {"sym": False}, {"checkpoint_format": "gptq_v2"}),
        (GPTQ, {"desc_act": True}),
        (GPTQ, {"bits": 8}),
        (AUTO_ROUND, {"sym": False}),
    ],
    ids=str,
)
def test_an_expert_that_is_coded_otherwise_is_told_as_such(said, rule, tmp_path):
    """Not as a damaged file: a rule of quantization_config says it."""
    module = "model.layers.0.mlp.experts.2.down_proj"
    how = {"symmetric": rule.get("sym", said["sym"]), "less": "checkpoint_format" not in rule, "shuffled": "desc_act" in rule, "bits": rule.get("bits", 4)}
    rules = {"dynamic": {"+:" + module: rule}} if said is not AUTO_ROUND else {"extra_config": {module: rule}}
    where, _ = folder(tmp_path / "in", said | rules, symmetric=said["sym"], unlike=lambda name: how if name.startswith(module) else {})
    with pytest.raises(TensorMismatch, match=r"experts\.2\.down_proj: quantization_config says that it is .*, and \S+experts\.0\.down_proj ") as refused:
        moeglot.open(where)
    assert "experts of a layer are stored alike" in refused.value.known
    assert "fetch" not in refused.value.do


def test_which_rules_can_tell_experts_apart():
    """Those of other modules are not asked for each expert: there may be as many as modules."""
    holder = "model.layers.1.mlp.experts"
    named = [r"+:.*\.2\.down_proj", r"-:model\.layers\.1\.mlp\.experts\.2\.(up|gate)_proj", "model.layers.1.*", "+:model.layers.[12].*", "lm_head|.*2.up_proj"]
    others = [r"-:model\.layers\.0\.mlp\.experts\.2\.", "model.layers.1.self_attn.q_proj", r"-:model\.layers\.11\..*"]
    found = telling_apart({"quant_method": "gptq", "dynamic": {pattern: {} for pattern in [*named, *others]}}, holder)
    assert found["dynamic"].keys() == {*named}
    assert telling_apart({"quant_method": "gptq", "dynamic": {"+:.*down_proj": {"bits": 8}}}, holder) is None


@pytest.mark.parametrize(("said", "awq"), [(GPTQ, False), (AWQ, True), (AUTO_ROUND, False)], ids=["gptq", "awq", "auto-round"])
def test_stacked_experts_that_were_left_alone(said, awq, tmp_path):
    """They are no Linear modules; one by one they are, and each is then named as left alone."""
    where, _ = folder(tmp_path / "in", said, layout="qwen3-moe/transformers-5", coded="self_attn", awq=awq, symmetric=not awq)
    moeglot.convert(where, HUB, tmp_path / "out")
    assert moeglot.compare(where, tmp_path / "out").verdict == "holds"
    save_file(load_file(tmp_path / "out" / "model.safetensors"), tmp_path / "out" / "model.safetensors", {"format": "pt"})  # without our mark
    found = moeglot.open(tmp_path / "out")
    assert found.format.name == HUB
    declared = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    names = ["model.layers.0.mlp.experts.2.up_proj", "model.layers.0.self_attn.q_proj"]
    assert [leaves_alone(declared, name) for name in names] == [True, False]
    if said is not AUTO_ROUND:
        assert skipped_by_servers(declared, "model.layers.0.mlp.experts")
    moeglot.convert(tmp_path / "out", "qwen3-moe/transformers-5", tmp_path / "back")
    assert moeglot.compare(where, tmp_path / "back").verdict == "holds"


@pytest.mark.parametrize("said", [GPTQ, AWQ], ids=["gptq", "awq"])
def test_what_is_left_alone_comes_before_the_rules_that_are_there(said):
    """GPTQModel takes the first that names a module."""
    told = sparing(said | {"dynamic": {"+:.*experts.*": {"bits": 4}}}, "modules_to_not_convert", ["model.layers.0.mlp.experts"])
    assert skipped_by_servers(told, "model.layers.0.mlp.experts")
    assert next(iter(told["dynamic"])).startswith("-:")
    assert leaves_alone(told, "model.layers.0.mlp.experts.1.up_proj")


@pytest.mark.parametrize(
    ("source", "target", "told"),
    [
        ("floats", "gptq", {"sym": True, "checkpoint_format": "gptq", "desc_act": False}),
        ("floats", "awq", {"version": "gemm", "zero_point": True}),
        ("floats", "auto-round", {"sym": True, "packing_format": "auto_round:auto_gptq"}),
        ("zero points", "gptq", {"sym": False, "checkpoint_format": "gptq_v2"}),
        ("zero points", "awq", {"version": "gemm", "zero_point": True}),
        ("zero points", "auto-round", {"sym": False, "packing_format": "auto_round:gptqmodel"}),
    ],
)
def test_what_docs_formats_says_that_servers_read_is_what_is_written(source, target, told, tmp_path):
    where = write_checkpoint(tmp_path / "plain", HUB, SIZES | {"h": 128, "i": 128}, 1)
    if source == "zero points":
        where, _ = folder(tmp_path / "in", AWQ, awq=True, symmetric=False)
    said = moeglot.plan(where, f"{HUB}+{target}").config["quantization_config"]
    assert {key: said[key] for key in told} == told
