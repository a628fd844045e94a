"""Outputs that this program itself writes wrong: its own proof fails, each part of it by itself, and the output never gets its name."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from adapters import WRITERS, Job
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint

import moeglot
from moeglot.conversion import stream
from moeglot.conversion.convert import carry_out
from moeglot.errors import LossRefused, NotVerified
from moeglot.planning import merging
from moeglot.planning.merging import Change
from moeglot.planning.steps import DenseUnit, ExpertUnit
from moeglot.verification import beside, certificate

SIZES = {"e": 4, "h": 64, "i": 64}


def to_a_neighbour(value: torch.Tensor) -> torch.Tensor:
    """One number becomes the next of its type."""
    changed = value.clone()
    changed.view(-1).view(torch.int16 if value.element_size() == 2 else torch.int32)[5] ^= 1
    return changed


def turned(value: torch.Tensor) -> torch.Tensor:
    return value.mT.contiguous()


def spoil(patch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor], *makers: object, kind: type = ExpertUnit) -> None:
    """What is made of every expert's matrix, or of every other tensor, is made wrong: where it is written, or where it is made again for the proof as well."""
    for maker in makers:
        make = maker.make

        def wrong(plan, unit, make=make):
            parts, loss = make(plan, unit)
            return ({name: change(part) for name, part in parts.items()} if isinstance(unit, kind) else parts), loss

        patch.setattr(maker, "make", wrong)


def refused(out, told: str, convert: Callable[[], object]) -> None:
    with pytest.raises(NotVerified, match=told):
        convert()
    assert not out.exists()


def test_numbers_that_are_moved(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "source", "qwen3-moe/hub", SIZES, layers=1)
    spoil(monkeypatch, to_a_neighbour, stream)
    refused(tmp_path / "out", "does not hold: values", lambda: moeglot.convert(source, "qwen3-moe/transformers-5", tmp_path / "out"))


def test_tensors_that_are_no_experts(tmp_path, monkeypatch):
    """No expert computes with them, and all other checks hold."""
    source = write_checkpoint(tmp_path / "source", "qwen3-moe/hub", SIZES, layers=1)
    spoil(monkeypatch, to_a_neighbour, stream, kind=DenseUnit)
    told = r"does not hold: values: (\d+) of \1 differ, first "
    refused(tmp_path / "out", told, lambda: moeglot.convert(source, "qwen3-moe/transformers-5", tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "makers"), [(to_a_neighbour, (stream,)), (turned, (stream, certificate))], ids=["beyond rounding", "an axis hidden in the rounding"]
)
def test_numbers_that_are_rounded(change, makers, tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "source", "qwen3-moe/hub", SIZES, layers=1, dtype=torch.float32)
    spoil(monkeypatch, change, *makers)
    told = "values: off the source as bfloat16 rounds it"
    refused(tmp_path / "out", told, lambda: moeglot.convert(source, "qwen3-moe/hub", tmp_path / "out", encode="bf16", allow_loss=True))


def test_a_quiet_expert_that_is_rounded_beside_loud_ones(tmp_path, monkeypatch):
    """It is turned where it is written and where it is made again; among the loud ones it would not show."""
    source = write_checkpoint(tmp_path / "source", "qwen3-moe/hub", SIZES, layers=1, dtype=torch.float32)
    tensors = load_file(source / "model.safetensors")
    tensors |= {name: tensor * 1e-4 for name, tensor in tensors.items() if ".experts.3." in name}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    spoil(monkeypatch, lambda value: turned(value) if value.abs().max() < 1e-3 else value, stream, certificate)
    told = "values: off the source as bfloat16 rounds it by 0; .*expert 3"
    refused(tmp_path / "out", told, lambda: moeglot.convert(source, "qwen3-moe/hub", tmp_path / "out", encode="bf16", allow_loss=True))


def test_a_config_that_computes_something_else(tmp_path):
    source = write_checkpoint(tmp_path / "source", "qwen3-moe/hub", SIZES, layers=1)
    plan = moeglot.plan(source, "qwen3-moe/transformers-5")
    told = "does not hold: structure: num_experts_per_tok is 3, there 2"
    refused(tmp_path / "out", told, lambda: carry_out(replace(plan, config={**plan.config, "num_experts_per_tok": 3}), tmp_path / "out"))


