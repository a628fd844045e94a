"""Every way in which we refuse: a small real checkpoint, damaged in one way, and the three lines that its owner then reads."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refusing import Words, refused
from safetensors.torch import load_file, save_file
from synthetic import tensors, write_checkpoint

import moeglot
from moeglot import (
    AmbiguousFormat,
    BadNumbers,
    BrokenFile,
    CheckpointError,
    Contradiction,
    MoeglotError,
    NoSpace,
    OutputExists,
    PickleRefused,
    TensorMismatch,
    UnknownFormat,
    UsageError,
)
from moeglot.files.shards import Entry
from moeglot.format import Format
from moeglot.formats import PLAIN, by_name

IDENTIFY = importlib.import_module("moeglot.checkpoints.identify")  # the package has a function of that name
GPT_OSS = "model.layers.{}.mlp.experts."
TURNED = {"h": 128, "i": 64}
"""Sizes with which a shape does refute a wrong orientation."""


@contextmanager
def edited(folder: Path, file: str = "model.safetensors") -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of a file, to be changed; then they are saved again."""
    found = {key: tensor.clone() for key, tensor in load_file(folder / file).items()}
    yield found
    save_file({key: tensor.contiguous() for key, tensor in found.items()}, folder / file, {"format": "pt"})


@contextmanager
def edited_json(path: Path) -> Iterator[dict[str, Any]]:
    found = json.loads(path.read_text())
    yield found
    path.write_text(json.dumps(found))


def everything(folder: Path) -> dict[str, tuple[object, ...]]:
    """Path -> what is there: kind, time of change, content."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        content = os.readlink(path) if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        found[str(path.relative_to(folder))] = (path.is_symlink(), path.is_dir(), path.lstat().st_mtime_ns, content)
    return found


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    before = everything(folder)
    yield
    assert everything(folder) == before


# --- which format ----------------------------------------------------------------------------------------------------------------------


def _rival(name: str, gate_up: str, down: str) -> Format:
    """Another producer who uses the very keys of gpt-oss/transformers, for other axes."""
    form = by_name("gpt-oss/transformers")
    lines = {"gate_up_proj": gate_up, "down_proj": down}
    return replace(form.holding(tuple(replace(line, axes=lines.get(line.key.split(".")[-1], line.axes)) for line in form.stored)), name=name)


@pytest.mark.parametrize(
    ("sizes", "gate_up", "down"),
    [
        pytest.param({}, "e h (p i)", "e h i", id="gate and up in halves, down turned, h = i"),
        pytest.param({"h": 128, "i": 64}, "e (i p) h", "e i h", id="gate and up turned, h = 2i"),
        pytest.param({"h": 32, "i": 64}, "e h (p i)", "e i h", id="gate and up in halves, whatever the sizes"),
    ],
)
def test_two_formats_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], gate_up: str, down: str) -> None:
    """Shapes refute neither, so neither is chosen; the user may say which."""
    monkeypatch.setattr(IDENTIFY, "PLAIN", (*PLAIN, _rival("gpt-oss/rival", gate_up, down)))
    write_checkpoint(tmp_path / "m", "gpt-oss/transformers", sizes)
    with refused(
        AmbiguousFormat,
        "the format is gpt-oss/transformers or gpt-oss/rival",
        ("neither config.json, key names nor dtypes decide", "model_type = gpt_oss"),
        ("ask its producer", "--format gpt-oss/transformers"),
    ):
        moeglot.open(tmp_path / "m")
    assert moeglot.open(tmp_path / "m", "gpt-oss/transformers").format == by_name("gpt-oss/transformers")


def test_a_shape_refutes_the_rival(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the test above could pass for any reason."""
    monkeypatch.setattr(IDENTIFY, "PLAIN", (*PLAIN, _rival("gpt-oss/rival", "e (i p) h", "e h i")))
    write_checkpoint(tmp_path / "m", "gpt-oss/transformers")
    assert moeglot.open(tmp_path / "m").format == by_name("gpt-oss/transformers")


def test_experts_stored_in_two_formats(tmp_path: Path) -> None:
    """Blocks beside floats, and nothing in config.json that says which of them count."""
    write_checkpoint(tmp_path / "m", "gpt-oss/transformers")
    with edited(tmp_path / "m") as found:
        found |= tensors(by_name("gpt-oss/openai"))
    with refused(AmbiguousFormat, "gpt-oss/openai or gpt-oss/transformers", "config.json", "--format gpt-oss/openai"):
        moeglot.open(tmp_path / "m")


