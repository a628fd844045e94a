"""Laws of the wrong readings: which there are of a checkpoint, and what each computes with, as plain torch makes it of the file's tensors."""

import json
from math import prod

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint

import moeglot
from moeglot.verification.misreadings import combined, misreadings, right

HUB = "qwen3-moe/hub"
ROLES = ("gate", "up", "down")
LAYERS = 2


def of(read, layer, expert, roles=ROLES):
    matrix = read(layer, expert)
    return {role: matrix(role).decode(torch.float32) for role in roles}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[role], b[role]) for role in a)


def places(checkpoint):
    return [(layer, expert) for layer in range(LAYERS) for expert in range(checkpoint.sizes["e"])]


@pytest.mark.parametrize("e", [1, 2, 3])
def test_of_one_matrix_each(e, tmp_path):
    folder = write_checkpoint(tmp_path / "a", HUB, {"e": e, "h": 16, "i": 16}, LAYERS)
    stored, checkpoint = load_file(folder / "model.safetensors"), moeglot.open(folder)

    def held(layer, expert):
        return {role: stored[f"model.layers.{layer}.mlp.experts.{expert}.{role}_proj.weight"].float() for role in ROLES}

    expected = {
        'gate_proj is read as "h i"': lambda layer, n: (one := held(layer, n)) | {"gate": one["gate"].T},
        'up_proj is read as "h i"': lambda layer, n: (one := held(layer, n)) | {"up": one["up"].T},
        'down_proj is read as "i h"': lambda layer, n: (one := held(layer, n)) | {"down": one["down"].T},
        "gate and up swapped": lambda layer, n: (one := held(layer, n)) | {"gate": one["up"], "up": one["gate"]},
    }
    expected |= {"experts rolled by 1": lambda layer, n: held(layer, (n + 1) % e)} if e > 1 else {}
    expected |= {"experts rolled by -1": lambda layer, n: held(layer, (n - 1) % e)} if e > 2 else {}
    found = {one.name: one for one in misreadings(checkpoint)}
    assert found.keys() == expected.keys()
    for layer, n in places(checkpoint):
        assert same({role: right(checkpoint, layer, n)(role).decode(torch.float32) for role in ROLES}, held(layer, n))
        assert all(same(of(one.read, layer, n), expected[name](layer, n)) for name, one in found.items())
    assert {one.line.short for one in found.values() if one.line} == {"gate_proj", "up_proj", "down_proj"}
    assert not any(one.scales for one in found.values())


def test_of_both_in_one_tensor_with_biases(tmp_path):
    """gpt-oss as transformers has it: gate and up take turns along the columns, and down stands in a square."""
    folder = write_checkpoint(tmp_path / "a", "gpt-oss/transformers", {"e": 2, "h": 16, "i": 16}, LAYERS)
    stored, checkpoint = load_file(folder / "model.safetensors"), moeglot.open(folder)
    roles = (*ROLES, "gate_bias", "up_bias", "down_bias")

    def held(layer, n):
        one = {
            name: stored[f"model.layers.{layer}.mlp.experts.{name}"][n].float() for name in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
        }
        both, bias = one["gate_up_proj"], one["gate_up_proj_bias"]
        right = {"gate": both[:, ::2].T, "up": both[:, 1::2].T, "down": one["down_proj"].T}
        return right | {"gate_bias": bias[::2], "up_bias": bias[1::2], "down_bias": one["down_proj_bias"]}, both.T, bias

    def apart(both, i=16):
        return {"(i p)": (both[::2], both[1::2]), "(p i)": (both[:i], both[i:])}

    found = {one.name: one for one in misreadings(checkpoint)}
    for layer, n in places(checkpoint):
        declared, both, bias = held(layer, n)
        expected = {}
        for what, axes, numbers, names in (("", "h ", both, ("gate", "up")), ("_bias", "", bias, ("gate_bias", "up_bias"))):
            for order, (first, second) in ((arranged, apart(numbers)[arranged]) for arranged in ("(i p)", "(p i)")):
                wrong = f'gate_up_proj{what} is read as "e {axes}{order}"'
                if order == "(p i)":
                    expected[wrong] = declared | dict(zip(names, (first, second), strict=True))
                expected[f"{wrong}, {names[1]} before {names[0]}"] = declared | dict(zip(names, (second, first), strict=True))
            expected[f"gate_up_proj{what} dropped"] = declared | {name: torch.zeros(16) for name in names}
        del expected["gate_up_proj dropped"]
        expected['down_proj is read as "e h i"'] = declared | {"down": declared["down"].T}
        expected["down_proj_bias dropped"] = declared | {"down_bias": torch.zeros(16)}
        expected["experts rolled by 1"] = held(layer, 1 - n)[0]
        assert found.keys() == expected.keys()
        assert all(same(of(one.read, layer, n, roles), expected[name]) for name, one in found.items())


