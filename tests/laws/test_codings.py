"""Laws of every coding: identified by what its producer writes, the same bytes through every layout, and never decoded on the way."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint

import moeglot
from moeglot.codings import CODINGS
from moeglot.convert import carry_out
from moeglot.errors import LossRefused
from moeglot.formats import by_name
from moeglot.units import estimate

LAYOUTS = ("qwen3-moe/hub", "qwen3-moe/transformers-5")
SIZES = {"square": (4, 128, 128), "h=2i": (2, 256, 128), "2h=i": (2, 128, 256)}


@pytest.fixture(params=SIZES, ids=list(SIZES))
def sizes(request):
    return dict(zip("ehi", SIZES[request.param], strict=True))


def without_marks(folder):
    """As another producer would have written it."""
    for path in folder.glob("*.safetensors"):
        save_file(load_file(path), path, {"format": "pt"})


def coded(tmp_path, layout, coding, sizes):
    """A checkpoint of trained-like numbers, coded by us, unmarked."""
    write_checkpoint(tmp_path / "plain", layout, sizes, 1)
    moeglot.convert(tmp_path / "plain", f"{layout}+{coding.name}", tmp_path / "coded", allow_loss=True)
    without_marks(tmp_path / "coded")
    return tmp_path / "coded"


def tensors(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def differing(a, b):
    x, y = tensors(a), tensors(b)
    assert x.keys() == y.keys()
    return [
        name for name in x if x[name].dtype != y[name].dtype or not torch.equal(x[name].reshape(-1).view(torch.uint8), y[name].reshape(-1).view(torch.uint8))
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("coding", CODINGS, ids=[c.name for c in CODINGS])
def test_it_is_identified_and_returns_as_it_is(coding, layout, sizes, tmp_path):
    source = coded(tmp_path, layout, coding, sizes)
    found = moeglot.identify(source)
    assert found.format
    assert found.format.name == f"{layout}+{coding.name}", found
    moeglot.convert(source, found.format.name, tmp_path / "again")
    assert differing(source, tmp_path / "again") == []
    assert (
        json.loads((source / "config.json").read_text())["quantization_config"]
        == json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    )


@pytest.mark.parametrize("coding", [c for c in CODINGS if not any(part.flat for part in c.encoding.parts)], ids=lambda c: c.name)
def test_one_by_one_and_stacked_are_repacked_without_a_decode(coding, sizes, tmp_path):
    source = coded(tmp_path, LAYOUTS[0], coding, sizes)
    there = moeglot.plan(source, f"{LAYOUTS[1]}+{coding.name}")
    assert all(step.moves_codes for step in there.steps)
    assert carry_out(there, tmp_path / "stacked").report.verdict == "holds"
    without_marks(tmp_path / "stacked")
    assert moeglot.convert(tmp_path / "stacked", f"{LAYOUTS[0]}+{coding.name}", tmp_path / "back").report.verdict == "holds"
    assert differing(source, tmp_path / "back") == []


@pytest.mark.parametrize("coding", CODINGS, ids=[c.name for c in CODINGS])
def test_decoded_to_float32_it_returns(coding, sizes, tmp_path):
    """float32 holds what every encoding decodes to; encoded again, the values are the same, and the bytes wherever values determine them."""
    source = coded(tmp_path, LAYOUTS[0], coding, sizes)
    moeglot.convert(source, LAYOUTS[0], tmp_path / "float32", encode="float32")
    back = moeglot.convert(tmp_path / "float32", f"{LAYOUTS[0]}+{coding.name}", tmp_path / "back")
    assert back.report.verdict == "holds"
    assert moeglot.compare(source, tmp_path / "back").verdict == "holds"


def test_a_loss_is_stated_before_and_after(tmp_path):
    write_checkpoint(tmp_path / "plain", LAYOUTS[0], {"e": 4, "h": 128, "i": 128}, 1)
    plan = estimate(moeglot.plan(tmp_path / "plain", LAYOUTS[0], encode="fp8-block"))
    assert plan.target.name == f"{LAYOUTS[0]}+fp8-block"
    (expected,) = plan.expected_error.values()
    with pytest.raises(LossRefused, match="relative error"):
        moeglot.convert(tmp_path / "plain", LAYOUTS[0], tmp_path / "out", encode="fp8-block")
    certificate = moeglot.convert(tmp_path / "plain", LAYOUTS[0], tmp_path / "out", encode="fp8-block", allow_loss=True)
    (loss,) = certificate.losses.values()
    assert 0.01 < loss.relative < 0.05
    assert abs(expected / loss.relative - 1) < 0.2


def test_the_block_size_is_what_config_says(tmp_path):
    """192 rows have two scales under 128 and under 96: a shape cannot tell, config.json must."""
    write_checkpoint(tmp_path / "plain", LAYOUTS[0], {"e": 2, "h": 192, "i": 192}, 1)
    moeglot.convert(tmp_path / "plain", f"{LAYOUTS[0]}+fp8-block", tmp_path / "coded", allow_loss=True)
    without_marks(tmp_path / "coded")
    told = json.loads((tmp_path / "coded" / "config.json").read_text())
    right = moeglot.open(tmp_path / "coded").experts(0)["up"][0].decode(torch.float32)
    told["quantization_config"]["weight_block_size"] = [96, 96]
    (tmp_path / "coded" / "config.json").write_text(json.dumps(told))
    wrong = moeglot.open(tmp_path / "coded").experts(0)["up"][0].decode(torch.float32)
    assert float((wrong - right).norm() / right.norm()) > 1e-3
    told["quantization_config"].pop("weight_block_size")
    (tmp_path / "coded" / "config.json").write_text(json.dumps(told))
    with pytest.raises(moeglot.MoeglotError, match="quantization_config"):
        moeglot.open(tmp_path / "coded")


def test_every_coding_has_a_format_of_every_plain_layout():
    assert by_name("qwen3-moe/hub+fp8-block").coding in CODINGS
