"""What `moeglot.save` does not write of a model whose experts stay encoded: an adapter beside them, placeholders, a part of them."""

from pathlib import Path

import pytest
import torch

import moeglot
from moeglot.demo import BUNDLED
from moeglot.errors import NotVerified, UsageError
from moeglot.nn import add_lora, experts_of, remove_lora


@pytest.fixture
def native():
    return moeglot.load(BUNDLED, native=True)


def refused(model: torch.nn.Module, words: str, out: Path, error: type[Exception] = UsageError) -> None:
    with pytest.raises(error, match=words) as told:
        moeglot.save(model, out, to="gpt-oss/transformers")
    assert len(str(told.value).split("\n")) == 3
    assert not out.exists()


def test_an_adapter_is_merged_first(native, tmp_path):
    add_lora(native, r=2)
    refused(native, "not merged(.|\n)*save_adapter(.|\n)*moeglot merge", tmp_path / "out")
    remove_lora(native)
    assert moeglot.save(native, tmp_path / "out", to="gpt-oss/transformers").report.verdict == "holds"


def test_pefts_adapter_too(native, tmp_path):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(native, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for model in (wrapped, wrapped.get_base_model()):
        refused(model, "not merged(.|\n)*moeglot merge", tmp_path / "out")
    assert moeglot.save(wrapped.merge_and_unload(), tmp_path / "out", to="gpt-oss/transformers").report.verdict == "holds"


def test_without_numbers(native, tmp_path):
    native.lm_head.to("meta")
    refused(native, "placeholder", tmp_path / "out", NotVerified)
    again = moeglot.load(BUNDLED, native=True)
    next(iter(experts_of(again).values())).to("meta")
    refused(again, "experts.*placeholder", tmp_path / "out", NotVerified)


def test_a_part_of_the_experts_is_no_model(native, tmp_path):
    for module in experts_of(native).values():
        layer = module.layer
        some = type(module).of(moeglot.open(BUNDLED), layer, experts=range(2))
        native.model.layers[layer].mlp.experts = some
        refused(native, "nobody says", tmp_path / "out")
        some.form, some.beside = module.form, module.beside
        refused(native, "divided among processes", tmp_path / "out")
        native.model.layers[layer].mlp.experts = module
