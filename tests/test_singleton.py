"""torch_dist checkpoints in which each expert keeps its number and gate is cut from up: what torch finds in ours, and what is refused of others'."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import told
from reading import read_dist
from refusing import refused
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint, write_dense_first
from torch.distributed.checkpoint import FileSystemReader, save

import moeglot
from moeglot import BrokenFile, TensorMismatch, UnknownFormat
from moeglot.files.shards import Slot
from moeglot.files.torch_dist import writing
from moeglot.files.torch_dist.keys import Stack
from moeglot.files.torch_dist.writing import plan_files

HUB, TARGET = "deepseek-v3/hub", "deepseek-v3/megatron-torch-dist-singleton"
EXPERT = "decoder.layers.{}.mlp.experts.experts.{}."


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense_first(tmp_path_factory.mktemp("singleton") / "hub")


@pytest.fixture(scope="module")
def written(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("singleton") / "out"
    assert moeglot.convert(hub, TARGET, out).report.verdict == "holds"
    return out


def rewritten(written: Path, tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    save(tensors, checkpoint_id=folder, no_dist=True)
    shutil.copy(written / "config.json", folder)
    return folder


def mlps(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The Hub's matrices of every MLP under the keys that they have there."""
    pairs = {"decoder.layers.0.mlp.": "model.layers.0.mlp."}
    for layer in (1, 2):
        pairs |= {EXPERT.format(layer, expert): f"model.layers.{layer}.mlp.experts.{expert}." for expert in range(4)}
        pairs[f"decoder.layers.{layer}.mlp.shared_experts."] = f"model.layers.{layer}.mlp.shared_experts."
    kinds = {"linear_fc1.weight_w": "gate_proj.weight", "linear_fc1.weight_v": "up_proj.weight", "linear_fc2.weight": "down_proj.weight"}
    return {here + key: tensors[there + name] for here, there in pairs.items() for key, name in kinds.items()}


