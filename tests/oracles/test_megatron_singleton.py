"""Megatron-Core with `singleton_local_shards`: what it asks of a checkpoint, key by key, is what we write, and it computes transformers' logits from it.

No launch is told the layout: the model is asked for what common.pt says (`load_content_metadata`), as trainers do.
"""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

import torch
from safetensors.torch import load_file, save_file
from test_megatron import HUB, LIMIT, WHOLE_QUERIES, apart, hub_logits, hub_model, megatron, written
from torch.distributed.checkpoint import FileSystemReader

import moeglot
from moeglot.files.shards import tensor_bytes

CASES = [
    ("gpt-oss", "h=i", 1, {}),
    ("gpt-oss", "h=2i", 2, {}),
    ("qwen3-moe", "h=i", 2, {}),
    ("qwen3-moe", "neither", 1, {}),
    ("mixtral", "h=2i", 1, {}),
    ("deepseek-v3", "neither", 2, {}),
    ("deepseek-v3", "h=2i", 1, WHOLE_QUERIES),
]
"""Family, sizes, on how many processes the experts lie, and what else its config says."""
LOCAL, ENGINE = "megatron-torch-dist-singleton-local", "megatron-torch-dist-singleton"


def described(folder: Path) -> dict[str, tuple[list[int], torch.dtype] | None]:
    """Every key of a checkpoint by torch's own reader -> shape and dtype, None for an object."""
    found = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {key: ([*one.size], one.properties.dtype) if hasattr(one, "size") else None for key, one in found.items()}


def in_float32(folder: Path) -> Path:
    """The same numbers in the type in which Megatron has its own here."""
    save_file({name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def of_mxfp4(folder: Path, out: Path) -> tuple[Path, Path]:
    """gpt-oss as it is released, and what that decodes to in BF16."""
    moeglot.convert(folder, "gpt-oss/openai", out / "mxfp4", allow_loss=True)
    moeglot.convert(out / "mxfp4", "gpt-oss/transformers", out / "bf16")
    return out / "mxfp4", out / "bf16"


@pytest.mark.parametrize(("family", "size", "processes", "more"), CASES)
def test_megatron_loads_it_strictly_and_saves_the_same_keys(family: str, size: str, processes: int, more: dict[str, None], tmp_path: Path) -> None:
    hub = hub_model(tmp_path / "hub", family, size, **more)
    given, source = of_mxfp4(hub, tmp_path) if family == "gpt-oss" else (in_float32(hub), hub)
    out = written(given, family, tmp_path / "out", LOCAL)
    if given != source:
        other = written(source, family, tmp_path / "other", LOCAL)
        assert (other / "__0_0.distcp").read_bytes() == (out / "__0_0.distcp").read_bytes()
        in_float32(source)
    assert apart(megatron(out, "--save", tmp_path / "saved", processes=processes), hub_logits(source)) <= LIMIT
    own = written(source, family, tmp_path / "own", LOCAL)
    assert described(tmp_path / "saved") == described(own)
    shutil.copy(own / "config.json", tmp_path / "saved")
    saved = moeglot.open(tmp_path / "saved")
    assert saved.format.name == f"{family}/{LOCAL}"
    report = moeglot.verify(saved, source)
    assert report.verdict == "holds", report
    moeglot.convert(saved, HUB[family], tmp_path / "back")
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", source))
    assert mine.keys() == theirs.keys()
    assert [name for name in theirs if tensor_bytes(mine[name]) != tensor_bytes(theirs[name])] == []


@pytest.mark.parametrize(("family", "options"), [("qwen3-moe", ("--grouped",)), ("deepseek-v3", ())])
def test_by_the_names_of_transformer_engine_and_as_the_legacy_grouped_mlp(family: str, options: tuple[str, ...], tmp_path: Path) -> None:
    source = hub_model(tmp_path / "hub", family, "h=2i")
    out = written(source, family, tmp_path / "out", ENGINE)
    assert apart(megatron(out, "--te-names", *options), hub_logits(source)) <= LIMIT


def swap_halves(folder: Path, part: str) -> int:
    """What is said to be gate is up, in all keys with `part` in them; how many there are."""
    said = FileSystemReader(folder).read_metadata()
    places = {(index.fqn, tuple(index.offset or ())): (index, place) for index, place in said.storage_data.items()}
    swapped = 0
    for (key, offset), (index, place) in places.items():
        if key.endswith("_w") and part in key:
            other, elsewhere = places[key[:-1] + "v", offset]
            said.storage_data[index], said.storage_data[other] = elsewhere, place
            swapped += 1
    (folder / ".metadata").write_bytes(pickle.dumps(said))
    return swapped


@pytest.mark.parametrize(
    ("family", "part", "count"), [("gpt-oss", "experts.experts.", 16), ("deepseek-v3", "0.mlp.linear_fc1.", 1), ("deepseek-v3", "shared_", 2)]
)
def test_the_comparison_can_fail(family: str, part: str, count: int, tmp_path: Path) -> None:
    """Up in the place of gate: in the experts, in the layer that has none, in the experts that all tokens share."""
    source = hub_model(tmp_path / "hub", family, "h=i")
    out = written(source, family, tmp_path / "out", LOCAL)
    assert swap_halves(out, part) == count
    assert apart(megatron(out), hub_logits(source)) > 1000 * LIMIT


@pytest.mark.parametrize(("name", "layout", "missing"), [("megatron-torch-dist-local", "single", "weight_w"), (LOCAL, "stacked", r"linear_fc1\.weight")])
def test_another_layout_is_an_error_there(name: str, layout: str, missing: str, tmp_path: Path) -> None:
    out = written(hub_model(tmp_path / "hub", "qwen3-moe", "h=2i"), "qwen3-moe", tmp_path / "out", name)
    with pytest.raises(AssertionError, match=missing):
        megatron(out, "--layout", layout)