def test_of_scales(tmp_path):
    """They multiply; the layer that is left alone has none, so that there is nothing to misread."""
    plain = write_checkpoint(tmp_path / "a", HUB, {"e": 2, "h": 128, "i": 128}, LAYERS)
    moeglot.convert(plain, f"{HUB}+fp8-block", tmp_path / "fp8", allow_loss=True)
    given, coded = load_file(plain / "model.safetensors"), load_file(tmp_path / "fp8" / "model.safetensors")
    mixed = {key: tensor for key, tensor in coded.items() if "layers.1.mlp.experts" not in key}
    save_file(mixed | {key: given[key] for key in given if "layers.1.mlp.experts" in key}, tmp_path / "fp8" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["model.layers.1.mlp.experts", "self_attn", "gate", "lm_head"]
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    checkpoint = moeglot.open(tmp_path / "fp8")
    found = {one.name: one for one in misreadings(checkpoint) if one.scales}
    assert found.keys() == {f"{role}_proj with inverted scales" for role in ROLES}
    turned = {one.name: one for one in misreadings(checkpoint)}['down_proj is read as "i h"']
    for layer, n in places(checkpoint):
        declared = of(lambda layer, n: right(checkpoint, layer, n), layer, n)
        assert same(of(turned.read, layer, n), declared | {"down": declared["down"].T})
        for role in ROLES:
            name = f"model.layers.{layer}.mlp.experts.{n}.{role}_proj.weight"
            expected = declared | ({role: coded[name].float() / coded[f"{name}_scale_inv"]} if layer == 0 else {})
            read = of(found[f"{role}_proj with inverted scales"].read, layer, n)
            assert all(torch.allclose(read[one], expected[one], rtol=1e-6) for one in ROLES)


def test_of_two_groups_of_experts(tmp_path):
    """Each group's gate is taken for its own up."""
    checkpoint = moeglot.open(write_checkpoint(tmp_path / "a", "ernie4-5-vl-moe/hub", {"e": 2, "h": 16, "i": 16, "j": 16}, LAYERS))
    roles = checkpoint.format.family.roles
    swapped = next(one for one in misreadings(checkpoint) if one.name == "gate and up swapped")
    declared = of(lambda layer, n: right(checkpoint, layer, n), 1, 1, roles)
    other = {role: role.replace("gate", "up") if "gate" in role else role.replace("up", "gate") for role in roles}
    assert len({role for role in roles if other[role] != role}) == 4
    assert same(of(swapped.read, 1, 1, roles), {role: declared[other[role]] for role in roles})


def test_several_at_once_fewest_first(tmp_path):
    checkpoint = moeglot.open(write_checkpoint(tmp_path / "a", HUB, {"e": 2, "h": 16, "i": 16}, LAYERS))
    single = {one.name: one for one in misreadings(checkpoint) if one.line}
    found = list(combined(checkpoint))
    counts = [len(one.name.split(" and ")) for one in found]
    assert counts == sorted(counts)
    assert len(found) == prod(2 for _ in single) - 1 - len(single)
    for one in found:
        parts = [single[name] for name in one.name.split(" and ")]
        expected = of(lambda layer, n: right(checkpoint, layer, n), 1, 1)
        for part in parts:
            expected |= {role: of(part.read, 1, 1)[role] for role in part.line.roles}
        assert same(of(one.read, 1, 1), expected)