@pytest.mark.parametrize("largest", [writing.LARGEST, 3000])
def test_gate_is_w_and_up_is_v_in_every_mlp(largest: int, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk each, or several where they are large, and none has rows of both."""
    monkeypatch.setattr(writing, "LARGEST", largest)
    moeglot.convert(hub, TARGET, tmp_path / "out")
    found, wanted = read_dist(tmp_path / "out"), mlps(load_file(hub / "model.safetensors"))
    assert {key for key in found if "linear_fc" in key and "layer_norm" not in key} == wanted.keys()
    assert [key for key, tensor in wanted.items() if not torch.equal(found[key], tensor)] == []
    chunks = FileSystemReader(tmp_path / "out").read_metadata().state_dict_metadata[EXPERT.format(1, 0) + "linear_fc1.weight_v"].chunks
    assert [(one.offsets[0], one.sizes[0]) for one in chunks] == ([(0, 64)] if largest > 3000 else [(0, 23), (23, 23), (46, 18)])
    moeglot.convert(tmp_path / "out", HUB, tmp_path / "back")
    again, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", hub))
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())


def test_interleaved_biases_are_cut_too(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "gpt-oss/transformers")
    moeglot.convert(source, "gpt-oss/megatron-torch-dist-singleton-local", tmp_path / "out")
    found, before = read_dist(tmp_path / "out"), load_file(source / "model.safetensors")["model.layers.1.mlp.experts.gate_up_proj_bias"]
    assert torch.equal(found[EXPERT.format(1, 2) + "linear_fc1.bias_w"], before[2, ::2])
    assert torch.equal(found[EXPERT.format(1, 2) + "linear_fc1.bias_v"], before[2, 1::2])


def test_it_says_how_it_is_laid_out_and_keeps_to_it(hub: Path, written: Path, tmp_path: Path) -> None:
    """By common.pt to Megatron's loaders; to us by its keys, and what is written without --to is laid out so again."""
    assert torch.load(written / "common.pt")["content_metadata"] == {"singleton_local_shards": True}
    objects = {key for key, one in FileSystemReader(written).read_metadata().state_dict_metadata.items() if not hasattr(one, "size")}
    assert {EXPERT.format(2, 3) + "linear_fc1._extra_state/shard_0_1", "decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1"} < objects
    assert all(key.endswith("/shard_0_1") for key in objects)
    found = told("inspect", written)
    assert found["format"] == TARGET
    assert ".metadata has a key for each expert" in found["evidence"]
    assert told("verify", written, "--against", hub)["verdict"] == "holds"
    assert moeglot.plan(written).target.name == TARGET
    moeglot.convert(written, TARGET.removesuffix("-singleton"), tmp_path / "numbered")
    assert moeglot.open(tmp_path / "numbered").format.name == TARGET.removesuffix("-singleton")
    assert "content_metadata" not in torch.load(tmp_path / "numbered" / "common.pt")
    moeglot.convert(tmp_path / "numbered", TARGET, tmp_path / "again")
    assert (tmp_path / "again" / "__0_0.distcp").read_bytes() == (written / "__0_0.distcp").read_bytes()


def test_up_in_the_place_of_gate_is_named(hub: Path, written: Path, tmp_path: Path) -> None:
    tensors = read_dist(written)
    changed = {key[:-2] + {"_w": "_v", "_v": "_w"}.get(key[-2:], key[-2:]) if "experts.experts." in key else key: one for key, one in tensors.items()}
    assert moeglot.verify(rewritten(written, tensors, tmp_path / "same"), hub).verdict == "holds"
    report = moeglot.verify(rewritten(written, changed, tmp_path / "swapped"), hub)
    forward = next(check for check in report.checks if check.level == "forward")
    assert report.exit_status == 1
    assert forward.figures["relative_error"] > 1000 * 1e-5
    assert "up before gate" in forward.detail


# --- what is refused -------------------------------------------------------------------------------------------------------------------


HALF = EXPERT.format(1, 2) + "linear_fc1.weight"


@pytest.mark.parametrize(
    ("key", "given", "wrong", "known"),
    [
        (f"{HALF}_v", None, "gate or up is missing", f"in two keys, and here is {HALF}_w BF16 [64, 64] alone"),
        (HALF, (128, 64), "stored twice, or gate and up differ", f"{HALF} BF16 [128, 64]"),
        (f"{HALF}_v", (32, 64), "stored twice, or gate and up differ", f"here are {HALF}_w BF16 [64, 64], {HALF}_v BF16 [32, 64]"),
    ],
)
def test_halves_that_make_no_matrix(key: str, given: tuple[int, ...] | None, wrong: str, known: str, written: Path, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in read_dist(written).items() if name != key}
    if given:
        tensors[key] = torch.zeros(given, dtype=torch.bfloat16)
    with refused(BrokenFile, f"{HALF}: {wrong}", known, "have Megatron save it again"):
        moeglot.open(rewritten(written, tensors, tmp_path / "broken"))


def test_rows_in_blocks(written: Path, tmp_path: Path) -> None:
    """Halves of a matrix whose rows lie in blocks are neither gate nor up, and no release that we know writes them."""
    shutil.copytree(written, tmp_path / "blocks")
    config = json.loads((written / "config.json").read_text())
    (tmp_path / "blocks" / "config.json").write_text(json.dumps(config | {"moe_mlp_glu_interleave_size": 32}))
    with refused(UnknownFormat, "in no format that moeglot knows", f"not {TARGET}: moe_mlp_glu_interleave_size is 32, not None", "moeglot formats"):
        moeglot.open(tmp_path / "blocks")


@pytest.mark.parametrize("target", [TARGET, "deepseek-v3/megatron-torch-dist", "deepseek-v3/megatron-te"])
@pytest.mark.parametrize(
    ("name", "which"),
    [("model.layers.0.input_layernorm.weight", "layer 1 has it"), ("model.layers.2.mlp.shared_experts.down_proj.weight", "every layer with experts")],
)
def test_what_one_layer_lacks_is_named(target: str, name: str, which: str, hub: Path, tmp_path: Path) -> None:
    """No key of a checkpoint that numbers its layers shows it."""
    tensors = load_file(hub / "model.safetensors")
    del tensors[name]
    shutil.copytree(hub, tmp_path / "lacking")
    save_file(tensors, tmp_path / "lacking" / "model.safetensors", {"format": "pt"})
    with pytest.raises(TensorMismatch, match=f"{name}: missing") as error:
        moeglot.plan(tmp_path / "lacking", target)
    assert which in str(error.value)
    assert error.value.do == "fetch the missing shard"


def test_a_stacked_place_that_nothing_takes() -> None:
    slots = [Slot(EXPERT.format(0, expert) + "linear_fc2.weight", "BF16", (4, 4)) for expert in (0, 2)]
    assert len(plan_files(slots, 1000, Stack(1, experts=False, layers=False), ())) == 1
    with refused(TensorMismatch, "nothing for layer and expert (0, 1)", "the first axes of one tensor", "fetch the missing shard"):
        plan_files(slots, 1000, Stack(1), ())