def test_no_format_fits(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", "qwen3-moe/hub")
    with edited_json(tmp_path / "m" / "config.json") as config:
        config["model_type"] = "deepseek_v9"
    known = ("model_type = deepseek_v9", "known model types: gpt_oss")
    with refused(UnknownFormat, "a family that moeglot does not know", known, "pass --format"):
        moeglot.open(tmp_path / "m")


def test_no_config(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", "qwen3-moe/hub")
    (tmp_path / "m" / "config.json").unlink()
    with refused(UnknownFormat, "there is no config.json", "how large it is", "put the producer's config.json beside the tensors"):
        moeglot.open(tmp_path / "m")


def test_a_format_that_we_do_not_know(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", "qwen3-moe/hub")
    with refused(UsageError, "'qwen3' is not a format", "known are", "moeglot formats"):
        moeglot.open(tmp_path / "m", "qwen3")


@pytest.mark.parametrize("path", ["nowhere", "a/b/c", "/nowhere/at/all", "model.safetensors"])
def test_no_such_path(path: str) -> None:
    with refused(UsageError, f"{path}: no such file or folder", "no Hub id", "check the path"):
        moeglot.open(path)


# --- missing, extra and duplicate tensors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key", "seen"),
    [
        ("gpt-oss/openai", GPT_OSS.format(1) + "down_proj_bias", ""),
        ("gpt-oss/original", "block.1.mlp.mlp1_bias", ""),
        ("gpt-oss/transformers", GPT_OSS.format(1) + "gate_up_proj", ""),
        ("qwen3-moe/hub", GPT_OSS.format(1) + "3.up_proj.weight", ""),
        ("mixtral/transformers-5", GPT_OSS.format(1) + "down_proj", ""),
        ("gpt-oss/openai", GPT_OSS.format(1) + "down_proj_scales", "down_proj_blocks is there and means nothing without it"),
        ("gpt-oss/openai", GPT_OSS.format(1) + "gate_up_proj_blocks", "gate_up_proj_scales is there and means nothing without it"),
        ("gpt-oss/original", "block.0.mlp.mlp2_weight.scales", "mlp2_weight.blocks is there and means nothing without it"),
    ],
)
def test_a_tensor_is_missing(tmp_path: Path, name: str, key: str, seen: str) -> None:
    write_checkpoint(tmp_path / "m", name)
    with edited(tmp_path / "m") as found:
        del found[key]
    with refused(TensorMismatch, f"{key}: missing", (seen, f"the format is {name}", "layers 0 to 1"), "fetch the missing shard"):
        moeglot.open(tmp_path / "m", name if ".0." in key else None)


def test_blocks_without_any_scales(tmp_path: Path) -> None:
    """No format has them; whoever insists on one reads which tensor is missing."""
    write_checkpoint(tmp_path / "m", "gpt-oss/openai")
    with edited(tmp_path / "m") as found:
        for key in [key for key in found if key.endswith("_scales")]:
            del found[key]
    with refused(UnknownFormat, "no format that moeglot knows", "no tensor is named model.layers.{layer}.mlp.experts.gate_up_proj_scales", "moeglot formats"):
        moeglot.open(tmp_path / "m")
    with refused(TensorMismatch, ("gate_up_proj_scales: missing", "(3 more)"), "gate_up_proj_blocks is there and means nothing without it", "fetch"):
        moeglot.open(tmp_path / "m", "gpt-oss/openai")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        pytest.param("qwen3-moe/hub", GPT_OSS.format(0) + "4.up_proj.weight", id="one expert more than config.json says"),
        pytest.param("mixtral/hub", "model.layers.2.block_sparse_moe.experts.0.w1.weight", id="one layer more"),
        pytest.param("qwen3-moe/hub", GPT_OSS.format(0) + "0.up_proj.weight_scale_inv", id="scales that the format does not have"),
        pytest.param("qwen3-moe/hub", GPT_OSS.format(0) + "00.up_proj.weight", id="a number with a zero before it"),
        pytest.param("gpt-oss/openai", GPT_OSS.format(0) + "gate_up_proj", id="the same experts as floats"),
        pytest.param("gpt-oss/transformers", GPT_OSS.format(0) + "gate_up_proj_blocks", id="the same experts as blocks"),
        pytest.param("gpt-oss/transformers", GPT_OSS.format(2) + "down_proj_bias", id="a bias of one layer more"),
        pytest.param("qwen3-moe/transformers-5", GPT_OSS.format(1) + "gate_proj", id="a name of another dialect"),
        pytest.param("gpt-oss/openai", GPT_OSS.format(1) + "expert_bias", id="a name that nobody knows"),
    ],
)
def test_a_tensor_too_many(tmp_path: Path, name: str, key: str) -> None:
    write_checkpoint(tmp_path / "m", name)
    with edited(tmp_path / "m") as found:
        found[key] = torch.zeros(2)
    with refused(TensorMismatch, f"{key}: extra, {name} has no such tensor", (f"the format is {name}", "4 experts"), ("config.json", "--format")):
        moeglot.open(tmp_path / "m")


def test_a_tensor_that_the_format_cannot_name(tmp_path: Path) -> None:
    """gpt-oss/original lists all its names."""
    write_checkpoint(tmp_path / "m", "gpt-oss/original")
    with edited(tmp_path / "m") as found:
        found["block.0.attn.lora"] = torch.zeros(2)
    with refused(TensorMismatch, "block.0.attn.lora: gpt-oss/original has no such tensor", "its names are listed by https://", "--format"):
        moeglot.convert(tmp_path / "m", "gpt-oss/openai", tmp_path / "out")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", "mixtral/hub", shards=2)
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    with edited(tmp_path / "m", names[1]) as found:
        found["lm_head.weight"] = load_file(tmp_path / "m" / names[0])["lm_head.weight"]
    for _ in ("with the index", "without it"):
        with refused(BrokenFile, ("lm_head.weight: stored twice", *names), "1 tensors are in both", "delete the stale one"):
            moeglot.open(tmp_path / "m")
        (tmp_path / "m" / "model.safetensors.index.json").unlink(missing_ok=True)


def test_a_tensor_under_two_names(tmp_path: Path) -> None:
    """mixtral/transformers-5 names the router otherwise; the Hub's name beside it is a second router."""
    write_checkpoint(tmp_path / "m", "mixtral/transformers-5")
    with edited(tmp_path / "m") as found:
        found["model.layers.0.block_sparse_moe.gate.weight"] = torch.zeros(4, 64)
    known = ("model.layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight")
    with refused(TensorMismatch, "model.layers.0.block_sparse_moe.gate.weight: stored twice", known, "remove the stale one"):
        moeglot.convert(tmp_path / "m", "mixtral/hub", tmp_path / "out")


# --- wrong dtypes and shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "line", "dtype", "needs", "has"),
    [
        ("gpt-oss/openai", "gate_up_proj_blocks", torch.int8, "U8", "I8"),
        ("gpt-oss/openai", "down_proj_scales", torch.float32, "U8", "F32"),
        ("gpt-oss/transformers", "down_proj", torch.float8_e4m3fn, "F64 or F32 or BF16 or F16", "F8_E4M3"),
        ("qwen3-moe/transformers-5", "gate_up_proj", torch.int32, "F64 or F32 or BF16 or F16", "I32"),
    ],
)
def test_a_wrong_dtype(tmp_path: Path, name: str, line: str, dtype: torch.dtype, needs: str, has: str) -> None:
    """The first layer tells the format, wherever in the file it lies: a dtype there means another format, and later a tensor that is wrong."""
    write_checkpoint(tmp_path / "m", name)
    with edited(tmp_path / "m") as found:
        key = GPT_OSS.format(1) + line
        found[key] = found[key].to(dtype)
    with refused(TensorMismatch, (key, f"{name} needs {needs}", f"has {has}"), f"the format is {name}"):
        moeglot.open(tmp_path / "m")
    with edited(tmp_path / "m") as found:
        key = GPT_OSS.format(0) + line
        found[key] = found[key].to(dtype)
    with refused(UnknownFormat, "no format that moeglot knows", f"not {name}: {key} is {has}, not {needs}", "moeglot formats"):
        moeglot.open(tmp_path / "m")


