"""LongCat with experts that leave a token as it is: the release has no tensors for them, and transformers 5's modules have rows of gate and up."""

import re

import families
import pytest
import torch
from devices import DEVICE
from reading import relative
from safetensors.torch import load_file, save_file

import moeglot
from moeglot.errors import UsageError
from moeglot.formats import FAMILIES
from moeglot.integrations.transformers import VERSION

FAMILY = next(family for family in FAMILIES if family.name == "longcat-flash")
IDLE = re.compile(r"experts\.[34]\.")


@pytest.fixture(params=families.SIZES)
def model(request, monkeypatch):
    monkeypatch.setitem(families.EXTRA, FAMILY.name, {**families.EXTRA[FAMILY.name], "zero_expert_num": 2})
    return families.model_of(FAMILY, request.param)


@pytest.fixture
def released(model, tmp_path):
    """What `save_pretrained` of 4.57 writes, and the producer: 5 writes gate and up of three experts and two more."""
    folder = tmp_path / "released"
    model.generation_config.do_sample = True  # else 4.57 finds the config's top_k strange
    found = families.saved(model, folder, True)
    assert any(map(IDLE.search, found)) == (VERSION >= (5, 0))
    save_file({key: tensor for key, tensor in found.items() if not IDLE.search(key)}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_it_is_loaded_as_released(model, released):
    """The reference has random numbers in the rows that nothing reads."""
    expected = families.logits(model)
    source = moeglot.open(released)
    assert (source.format.name, source.sizes["e"]) == ("longcat-flash/hub", 3)
    loaded = moeglot.load(source, "float32", DEVICE)
    assert relative(families.logits(loaded), expected) <= 1e-5
    if VERSION < (5, 0):
        assert relative(families.logits(type(model).from_pretrained(released, dtype=torch.float32)), expected) <= 1e-5
        return
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        type(model).from_pretrained(released)
    idle = [rows[3:] for name, rows in loaded.state_dict().items() if name.endswith("gate_up_proj")]
    assert len(idle) == 3
    assert not any(bool(rows.any()) for rows in idle)
    with pytest.raises(UsageError, match="has no module in a layout of longcat-flash"):
        moeglot.load(source, "float32", native=True)


def test_stacked_it_would_not_be_loaded(released, tmp_path):
    for to in ("longcat-flash/transformers-5", "longcat-flash/transformers-5+fp8-block"):
        with pytest.raises(UsageError, match=r"would not load longcat-flash/transformers-5.*\n.*zero_expert_num = 2.*\n.*--to longcat-flash/hub,"):
            moeglot.plan(released, to)
    assert moeglot.convert(released, "longcat-flash/hub", tmp_path / "out", encode="bfloat16", allow_loss=True).report.verdict == "holds"
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(released / "model.safetensors").keys()