@pytest.mark.parametrize("told", ["while writing it was", "further off than rounding explains"])
def test_a_change_that_is_merged(told, tmp_path, monkeypatch):
    """What was written is what the proof makes again: what is in the matrices tells, and so does what the experts compute, each without the other."""
    base = moeglot.open(write_checkpoint(tmp_path / "base", "qwen3-moe/hub", SIZES, layers=1))
    adapter = moeglot.open_adapter(WRITERS["PEFT"][2](Job("qwen3-moe", 4, 64, 64, 3, layers=1)).save(tmp_path / "adapter"), base, "peft")
    spoil(monkeypatch, turned, stream, certificate)
    if told.startswith("further"):
        monkeypatch.setattr(beside, "AGREEMENT", float("inf"))
    refused(tmp_path / "out", told, lambda: moeglot.merge(base, adapter, tmp_path / "out"))


def test_a_change_of_one_expert_that_is_next_to_nothing_among_all(tmp_path, monkeypatch):
    """Half of it is added, where it is written and where it is made again; to the sum over all experts, and to what rounding does, it is too small to show."""
    base = moeglot.open(write_checkpoint(tmp_path / "base", "qwen3-moe/hub", SIZES, layers=1))
    made = WRITERS["vLLM's keys"][2](Job("qwen3-moe", 4, 64, 64, 3, layers=1))
    for key in made.tensors:
        if "lora_B" in key:
            made.tensors[key] = made.tensors[key] * (0.003 if ".experts.2." in key else 0.3)
    adapter = moeglot.open_adapter(made.save(tmp_path / "adapter"), base)
    piece = Change._piece

    def half(change, layer, role, expert, *rest):
        found = piece(change, layer, role, expert, *rest)
        return replace(found, left=found.left / 2) if expert == 2 else found

    monkeypatch.setattr(Change, "_piece", half)
    told = r"expert 2, gate: .* of it is in the output; while writing it was .* \(3 of 12 matrices\)"
    refused(tmp_path / "out", told, lambda: moeglot.merge(base, adapter, tmp_path / "out", threshold=0))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [("half", "50.0% of it is in the output; while writing it was 100"), ("q", r"q_proj.*none of it was added"), ("o", r"o_proj.*none of it was added")],
)
def test_a_change_of_attention(wrong, told, tmp_path, monkeypatch):
    """Nothing is computed with it; what was written is what the proof makes again."""
    base = write_checkpoint(tmp_path / "base", "qwen3-moe/hub", SIZES, layers=1)
    (tmp_path / "adapter").mkdir()
    key = "base_model.model.model.layers.0.self_attn.{}_proj.lora_{}.weight"
    tensors = {key.format(name, of): torch.randn((4, 64) if of == "A" else (64, 4)) for name in "qo" for of in "AB"}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(said))
    piece, dense = merging._piece, Change.dense
    if wrong == "half":
        monkeypatch.setattr(merging, "_piece", lambda *of: replace(piece(*of), left=piece(*of).left / 2))
    else:
        monkeypatch.setattr(
            Change, "dense", lambda change, tensors: {**dense(change, tensors), (name := f"model.layers.0.self_attn.{wrong}_proj.weight"): tensors[name]}
        )
    refused(tmp_path / "out", told, lambda: moeglot.merge(base, tmp_path / "adapter", tmp_path / "out"))


def test_a_loss_that_no_sample_shows(tmp_path):
    """One number of an expert that is not among those that are tried before."""
    source = write_checkpoint(tmp_path / "source", "qwen3-moe/hub", SIZES, layers=1, dtype=torch.float32)
    tensors = {name: tensor.bfloat16().float() for name, tensor in load_file(source / "model.safetensors").items()}
    tensors["model.layers.0.mlp.experts.3.up_proj.weight"][2, 3] = 1 + 2**-20
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(LossRefused, match=r"layer 0, expert 3: to .* changes 1 of 4096 values"):
        moeglot.convert(source, "qwen3-moe/hub", tmp_path / "out", encode="bf16")
    assert not (tmp_path / "out").exists()