@pytest.mark.parametrize("expert", [0, 3])
def test_an_expert_of_another_type(tmp_path: Path, expert: int) -> None:
    """Moved with the type of the layer's first expert, it would lose what its own type holds."""
    key = f"model.layers.1.mlp.experts.{expert}.up_proj.weight"
    write_checkpoint(tmp_path / "m", "qwen3-moe/hub")
    with edited(tmp_path / "m") as found:
        found[key] = found[key].to(torch.float32)
    other, types = ("1", ("BF16", "F32")) if expert == 0 else ("3", ("F32", "BF16"))
    named = f"model.layers.1.mlp.experts.{other}.up_proj.weight: {types[0]}, and experts before it in this layer are {types[1]}"
    with refused(TensorMismatch, named, "the format is qwen3-moe/hub", "store them alike"):
        moeglot.open(tmp_path / "m")
    with edited(tmp_path / "m") as found:
        found.update({name: values.to(torch.float32) for name, values in found.items() if ".1.mlp.experts." in name and "up_proj" in name})
    moeglot.open(tmp_path / "m")  # a layer of another type is none


@pytest.mark.parametrize(
    ("name", "line", "axes", "needs", "has"),
    [
        ("gpt-oss/transformers", "down_proj", "e i h", [4, 64, 128], [4, 128, 64]),
        ("qwen3-moe/transformers-5", "down_proj", "e h i", [4, 128, 64], [4, 64, 128]),
        ("qwen3-moe/hub", "0.down_proj.weight", "h i", [128, 64], [64, 128]),
    ],
)
def test_a_turned_tensor(tmp_path: Path, name: str, line: str, axes: str, needs: list[int], has: list[int]) -> None:
    write_checkpoint(tmp_path / "m", name, TURNED)
    with edited(tmp_path / "m") as found:
        key = GPT_OSS.format(1) + line
        found[key] = found[key].mT
    with refused(TensorMismatch, (f'{key}: read as "{axes}" needs {needs}', f"the file has {has}"), f"the format is {name}"):
        moeglot.open(tmp_path / "m")
    with edited(tmp_path / "m") as found:
        key = GPT_OSS.format(0) + line
        found[key] = found[key].mT
    with refused(Contradiction, f'contradict each other: {key} is {has}; "{axes}" needs {needs}', f"those of {name}", ("config.json", "no size is taken")):
        moeglot.open(tmp_path / "m")


def test_scales_of_another_block_size(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", "gpt-oss/openai")
    key = GPT_OSS.format(1) + "down_proj_scales"
    with edited(tmp_path / "m") as found:
        found[key] = found[key].repeat_interleave(2, dim=-1)
    with refused(TensorMismatch, (f"{key}: ", "needs [4, 64, 2], the file has [4, 64, 4]"), "quant_method = mxfp4"):
        moeglot.open(tmp_path / "m")


def test_sizes_that_are_no_whole_number_of_blocks(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", "gpt-oss/transformers", {"i": 48})
    with (
        untouched(tmp_path),
        refused(TensorMismatch, ("[64, 48]", "blocks are [1, 32] values"), "blocks of 1 × 32, whole ones only", "--encode bfloat16"),
    ):
        moeglot.convert(tmp_path / "m", "gpt-oss/openai", tmp_path / "out", allow_loss=True)


# --- headers ---------------------------------------------------------------------------------------------------------------------------

TENSOR = '{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
PAIR = '{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"y":{"dtype":"U8","shape":[4],"data_offsets":[%d,%d]}}'
HEADERS: dict[str, tuple[str | bytes, int, Words, Words]] = {
    "truncated": (PAIR % (4, 8), 7, "truncated", "the file at"),
    "nothing behind the header": (TENSOR, 0, "truncated", "the tensors end at byte"),
    "overlapping": (PAIR % (3, 7), 7, "y overlaps the tensor before it", "the one before it ends at"),
    "the same bytes twice": (PAIR % (0, 4), 4, "y overlaps the tensor before it", "the one before it ends at"),
    "a hole": (PAIR % (5, 9), 9, "y leaves a hole before it", "the one before it ends at"),
    "bytes at the end": (TENSOR, 5, "bytes that no tensor owns", "the tensors end at byte"),
    "offsets backwards": (PAIR % (8, 4), 8, "y has -4 bytes", "needs 4"),
    "negative offset": (PAIR % (-4, 0), 4, "y has a shape or an offset that is no whole number", "-4"),
    "shape and offsets disagree": (TENSOR.replace("[4]", "[5]"), 4, "x has 4 bytes", "[5] of U8 needs 5"),
    "a fraction": (TENSOR.replace("[4]", "[4.0]"), 4, "no whole number", "4.0"),
    "unknown dtype": (TENSOR.replace("U8", "Q2_K"), 4, "x has dtype 'Q2_K'", "known are F64, F32"),
    "no dtype": (TENSOR.replace("dtype", "type"), 4, "x is not described", "it needs dtype, shape and data_offsets"),
    "no object": ("[]", 0, "the header is no JSON object", "it is a list"),
    "no JSON": ("{", 0, "the header is no JSON object", "line 1"),
    "no text": (b"\xff\xfe", 0, "the header is no JSON object", "decode"),
    "a name twice": (TENSOR[:-1] + "," + TENSOR[1:], 4, "", "'x' stands twice"),
    "metadata that is no text": (TENSOR[:-1] + ',"__metadata__":{"a":1}}', 4, "__metadata__ is no map from text to text", "{'a': 1}"),
    "a pickle in disguise": (pickle.dumps({"x": 1}), 0, "the header is no JSON object", ""),
}


@pytest.mark.parametrize("damage", HEADERS)
def test_a_damaged_header(tmp_path: Path, damage: str) -> None:
    header, size, wrong, known = HEADERS[damage]
    raw = header.encode() if isinstance(header, str) else header
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(size))
    wrong = (wrong,) if isinstance(wrong, str) else wrong
    for opened in (path, tmp_path):
        with refused(BrokenFile, ("model.safetensors: ", *wrong), known, ("fetch the file again", "nothing was read from it")):
            moeglot.open(opened)


@pytest.mark.parametrize("length", [0, 4, 7])
def test_a_file_that_ends_before_its_header(tmp_path: Path, length: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(length))
    with refused(BrokenFile, "model.safetensors: the header claims", f"the file has {length}", "fetch the file again"):
        moeglot.open(tmp_path)


@pytest.mark.parametrize(("claimed", "size"), [(100, 107), (10**12, 1000), (2**64 - 1, 1000), (100_000_001, 100_000_009)])
def test_an_oversized_header(tmp_path: Path, claimed: int, size: int) -> None:
    """The last one fits its file, and would still be refused by the safetensors library: nobody needs so much."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(claimed.to_bytes(8, "little"))
    os.truncate(path, size)
    with refused(BrokenFile, f"model.safetensors: the header claims {claimed} bytes", (f"the file has {size}", "at most 100000000"), "fetch the file again"):
        moeglot.open(tmp_path)


def test_every_truncation_of_a_checkpoint(tmp_path: Path) -> None:
    """Wherever a download stopped."""
    write_checkpoint(tmp_path / "m", "mixtral/transformers-5", layers=1)
    path = tmp_path / "m" / "model.safetensors"
    for size in sorted(set(range(0, path.stat().st_size, 4999)), reverse=True):
        os.truncate(path, size)
        with refused(BrokenFile, "model.safetensors: ", f"{size}", "fetch the file again"):
            moeglot.open(tmp_path / "m")


# --- the index and what it names -------------------------------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of two shards, and beside its folder a copy of the second one."""
    write_checkpoint(tmp_path / "m", "mixtral/transformers-5", shards=2)
    shutil.copyfile(tmp_path / "m" / SHARDS[1], tmp_path / "outside.safetensors")
    return tmp_path / "m"


def _name_in_index(folder: Path, name: object) -> None:
    with edited_json(folder / INDEX) as index:
        index["weight_map"] = {key: name if file == SHARDS[1] else file for key, file in index["weight_map"].items()}


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "../m/" + SHARDS[1],
        "./" + SHARDS[1],
        "sub/../" + SHARDS[1],
        "/outside.safetensors",
        "{folder}/" + SHARDS[1],
        "..",
        "",
        "config.json",
        "pytorch_model.bin",
    ],
)
def test_an_index_that_names_a_file_elsewhere(sharded: Path, name: str) -> None:
    """Even where that file is there and right: a shard lies in the folder of its index."""
    name = name.format(folder=sharded)
    _name_in_index(sharded, name)
    with refused(BrokenFile, f"{INDEX} names {name!r}", "in the index's own folder", "fetch the index again"):
        moeglot.open(sharded)


@pytest.mark.parametrize("file", [SHARDS[1], INDEX, "config.json"])
def test_a_link_that_leaves_its_folder(sharded: Path, file: str) -> None:
    outside = sharded.parent / "outside"
    (sharded / file).rename(outside)
    (sharded / file).symlink_to(outside)
    with refused(BrokenFile, f"{file}: a link that leaves its folder", f"it points to {outside}", "put the file itself there"):
        moeglot.open(sharded)


def test_a_tokenizer_that_links_elsewhere(sharded: Path) -> None:
    """What is carried over beside the weights is somebody else's word as well: a link must not copy a stranger's file into the output."""
    (sharded.parent / "secret").write_text("a private key")
    (sharded / "tokenizer.json").symlink_to(sharded.parent / "secret")
    with refused(BrokenFile, "tokenizer.json: a link that leaves its folder", "it points to", "put the file itself there"):
        moeglot.convert(sharded, "mixtral/hub", sharded.parent / "out")
    assert not (sharded.parent / "out").exists()


def test_links_that_stay_are_followed(sharded: Path) -> None:
    (sharded / "blobs").mkdir()
    (sharded / SHARDS[1]).rename(sharded / "blobs" / "1")
    (sharded / SHARDS[1]).symlink_to("blobs/1")
    (sharded.parent / "link").symlink_to(sharded)
    assert moeglot.open(sharded.parent / "link").format == by_name("mixtral/transformers-5")


def test_a_shard_that_is_not_there(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    with refused(BrokenFile, f"{SHARDS[1]}: missing", f"{INDEX} names it", "fetch it again"):
        moeglot.open(sharded)


@pytest.mark.parametrize("kind", ["link to nothing", "folder"])
def test_a_safetensors_file_that_is_none(tmp_path: Path, kind: str) -> None:
    """No index is here, so the message must not speak of one."""
    if kind == "folder":
        (tmp_path / "model.safetensors").mkdir()
    else:
        (tmp_path / "model.safetensors").symlink_to(tmp_path / "nothing")
    with pytest.raises(CheckpointError) as caught:
        moeglot.open(tmp_path)
    assert "index" not in str(caught.value)
    with refused(type(caught.value), "model.safetensors: "):
        raise caught.value


def test_an_index_that_names_the_wrong_shard(sharded: Path) -> None:
    with edited_json(sharded / INDEX) as index:
        index["weight_map"]["lm_head.weight"] = SHARDS[1]
    with refused(BrokenFile, f"{INDEX} puts lm_head.weight in {SHARDS[1]}", f"it is in {SHARDS[0]}; 1 tensors disagree", "together"):
        moeglot.open(sharded)


def test_an_index_of_other_tensors(sharded: Path) -> None:
    with edited_json(sharded / INDEX) as index:
        index["weight_map"]["a.tensor"] = index["weight_map"].pop("lm_head.weight")
    with refused(BrokenFile, f"{INDEX} puts a.tensor in {SHARDS[0]}", "it is in no file; 2 tensors disagree", "together"):
        moeglot.open(sharded)


NO_JSON = [
    ("{", "not JSON"),
    ("[]", "no JSON object"),
    ('{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}', "not JSON"),
    ("\xff", "not JSON"),
    ("[" * 100_000, "not JSON"),
]
NO_INDEX = [(text, "no weight_map") for text in ("{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"x": 1}}')]
BAD_JSON = [(file, *case) for file in (INDEX, "config.json") for case in NO_JSON] + [(INDEX, *case) for case in NO_INDEX]


@pytest.mark.parametrize(("file", "text", "wrong"), BAD_JSON, ids=[f"{file}: {text[:40]}" for file, text, _ in BAD_JSON])
def test_an_index_or_config_that_is_none(sharded: Path, file: str, text: str, wrong: str) -> None:
    """A name that stands twice says two things; Python's json would believe the last."""
    (sharded / file).write_text(text, encoding="latin-1")
    with refused(BrokenFile, f"{file}: {wrong}", "", "fetch"):
        moeglot.open(sharded)


# --- names that would forge a message ---------------------------------------------------------------------------------------------------

FORGED = "x\n  all is well\x1b[2J\u2028"


def _forged_tensor(folder: Path) -> None:
    with edited(folder) as found:
        found[GPT_OSS.format(0) + "down_proj" + FORGED] = torch.zeros(1)


def _forged_header(folder: Path) -> None:
    header = json.dumps({FORGED: {"dtype": "U8", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


def _forged_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": FORGED + ".safetensors"}}))


def _forged_model_type(folder: Path) -> None:
    with edited_json(folder / "config.json") as config:
        config["model_type"] = FORGED


@pytest.mark.parametrize("forge", [_forged_tensor, _forged_header, _forged_shard, _forged_model_type])
def test_a_name_cannot_add_a_line(tmp_path: Path, forge: Callable[[Path], None]) -> None:
    """Names come from the file; three lines stay three, and none of them clears the screen."""
    write_checkpoint(tmp_path / "m", "qwen3-moe/transformers-5")
    forge(tmp_path / "m")
    with pytest.raises(MoeglotError) as caught:
        moeglot.open(tmp_path / "m")
    assert "all is well" in str(caught.value)
    with refused(type(caught.value)):
        raise caught.value


# --- numbers -----------------------------------------------------------------------------------------------------------------------------

LAST = (1, 3)
"""Layer and expert that no sample includes."""


def _nan_scale(found: dict[str, torch.Tensor]) -> None:
    found[GPT_OSS.format(LAST[0]) + "down_proj_scales"][LAST[1], 5, 1] = 255


def _zero_scales(found: dict[str, torch.Tensor]) -> None:
    found[GPT_OSS.format(LAST[0]) + "gate_up_proj_scales"][LAST[1]] = 0


def _nan_weight(found: dict[str, torch.Tensor]) -> None:
    found[GPT_OSS.format(LAST[0]) + "down_proj"][LAST[1], 5, 7] = float("nan")


def _infinite_bias(found: dict[str, torch.Tensor]) -> None:
    found[GPT_OSS.format(LAST[0]) + "gate_up_proj_bias"][LAST[1], 5] = -float("inf")


@pytest.mark.parametrize(
    ("name", "damage", "wrong"),
    [
        ("gpt-oss/openai", _nan_scale, ("layers.1.mlp.experts.down_proj", "has scales of 255, which is NaN")),
        ("gpt-oss/openai", _zero_scales, ("layers.1.mlp.experts.gate_up_proj", "has scales that are all zero")),
        ("gpt-oss/openai", _infinite_bias, ("layers.1.mlp.experts.gate_up_proj_bias", "holds NaN or infinite numbers")),
        ("gpt-oss/transformers", _nan_weight, ("layers.1.mlp.experts.down_proj", "holds NaN or infinite numbers")),
    ],
)
def test_numbers_that_cannot_be(tmp_path: Path, name: str, damage: Callable[[dict[str, torch.Tensor]], None], wrong: tuple[str, ...]) -> None:
    """Found by whoever reads the expert: one who opens it, verifies or converts; and never written."""
    write_checkpoint(tmp_path / "m", name)
    with edited(tmp_path / "m") as found:
        damage(found)
    target = "gpt-oss/original" if name == "gpt-oss/openai" else name
    with untouched(tmp_path / "m"), refused(BadNumbers, (*wrong, "expert 3"), f"the format is {name}", "fetch the file again"):
        moeglot.convert(tmp_path / "m", target, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    checkpoint = moeglot.open(tmp_path / "m")
    with refused(BadNumbers, (*wrong, "expert 3")):
        for lazy in checkpoint.experts(LAST[0]).values():
            lazy[LAST[1]]
    for lazy in checkpoint.experts(LAST[0]).values():
        lazy[0]
    assert moeglot.verify(tmp_path / "m").exit_status == 1


@pytest.mark.parametrize("work", [moeglot.verify, moeglot.compare])
def test_which_of_two_has_numbers_that_cannot_be(tmp_path: Path, work: Callable[[Path, Path], object]) -> None:
    """Both hold the same model under the same names."""
    right, wrong = (write_checkpoint(tmp_path / side / "m", "gpt-oss/transformers") for side in ("right", "wrong"))
    with edited(wrong) as found:
        _nan_weight(found)
    for pair in ((right, wrong), (wrong, right)):
        with refused(BadNumbers, ("down_proj", "expert 3"), f"read from {wrong}; ", "fetch the file again"):
            work(*pair)


@pytest.mark.parametrize("name", ["gpt-oss/openai", "qwen3-moe/hub"])
def test_placeholders_without_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Tensors on torch's meta device have a shape and no content; a file cannot hold one, a live model can."""
    checkpoint = moeglot.open(write_checkpoint(tmp_path / "m", name))
    read = Entry.read
    monkeypatch.setattr(Entry, "read", lambda self, *args: read(self, *args).to("meta"))
    with refused(BadNumbers, (GPT_OSS.format(0), "expert 2", "placeholder without numbers (meta device)"), f"the format is {name}", "fetch"):
        checkpoint.experts(0)["gate"][2]


def test_a_number_too_large_for_the_target(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", "qwen3-moe/hub", dtype=torch.float32)
    with edited(tmp_path / "m") as found:
        found[GPT_OSS.format(0) + "0.up_proj.weight"][0, 0] = 1e6
    with refused(BadNumbers, "not finite as float16", "the largest magnitude here is 1e+06", "--encode bfloat16"):
        moeglot.convert(tmp_path / "m", "qwen3-moe/transformers-5", tmp_path / "out", encode="float16", allow_loss=True)


# --- config.json against the tensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "letter"), [("num_local_experts", None, "e"), ("hidden_size", None, "h"), ("intermediate_size", "64", "i"), ("head_dim", 0, "d")]
)
def test_a_config_without_a_size(tmp_path: Path, key: str, value: object, letter: str) -> None:
    write_checkpoint(tmp_path / "m", "gpt-oss/openai")
    with edited_json(tmp_path / "m" / "config.json") as config:
        config[key] = value
    with refused(Contradiction, f"config.json does not say how large axis {letter} is", key, "add the key"):
        moeglot.open(tmp_path / "m")


@pytest.mark.parametrize("value", [None, "two", -1, 1.5])
def test_a_config_without_a_number_of_layers(tmp_path: Path, value: object) -> None:
    write_checkpoint(tmp_path / "m", "gpt-oss/openai")
    with edited_json(tmp_path / "m" / "config.json") as config:
        config["num_hidden_layers"] = value
    with refused(Contradiction, "config.json names no layer with experts", f"'num_hidden_layers': {value!r}", "config.json"):
        moeglot.open(tmp_path / "m")


@pytest.mark.parametrize(("key", "value"), [("decoder_sparse_step", "one"), ("mlp_only_layers", 3), ("mlp_only_layers", "01"), ("mlp_only_layers", [0, 1])])
def test_a_config_that_does_not_say_which_layers_are_sparse(tmp_path: Path, key: str, value: object) -> None:
    write_checkpoint(tmp_path / "m", "qwen3-moe/hub")
    with edited_json(tmp_path / "m" / "config.json") as config:
        config[key] = value
    with refused(Contradiction, "config.json names no layer with experts", f"'{key}': {value!r}", "config.json"):
        moeglot.open(tmp_path / "m")


def test_a_config_with_an_activation_that_nobody_knows(tmp_path: Path) -> None:
    """While planning: it could not be verified what the experts compute."""
    write_checkpoint(tmp_path / "m", "qwen3-moe/hub")
    with edited_json(tmp_path / "m" / "config.json") as config:
        config["hidden_act"] = "swishy"
    with refused(UsageError, "hidden_act = 'swishy'", "known are silu", "producer's"):
        moeglot.convert(tmp_path / "m", "qwen3-moe/transformers-5", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_config_with_two_sizes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", "gpt-oss/openai")
    with edited_json(tmp_path / "m" / "config.json") as config:
        config["num_experts"] = 8
    with refused(Contradiction, "gives axis e two sizes", ("'num_local_experts': 4", "'num_experts': 8"), "remove the wrong key"):
        moeglot.open(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "key", "value", "wrong"),
    [
        ("gpt-oss/openai", "num_local_experts", 8, 'gate_up_proj_blocks is [4, 128, 2, 16]; "e (i p) h" needs [8, 128, 2, 16]'),
        ("gpt-oss/openai", "hidden_size", 128, 'gate_up_proj_blocks is [4, 128, 2, 16]; "e (i p) h" needs [4, 128, 4, 16]'),
        ("gpt-oss/transformers", "intermediate_size", 32, 'gate_up_proj is [4, 64, 128]; "e h (i p)" needs [4, 64, 64]'),
        ("qwen3-moe/hub", "moe_intermediate_size", 32, '0.gate_proj.weight is [64, 64]; "i h" needs [32, 64]'),
    ],
)
def test_a_config_of_another_size(tmp_path: Path, name: str, key: str, value: int, wrong: str) -> None:
    """Sizes come from config.json and from nowhere else."""
    write_checkpoint(tmp_path / "m", name)
    with edited_json(tmp_path / "m" / "config.json") as config:
        config[key] = value
    known = (f"key names and dtypes are those of {name}", "config.json says model_type")
    with refused(Contradiction, ("config.json and the tensors contradict each other", wrong), known, "take config.json from the producer"):
        moeglot.open(tmp_path / "m")


def test_a_config_of_another_size_against_the_format_that_is_asked_for(tmp_path: Path) -> None:
    """Blocks are what the format declares, so nothing "looks quantized in another way": the size is wrong."""
    write_checkpoint(tmp_path / "m", "gpt-oss/openai")
    with edited_json(tmp_path / "m" / "config.json") as config:
        config["num_local_experts"] = 8
    wrong = ("gate_up_proj_blocks", "needs [8, 128, 2, 16], the file has [4, 128, 2, 16] (11 more)")
    with refused(TensorMismatch, wrong, "--format gpt-oss/openai", "check config.json against the producer's"):
        moeglot.open(tmp_path / "m", "gpt-oss/openai")


@pytest.mark.parametrize(
    ("name", "key", "value", "wrong"),
    [
        ("qwen3-moe/hub", "num_experts", 5, ("model.layers.0.mlp.experts.4.gate_proj.weight: missing",)),
        ("qwen3-moe/hub", "num_experts", 3, ("model.layers.0.mlp.experts.3.", ": extra")),
        ("mixtral/transformers-5", "num_hidden_layers", 3, ("model.layers.2.mlp.experts.gate_up_proj: missing",)),
        ("mixtral/transformers-5", "num_hidden_layers", 1, ("model.layers.1.mlp.experts.", ": extra")),
        ("qwen3-moe/hub", "mlp_only_layers", [0], ("model.layers.0.mlp.experts.", ": extra")),
    ],
)
def test_a_config_of_other_layers_or_experts(tmp_path: Path, name: str, key: str, value: object, wrong: tuple[str, ...]) -> None:
    """Every tensor has the right shape; there are too many or too few."""
    write_checkpoint(tmp_path / "m", name)
    with edited_json(tmp_path / "m" / "config.json") as config:
        config[key] = value
    with refused(TensorMismatch, (*wrong, "more)"), f"the format is {name}", "config.json"):
        moeglot.open(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param("gpt-oss/transformers", "mxfp4", id="floats called mxfp4"),
        pytest.param("gpt-oss/openai", "fp8", id="mxfp4 called fp8"),
        pytest.param("qwen3-moe/hub", "fp8", id="floats called fp8"),
    ],
)
def test_a_config_of_another_quantization(tmp_path: Path, name: str, method: str) -> None:
    write_checkpoint(tmp_path / "m", name)
    with edited_json(tmp_path / "m" / "config.json") as config:
        config["quantization_config"] = {"quant_method": method}
    wrong = ("config.json and the tensors contradict each other", f"quantization_config.quant_method is {method}")
    with refused(Contradiction, wrong, f"key names and dtypes are those of {name}", "take config.json from the producer"):
        moeglot.open(tmp_path / "m")


def test_a_config_of_another_family(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", "mixtral/hub")
    with edited_json(tmp_path / "m" / "config.json") as config:
        config |= {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 64}
    known = ("model_type = qwen3_moe", "not qwen3-moe/hub: no tensor is named model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight")
    with refused(UnknownFormat, "no format that moeglot knows", known, "moeglot formats"):
        moeglot.open(tmp_path / "m")


CLAIMED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
import moeglot
try:
    moeglot.open(sys.argv[1])
except moeglot.MoeglotError as error:
    print(error)
"""


@pytest.mark.parametrize(("name", "key"), [("qwen3-moe/hub", "num_experts"), ("mixtral/transformers-5", "num_hidden_layers")])
def test_a_config_that_claims_a_billion(tmp_path: Path, name: str, key: str) -> None:
    """Refused at once, in a process that may not have much memory: a claim is checked before anything as large as it is made."""
    write_checkpoint(tmp_path / "m", name)
    with edited_json(tmp_path / "m" / "config.json") as config:
        config[key] = 10**9
    done = subprocess.run([sys.executable, "-c", CLAIMED, str(tmp_path / "m")], capture_output=True, text=True, timeout=120, check=True)
    assert len(done.stdout.splitlines()) == 3, done.stdout
    assert "config.json" in done.stdout.splitlines()[2]


def test_a_config_against_our_own_mark(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", "gpt-oss/openai")
    moeglot.convert(tmp_path / "m", "gpt-oss/transformers", tmp_path / "out")
    with edited_json(tmp_path / "out" / "config.json") as config:
        config["num_local_experts"] = 8
    with refused(Contradiction, "the safetensors header says gpt-oss/transformers, the files contradict it", "needs [8, 64, 128]", "pass --format"):
        moeglot.open(tmp_path / "out")


def test_two_marks(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", "mixtral/transformers-5", shards=2)
    for file, mark in zip(SHARDS, ("mixtral/hub", "mixtral/transformers-5"), strict=True):
        save_file(load_file(folder / file), folder / file, {"moeglot.format": mark})
    with refused(Contradiction, "the shards name 2 formats", "['mixtral/hub', 'mixtral/transformers-5']", "convert again"):
        moeglot.open(folder)


# --- pickles -----------------------------------------------------------------------------------------------------------------------------


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[bytes]:
    """A pickle that leaves a trace when it is loaded; none is left at the end."""
    sprung = tmp_path / "sprung"
    data = pickle.dumps(Trap(sprung))
    pickle.loads(data)
    sprung.rmdir()
    yield data
    assert not sprung.exists()


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_pickles_are_never_loaded(tmp_path: Path, trap: bytes, suffix: str) -> None:
    folder = write_checkpoint(tmp_path / "m", "mixtral/hub")
    (folder / "model.safetensors").unlink()
    path = folder / f"pytorch_model{suffix}"
    path.write_bytes(trap)
    with refused(PickleRefused, f"only pickle files are here: {path.name}", "runs the code in it", "safetensors"):
        moeglot.open(folder)
    with refused(PickleRefused, f"{path.name}: never loaded", "runs the code in it", "safetensors"):
        moeglot.open(path)


def test_a_pickle_that_is_called_safetensors(tmp_path: Path, trap: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(trap)
    with refused(BrokenFile, "model.safetensors: the header claims", "the file has", "fetch"):
        moeglot.open(tmp_path)


def test_pickles_beside_safetensors_are_left_alone(tmp_path: Path, trap: bytes) -> None:
    folder = write_checkpoint(tmp_path / "m", "mixtral/hub")
    (folder / "pytorch_model.bin").write_bytes(trap)
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(trap)
    (folder / "tokenizer.json").write_text("{}")
    moeglot.convert(folder, "mixtral/transformers-5", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "moeglot.json", "tokenizer.json"}


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with refused(CheckpointError, "no safetensors file is here", "model.safetensors.index.json and *.safetensors", "pass the folder"):
        moeglot.open(tmp_path)
    with refused(CheckpointError, "config.json: not a safetensors file", ".json", "pass a .safetensors file"):
        moeglot.open(tmp_path / "config.json")


def test_an_adapter_is_no_checkpoint(tmp_path: Path) -> None:
    """A folder of one, what `tune` leaves around it, and its file; but tensors that are no adapter's are read."""
    (adapter := tmp_path / "tuned" / "adapter").mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    for path in (tmp_path / "tuned", adapter, adapter / "adapter_model.safetensors"):
        with refused(CheckpointError, f"{path}: a LoRA adapter", f"adapter_config.json is in {adapter},", f"`moeglot merge MODEL {adapter} OUT`"):
            moeglot.open(path)
    folder = write_checkpoint(tmp_path / "m", "mixtral/hub", layers=1)
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    (folder / "adapter_model.safetensors").unlink()
    assert moeglot.open(folder).format.name == "mixtral/hub"


# --- the output --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint with a tokenizer beside it."""
    folder = write_checkpoint(tmp_path / "m", "mixtral/hub", layers=1, shards=2)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def _file(path: Path) -> None:
    path.write_text("mine")


def _empty_folder(path: Path) -> None:
    path.mkdir()


def _full_folder(path: Path) -> None:
    path.mkdir()
    (path / "checkpoint").mkdir()
    (path / "checkpoint" / "model.safetensors").write_text("mine")


def _link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def _link_to_a_folder(path: Path) -> None:
    path.symlink_to(path.parent / "m")


THINGS = [_file, _empty_folder, _full_folder, _link_to_nothing, _link_to_a_folder]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("put", THINGS)
def test_an_output_that_exists(tmp_path: Path, source: Path, put: Callable[[Path], None], resume: bool) -> None:
    put(tmp_path / "out")
    with untouched(tmp_path), refused(OutputExists, f"{tmp_path / 'out'} exists", "moeglot overwrites nothing", "choose another OUT"):
        moeglot.convert(source, "mixtral/transformers-5", tmp_path / "out", resume=resume)


def test_an_output_that_is_the_source(tmp_path: Path, source: Path) -> None:
    with untouched(tmp_path), refused(OutputExists, f"{source} exists", "moeglot overwrites nothing", "choose another OUT"):
        moeglot.convert(source, "mixtral/transformers-5", source)


@pytest.mark.parametrize("put", THINGS)
def test_an_output_that_appears_meanwhile(tmp_path: Path, source: Path, put: Callable[[Path], None]) -> None:
    """Another process makes it while this one writes; an empty folder is not ours either."""
    appeared: dict[str, tuple[object, ...]] = {}

    def meddle(what: str, done: int, total: int) -> None:
        if not appeared:
            put(tmp_path / "out")
            appeared.update(everything(tmp_path))

    with refused(OutputExists, f"{tmp_path / 'out'} exists", "", "choose another OUT"):
        moeglot.convert(source, "mixtral/transformers-5", tmp_path / "out", progress=meddle)
    ours = "out.partial"
    now = everything(tmp_path)
    assert {path: what for path, what in now.items() if not path.startswith(ours)} == {p: w for p, w in appeared.items() if not p.startswith(ours)}


@pytest.mark.parametrize("put", THINGS)
def test_a_work_folder_that_exists(tmp_path: Path, source: Path, put: Callable[[Path], None]) -> None:
    put(tmp_path / "out.partial")
    with untouched(tmp_path), refused(OutputExists, "out.partial exists", "did not finish", ("--resume", "remove it yourself")):
        moeglot.convert(source, "mixtral/transformers-5", tmp_path / "out")


def _foreign_journal(path: Path) -> None:
    path.mkdir()
    (path / "journal").write_text("Dear diary,\nthis line has no end")


def _foreign_json(path: Path) -> None:
    path.mkdir()
    (path / "journal").write_text("[]\n")


def _foreign_beside(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")


@pytest.mark.parametrize("put", [_file, _full_folder, _link_to_nothing, _link_to_a_folder, _foreign_journal, _foreign_json, _foreign_beside])
def test_a_work_folder_of_somebody_else_is_not_resumed(tmp_path: Path, source: Path, put: Callable[[Path], None]) -> None:
    put(tmp_path / "out.partial")
    with untouched(tmp_path), refused(OutputExists, "out.partial", "", "remove it"):
        moeglot.convert(source, "mixtral/transformers-5", tmp_path / "out", resume=True)


def test_a_work_folder_of_another_conversion_is_not_resumed(tmp_path: Path, source: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moeglot.convert(source, "mixtral/transformers-5", tmp_path / "out", progress=stop)
    with (
        untouched(tmp_path),
        refused(OutputExists, "out.partial belongs to another conversion", "source, target, adapter, rounding or shard size", "repeat the first command"),
    ):
        moeglot.convert(source, "mixtral/hub", tmp_path / "out", resume=True)


@pytest.mark.parametrize("name", ["gpt-oss/openai", "qwen3-moe/hub"])
def test_the_source_is_never_touched(tmp_path: Path, name: str) -> None:
    """Content, names and times of change; also where the conversion fails, and also where the output lies beside it."""
    source = write_checkpoint(tmp_path / "m", name, shards=2)
    (source / "tokenizer.json").write_text("{}")
    (target,) = {"gpt-oss/transformers", "qwen3-moe/transformers-5"} & {form.name for form in PLAIN if form.family == by_name(name).family}
    with untouched(source):
        moeglot.convert(source, target, tmp_path / "out")
        moeglot.convert(tmp_path / "out", name, tmp_path / "back")
        moeglot.verify(source, tmp_path / "back")
        with pytest.raises(OutputExists):
            moeglot.convert(source, target, tmp_path / "out")


# --- no space ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no command called mount is here")
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _ballast(disk: Path, left: int) -> Path:
    path = disk / "ballast"
    path.write_bytes(bytes(shutil.disk_usage(disk).free - left))
    return path


def test_a_disk_that_is_too_small(tmp_path: Path, small_disk: Path) -> None:
    """Known before anything is written."""
    source = write_checkpoint(tmp_path / "m", "mixtral/hub")
    _ballast(small_disk, 100_000)
    with untouched(tmp_path), refused(NoSpace, "no space left for out", (" bytes on the disk of ", str(small_disk)), ("free space", "another OUT")):
        moeglot.convert(source, "mixtral/transformers-5", small_disk / "out")


def test_a_disk_that_fills_up_before_the_weights(tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else wrote to it after we had looked. The disk itself refuses; with space again, --resume goes on."""
    source = write_checkpoint(tmp_path / "m", "mixtral/hub")
    ballast = _ballast(small_disk, 100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12))
    with untouched(source), refused(NoSpace, "no space left for model.safetensors", (" bytes on the disk of ", str(small_disk)), "--resume"):
        moeglot.convert(source, "mixtral/transformers-5", small_disk / "out")
    assert not (small_disk / "out").exists()
    ballast.unlink()
    assert moeglot.convert(source, "mixtral/transformers-5", small_disk / "out", resume=True).report.verdict == "holds"


def test_a_disk_that_fills_up_after_the_weights(tmp_path: Path, small_disk: Path) -> None:
    """The weights fit, the tokenizer beside them does not."""
    source = write_checkpoint(tmp_path / "m", "mixtral/hub")
    (source / "tokenizer.json").write_bytes(bytes(700_000))
    ballast = _ballast(small_disk, 800_000)
    with untouched(source), refused(NoSpace, "no space left for ", (" bytes on the disk of ", str(small_disk)), "--resume"):
        moeglot.convert(source, "mixtral/transformers-5", small_disk / "out")
    assert not (small_disk / "out").exists()
    ballast.unlink()
    assert moeglot.convert(source, "mixtral/transformers-5", small_disk / "out", resume=True).report.verdict == "holds"
    assert (small_disk / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


# --- what is not refused -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [form for form in PLAIN if form.family.name in ("gpt-oss", "qwen3-moe", "mixtral")], ids=lambda form: form.name)
def test_what_is_undamaged_is_accepted(tmp_path: Path, form: Format) -> None:
    """Otherwise nothing above would mean anything; and a single file is as good as its folder, and nothing but headers is read."""
    folder = write_checkpoint(tmp_path / "m", form.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Entry, "read", lambda *args: pytest.fail("a number was read"))
        for path in (folder, *folder.glob("model.safetensors")):
            checkpoint = moeglot.open(path)
            assert (checkpoint.format, checkpoint.layers, len(checkpoint.dense) > 0) == (form, (0, 1), True)
