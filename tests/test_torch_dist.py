"""torch_dist checkpoints: what we write is what torch reads, what is broken is refused and never run, and every tensor goes to one place."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import pytest
import torch
from commands import run, told
from reading import written_by_torch
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint, write_dense_first
from torch.distributed.checkpoint import FileSystemReader, load, save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.serialization import set_crc32_options

import moeglot
from moeglot.errors import MoeglotError
from moeglot.files.shards import tensor_bytes
from moeglot.files.torch_dist import writing
from moeglot.files.torch_dist.blobs import find_numbers, frame
from moeglot.files.torch_dist.boxes import Box, overlapping
from moeglot.files.torch_dist.inert import look_at
from moeglot.files.torch_dist.reading import ChunkedEntry

TARGET = "qwen3-moe/megatron-torch-dist"
HUB = "qwen3-moe/hub"


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "hub", HUB)


@pytest.fixture
def dist(hub: Path, tmp_path: Path) -> Path:
    moeglot.convert(hub, TARGET, tmp_path / "dist")
    return tmp_path / "dist"


def described(folder: Path) -> Metadata:
    return FileSystemReader(folder).read_metadata()


def test_one_chunk_for_each_matrix(dist: Path) -> None:
    found = described(dist).state_dict_metadata
    shapes = {key: ([*one.size], {tuple(chunk.sizes) for chunk in one.chunks}) for key, one in found.items() if hasattr(one, "chunks")}
    assert shapes["decoder.layers.mlp.experts.experts.linear_fc1.weight"] == ([2, 4, 128, 64], {(1, 1, 64, 64)})
    assert shapes["decoder.layers.mlp.experts.experts.linear_fc2.weight"] == ([2, 4, 64, 64], {(1, 1, 64, 64)})
    assert shapes["decoder.layers.self_attention.linear_qkv.weight"] == ([2, 128, 64], {(1, 128, 64)})
    assert shapes["output_layer.weight"] == ([32, 64], {(32, 64)})
    assert "decoder.layers.mlp.experts.experts.linear_fc2._extra_state/shard_1.3_2.4" in found
    assert "decoder.final_layernorm._extra_state/shard_0_1" in found


def test_layers_that_differ_keep_their_numbers(tmp_path: Path) -> None:
    """The first layer has no experts; Megatron then has `moe_layer_freq` as a list, and stacks experts alone."""
    moeglot.convert(write_dense_first(tmp_path / "mixed"), "deepseek-v3/megatron-torch-dist", tmp_path / "out")
    found = described(tmp_path / "out").state_dict_metadata
    assert [*found["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"].size] == [4, 128, 64]
    assert [*found["decoder.layers.0.mlp.linear_fc1.weight"].size] == [80, 64]
    assert "decoder.layers.1.mlp.experts.experts.linear_fc1._extra_state/shard_3_4" in found


def test_every_chunk_is_a_whole_archive(dist: Path, tmp_path: Path) -> None:
    """Its checksums hold, and torch reads it by itself."""
    for index, place in described(dist).storage_data.items():
        blob = (dist / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
        (tmp_path / "blob").write_bytes(blob)
        assert zipfile.ZipFile(tmp_path / "blob").testzip() is None
        found = torch.load(tmp_path / "blob", weights_only=True)
        assert found == [None] if index.offset is None else torch.is_tensor(found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8])
@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (2, 1, 3)])
def test_a_frame_is_torchs(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = (torch.randn(shape) * 9).to(dtype)
    before, after, _ = frame(moeglot.dtypes.dtype_of(tensor), shape, 0)
    (tmp_path / "one.pt").write_bytes(before + bytes(tensor_bytes(tensor)) + after)
    assert torch.equal(torch.load(tmp_path / "one.pt", weights_only=True), tensor)


def test_large_tensors_are_several_chunks(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "LARGEST", 1000)
    moeglot.convert(hub, TARGET, tmp_path / "small")
    sizes = {tuple(one.sizes) for one in described(tmp_path / "small").state_dict_metadata["output_layer.weight"].chunks}
    assert sizes == {(7, 64), (4, 64)}
    assert moeglot.compare(tmp_path / "small", hub).verdict == "holds"


def test_rows_across_chunks(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "LARGEST", 1000)
    moeglot.convert(hub, TARGET, tmp_path / "small")
    whole = load_file(hub / "model.safetensors")["lm_head.weight"]
    entry = moeglot.open(tmp_path / "small").source.entries["output_layer.weight"]
    assert isinstance(entry, ChunkedEntry)
    for first, rows in ((0, 32), (5, 4), (7, 7), (31, 1)):
        assert torch.equal(entry.read(first, rows), whole[first : first + rows])


def test_two_files_and_again_the_same_bytes(hub: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        moeglot.convert(hub, TARGET, tmp_path / out, shard_size=40_000)
    files = sorted(path.name for path in (tmp_path / "a").glob("*.distcp"))
    assert len(files) > 2
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in (*files, "common.pt", "metadata.json", ".metadata"))


@pytest.mark.parametrize("target", [TARGET, f"{TARGET}-singleton"])
def test_one_that_was_interrupted_ends_in_the_same_bytes(target: str, hub: Path, tmp_path: Path) -> None:
    def stop(work: str, done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    moeglot.convert(hub, target, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        moeglot.convert(hub, target, tmp_path / "out", workers=1, progress=stop)
    assert not (tmp_path / "out").exists()
    moeglot.convert(hub, target, tmp_path / "out", resume=True)
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in ("__0_0.distcp", ".metadata"))


def in_parts(hub: Path, out: Path, target: str) -> None:
    plan = moeglot.plan(hub, target)
    for part in ("2/2", "1/2"):
        moeglot.write_part(plan, out, part)
    moeglot.finalize(moeglot.plan(hub, target), out)


def all_units_done(hub: Path, out: Path, target: str) -> None:
    """Killed after its last unit, or while it verified."""
    moeglot.write_part(moeglot.plan(hub, target), out, "1/1")
    moeglot.convert(hub, target, out, resume=True)


def only_to_be_cleaned_up(hub: Path, out: Path, target: str) -> None:
    """Killed at its very end: the output has its name, and its work folder is empty."""
    moeglot.convert(hub, target, out)
    out.with_name("out.partial").mkdir()
    moeglot.convert(hub, target, out, resume=True)


@pytest.mark.parametrize("write", [in_parts, all_units_done, only_to_be_cleaned_up])
def test_a_file_that_has_its_checksums_is_gone_on_with(write: Callable[[Path, Path, str], None], hub: Path, tmp_path: Path) -> None:
    """The CRC-32 of the first tensor stands among the bytes that come before it, which tell a file that is whole from one that is lost."""
    moeglot.convert(hub, TARGET, tmp_path / "whole")
    write(hub, tmp_path / "out", TARGET)
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in ("__0_0.distcp", ".metadata"))
    assert not (tmp_path / "out.partial").exists()


def test_a_file_that_is_lost_is_not_gone_on_with(hub: Path, tmp_path: Path) -> None:
    moeglot.write_part(moeglot.plan(hub, TARGET), tmp_path / "out", "1/2")
    lost = tmp_path / "out.partial" / "checkpoint" / "__0_0.distcp"
    lost.write_bytes(bytes(lost.stat().st_size))
    with pytest.raises(moeglot.OutputExists, match="is missing, or is not as long"):
        moeglot.write_part(moeglot.plan(hub, TARGET), tmp_path / "out", "2/2")


def test_another_shard_size_is_another_plan(hub: Path, tmp_path: Path) -> None:
    """A run that goes on with a folder, or is another part of it, may not have tensors lie elsewhere."""
    plans = {size: moeglot.plan(hub, TARGET, shard_size=size) for size in range(40_000, 260_000, 10_000)}
    layouts = {size: json.dumps([(file.file, file.nbytes, file.pieces, file.states) for file in plan.shards]) for size, plan in plans.items()}
    assert 2 < len(set(layouts.values())) == len({plan.digest for plan in plans.values()}) < len(plans)
    first, second = next((a, b) for a in plans for b in plans if a < b and layouts[a] != layouts[b] and len(plans[a].shards) == len(plans[b].shards))
    moeglot.write_part(plans[first], tmp_path / "out", "1/2")
    with pytest.raises(moeglot.OutputExists, match="another conversion"):
        moeglot.write_part(plans[second], tmp_path / "out", "2/2")


# --- accounting ----------------------------------------------------------------------------------------------------------------------


def changed(source: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    found = load_file(source / "model.safetensors")
    change(found)
    save_file(found, source / "model.safetensors", {"format": "pt"})
    return source


ACCOUNTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "a tensor without a place": (lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}), "inv_freq"),
    "a norm that one layer lacks": (
        lambda t: t.pop("model.layers.1.input_layernorm.weight"),
        "model.layers.1.input_layernorm.weight: missing, and layer 0 has it",
    ),
    "a layer that config.json does not know": (
        lambda t: t.update({"model.layers.2.input_layernorm.weight": t["model.layers.1.input_layernorm.weight"].clone()}),
        "model.layers.2.input_layernorm.weight",
    ),
    "queries without keys": (lambda t: t.pop("model.layers.0.self_attn.k_proj.weight"), "k_proj"),
    "an expert that is missing": (lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"), "experts.3.up_proj"),
    "a layer in another dtype": (
        lambda t: t.update({"model.layers.1.mlp.gate.weight": t["model.layers.1.mlp.gate.weight"].float()}),
        "mlp.router.weight: F32",
    ),
    "queries of another number of heads": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": t["model.layers.0.self_attn.q_proj.weight"].repeat(2, 1)}),
        "their rows are not those of the heads",
    ),
}


@pytest.mark.parametrize("case", ACCOUNTS)
def test_what_is_left_is_named_before_a_byte_is_written(case: str, hub: Path, tmp_path: Path) -> None:
    change, named = ACCOUNTS[case]
    with pytest.raises(MoeglotError) as error:
        moeglot.convert(changed(hub, change), TARGET, tmp_path / "out")
    assert named in error.value.wrong
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("target", [TARGET, f"{TARGET}-singleton"])
def test_every_tensor_is_used_once_and_every_byte_written_once(target: str, hub: Path) -> None:
    plan = moeglot.plan(hub, target)
    used = [part.name for parts in plan.dense.values() for part in parts]
    assert sorted(used) == sorted(plan.source.others)
    (file,) = plan.shards
    spans = [(at, at + len(data)) for at, data in file.frames] + [(p.offset, p.offset + p.nbytes) for pieces in file.pieces.values() for p in pieces]
    ends = sorted(spans)
    assert ends[0][0] == 0
    assert [end for _, end in ends] == [*(start for start, _ in ends[1:]), file.nbytes]


def test_a_family_that_is_not_spelled_out_is_refused_by_name(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a", "olmoe/hub")
    with pytest.raises(moeglot.UsageError, match="'olmoe/megatron-torch-dist' is not a format") as error:
        moeglot.convert(source, "olmoe/megatron-torch-dist", tmp_path / "out")
    assert len(str(error.value).splitlines()) == 3


def test_rows_that_pad_the_vocabulary_are_left_aside(dist: Path, hub: Path, tmp_path: Path) -> None:
    """Megatron rounds the vocabulary up, so that it can be cut for tensor parallelism; config.json says how many words there are."""
    found = {key: torch.empty(one.size, dtype=one.properties.dtype) for key, one in described(dist).state_dict_metadata.items() if hasattr(one, "size")}
    load(found, checkpoint_id=dist, no_dist=True)
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        found[key] = torch.cat([found[key], torch.full((96, 64), 9.0, dtype=torch.bfloat16)])
    save(found, checkpoint_id=tmp_path / "padded", no_dist=True)
    shutil.copy(hub / "config.json", tmp_path / "padded")
    moeglot.convert(tmp_path / "padded", HUB, tmp_path / "back")
    assert moeglot.compare(tmp_path / "back", hub).verdict == "holds"
    aside = {key: {"rows": 96, "of": 128} for key in ("embedding.word_embeddings.weight", "output_layer.weight")}
    assert json.loads((tmp_path / "back" / "moeglot.json").read_text())["left_aside"] == aside
    assert told("convert", tmp_path / "padded", tmp_path / "planned", "--to", HUB, "--dry-run")["left_aside"] == aside
    shown = run("convert", tmp_path / "padded", tmp_path / "shown", "--to", HUB).stdout
    assert "leave aside\t96 of 128 rows of output_layer.weight\tconfig.json counts no word there" in shown
    assert "byte for byte, but for what is left aside of 2" in shown
    assert "left aside: 96 of 128 rows of embedding.word_embeddings.weight" in shown
    assert "left_aside" not in told("convert", dist, tmp_path / "planned", "--to", HUB, "--dry-run")
    config = json.loads((hub / "config.json").read_text())
    (tmp_path / "padded" / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    with pytest.raises(moeglot.TensorMismatch, match="at least 1000 rows"):
        _ = moeglot.open(tmp_path / "padded").dense


def test_config_json_alone_says_that_rows_lie_in_blocks(hub: Path, tmp_path: Path) -> None:
    for name in ("megatron-te", "megatron-torch-dist"):
        out = tmp_path / name
        moeglot.convert(hub, f"qwen3-moe/{name}-glu32", out)
        config = json.loads((out / "config.json").read_text())
        assert config.pop("moe_mlp_glu_interleave_size") == 32
        assert "moe_mlp_glu_interleave_size = 32" in str(moeglot.open(out).evidence) or name == "megatron-te"  # which has our mark
        moeglot.convert(out, HUB, tmp_path / f"{name} back")
        assert json.loads((tmp_path / f"{name} back" / "config.json").read_text()).keys() == json.loads((hub / "config.json").read_text()).keys()
        (out / "config.json").write_text(json.dumps(config | {"moe_mlp_glu_interleave_size": 16}))
        with pytest.raises(moeglot.FormatError, match="moe_mlp_glu_interleave_size is 16"):
            moeglot.open(out)
        (out / "config.json").write_text(json.dumps(config))
        if name == "megatron-te":
            with pytest.raises(moeglot.Contradiction, match="the files contradict it"):
                moeglot.open(out)
        else:
            assert moeglot.verify(out, hub).exit_status == 1


ENDS = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}


@pytest.mark.parametrize("key", ENDS)
def test_a_model_without_one_of_its_ends(key: str, dist: Path, tmp_path: Path) -> None:
    """The output alone may be the embedding, where config.json says so."""
    lacking = written_by_torch(dist, tmp_path / "lacking", lambda found: found.pop(key))
    for tied in (False, True):
        config = json.loads((dist / "config.json").read_text()) | {"tie_word_embeddings": tied}
        (lacking / "config.json").write_text(json.dumps(config))
        if tied and key == "output_layer.weight":
            moeglot.convert(lacking, HUB, tmp_path / "tied")
        else:
            with pytest.raises(moeglot.TensorMismatch, match=f"{ENDS[key]}: missing"):
                moeglot.convert(lacking, HUB, tmp_path / "out")


# --- what is refused -----------------------------------------------------------------------------------------------------------------


def rewritten(folder: Path, change: Callable[[Metadata], None]) -> None:
    said = described(folder)
    change(said)
    (folder / ".metadata").write_bytes(pickle.dumps(said))


def _chunk_gone(said: Metadata) -> None:
    said.state_dict_metadata["output_layer.weight"].chunks.pop()


def _place_gone(said: Metadata) -> None:
    del said.storage_data[next(index for index in said.storage_data if index.fqn == "output_layer.weight")]


def _other_dtype(said: Metadata) -> None:
    said.state_dict_metadata["output_layer.weight"].properties.dtype = torch.float16


def _compressed(said: Metadata) -> None:
    next(iter(said.storage_data.values())).transform_descriptors = ["zstd"]


def _elsewhere(said: Metadata) -> None:
    next(iter(said.storage_data.values())).relative_path = "../secret"


def _shapeless(said: Metadata) -> None:
    del said.state_dict_metadata["output_layer.weight"].size


def _twice(said: Metadata) -> None:
    said.state_dict_metadata["output_layer.weight"].chunks *= 2


def _moved(said: Metadata) -> None:
    """The second of two chunks begins before the first one ends; as many rows are in neither."""
    one = said.state_dict_metadata["output_layer.weight"]
    place = said.storage_data.pop(next(index for index in said.storage_data if index.fqn == "output_layer.weight"))
    one.chunks = [ChunkStorageMetadata(torch.Size([first, 0]), torch.Size([16, 64])) for first in (0, 8)]
    said.storage_data |= {MetadataIndex("output_layer.weight", chunk.offsets): place for chunk in one.chunks}


def _endless(said: Metadata) -> None:
    """Numbers that no file could hold: those of so many layers are not looked for."""
    shape = torch.Size([1 << 40, 32, 64])
    said.state_dict_metadata["decoder.layers.odd.weight"] = replace(
        said.state_dict_metadata["output_layer.weight"], size=shape, chunks=[ChunkStorageMetadata(torch.Size([0, 0, 0]), shape)]
    )
    place = next(place for index, place in said.storage_data.items() if index.fqn == "output_layer.weight")
    said.storage_data[MetadataIndex("decoder.layers.odd.weight", torch.Size([0, 0, 0]))] = place


def _numberless(said: Metadata) -> None:
    said.state_dict_metadata["decoder.layers.odd.weight"] = replace(said.state_dict_metadata["output_layer.weight"], size=torch.Size([1 << 40, 0]), chunks=[])


BROKEN = {
    _chunk_gone: "output_layer.weight: its chunks do not make up",
    _place_gone: "is in no file",
    _other_dtype: "another tensor",
    _compressed: "compressed or encrypted",
    _elsewhere: "has no place in a file of this folder",
    _twice: "do not make up",
    _moved: "do not make up",
    _endless: "the chunk at [0, 0, 0] is too short",
    _numberless: "no numbers",
    _shapeless: "not what torch.distributed.checkpoint writes",
}


@pytest.mark.parametrize("change", BROKEN, ids=lambda change: change.__name__)
def test_metadata_that_is_not_so(change: Callable[[Metadata], None], dist: Path) -> None:
    rewritten(dist, change)
    with pytest.raises(moeglot.BrokenFile) as error:
        moeglot.open(dist).dense["lm_head.weight"].read()
    assert BROKEN[change] in error.value.wrong


def places(box: Box) -> set[tuple[int, ...]]:
    return set(product(*map(range, box.starts, box.stops)))


@pytest.mark.parametrize("size", [(6,), (4, 4), (3, 3, 3)])
def test_boxes_overlap_where_brute_force_says_so(size: tuple[int, ...]) -> None:
    random = Random(0)
    for _ in range(400):
        corners = [[sorted(random.choices(range(n + 1), k=2)) for n in size] for _ in range(random.choice((2, 3, 5)))]
        boxes = [Box(*map(tuple, zip(*corner, strict=True))) for corner in corners]
        meeting = [pair for pair in combinations(boxes, 2) if places(pair[0]) & places(pair[1])]
        found = overlapping(boxes)
        assert found in meeting or found[::-1] in meeting if found else not meeting


def test_boxes_that_no_cut_divides() -> None:
    """Four around a fifth."""
    wheel = [Box((0, 0), (1, 2)), Box((0, 2), (2, 3)), Box((2, 1), (3, 3)), Box((1, 0), (3, 1)), Box((1, 1), (2, 2))]
    assert overlapping(wheel) is None
    assert set(overlapping([*wheel[:4], wide := Box((1, 1), (2, 3))]) or ()) == {wheel[1], wide}


def test_fifty_thousand_chunks_are_looked_at_at_once() -> None:
    boxes = [Box((layer, expert, half, 0), (layer + 1, expert + 1, half + 8, 16)) for half in (0, 8) for layer in range(25) for expert in range(1000)]
    began = perf_counter()
    assert overlapping(boxes) is None
    assert overlapping([*boxes, Box((24, 999, 4, 3), (25, 1000, 12, 4))]) is not None
    assert perf_counter() - began < 5


def test_a_file_that_is_cut_short(dist: Path) -> None:
    data = (dist / "__0_0.distcp").read_bytes()
    (dist / "__0_0.distcp").write_bytes(data[: len(data) // 2])
    with pytest.raises(moeglot.BrokenFile, match="missing or too short"):
        moeglot.open(dist)


def where(dist: Path, key: str) -> tuple[Path, int]:
    """The file of a key's first chunk, and a place in it where some of its numbers lie."""
    place = next(place for index, place in described(dist).storage_data.items() if index.fqn == key)
    return dist / place.relative_path, place.offset + place.length // 2


@pytest.mark.parametrize("key", ["decoder.layers.mlp.experts.experts.linear_fc2.weight", "output_layer.weight"])
@pytest.mark.parametrize("writer", ["moeglot", "torch"])
def test_numbers_of_which_a_bit_is_another(writer: str, key: str, dist: Path, tmp_path: Path) -> None:
    """They were saved with their CRC-32, which torch.load does not look at."""
    folder = dist if writer == "moeglot" else written_by_torch(dist, tmp_path / "saved", lambda found: found)
    path, at = where(folder, key)
    data = bytearray(path.read_bytes())
    data[at] ^= 0x04
    path.write_bytes(data)
    with pytest.raises(moeglot.BrokenFile, match="not those whose CRC-32 was saved with them"):
        moeglot.convert(folder, HUB, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_what_torch_saved_without_checksums_is_read(dist: Path, hub: Path, tmp_path: Path) -> None:
    set_crc32_options(False)
    try:
        bare = written_by_torch(dist, tmp_path / "bare", lambda found: found)
    finally:
        set_crc32_options(True)
    path, at = where(bare, "output_layer.weight")
    assert moeglot.compare(bare, hub).verdict == "holds"
    data = bytearray(path.read_bytes())
    data[at] ^= 0x04
    path.write_bytes(data)
    assert moeglot.compare(bare, hub).verdict == "does not hold"


@pytest.mark.parametrize("bit", [0x01, 0x41, 0x80])
def test_no_byte_around_the_numbers_of_a_chunk_moves_them(bit: int, tmp_path: Path) -> None:
    """A damaged disk, or somebody: the numbers are where they were, or the chunk is refused."""
    before, after, _ = frame(moeglot.dtypes.dtype_of(torch.zeros(0)), (3, 5), 0)
    whole, found = before + bytes(60) + after, set()
    for at in (*range(len(before)), *range(len(before) + 60, len(whole))):
        path = tmp_path / str(at)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        try:
            found.add(find_numbers(path, 0, len(whole), "F32", (3, 5)))
        except moeglot.BrokenFile:
            found.add(-1)
    assert found == {-1, len(before)}


PICKLES = {
    "a tuple in a million others": b"})" + b"\x85" * 1_000_000 + b"K\x01s.",
    "the same, kept in the memo": b"})\x94" + b"".join(b"j" + n.to_bytes(4, "little") + b"\x85\x940" for n in range(200_000)) + b"j\x40\x0d\x03\0K\x01s.",
    "the same, and nothing is built of each": b"})" + b"\x85Nb" * 400_000 + b"K\x01s.",
    "the same, and each is appended nothing": b"})" + b"\x85(e" * 400_000 + b"K\x01s.",
    "a place in the memo that costs 16 GB": b"}r\xff\xff\xff\x7f.",
    "a text of 2^62 bytes": b"\x8d" + (1 << 62).to_bytes(8, "little") + b".",
    "a number of 2 GB": b"\x8b\xff\xff\xff\x7fa.",
    "an extension": b"\x82\x01.",
    "a buffer": b"\x97.",
    "a mark that is not there": b"t.",
    "nothing on the stack": b"R.",
    "nothing": b"",
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_that_costs_more_than_its_bytes(case: str) -> None:
    with pytest.raises(moeglot.BrokenFile, match="no pickle that can be read"):
        look_at(b"\x80\x04" + PICKLES[case], ".metadata")


def test_lists_in_lists_are_no_name_of_a_file(dist: Path) -> None:
    said = described(dist)
    next(iter(said.storage_data.values())).relative_path = "deep"
    data = pickle.dumps(said, 3)
    (dist / ".metadata").write_bytes(data.replace(b"X\4\0\0\0deep", b"]" * 100_000 + b"a" * 99_999))
    with pytest.raises(moeglot.BrokenFile, match="not what torch"):
        moeglot.open(dist)


def test_safetensors_beside_it(dist: Path, hub: Path) -> None:
    shutil.copy(hub / "model.safetensors", dist)
    with pytest.raises(moeglot.AmbiguousFormat, match=r"\.metadata and model\.safetensors"):
        moeglot.open(dist)
    shutil.copy(hub / "config.json", dist)
    assert moeglot.open(dist / "model.safetensors").format.name == HUB


def test_the_model_of_the_hub_as_torch_saves_it(hub: Path, tmp_path: Path) -> None:
    """Nothing in it says whose names these are, so that the user does."""
    save(load_file(hub / "model.safetensors"), checkpoint_id=tmp_path / "dcp", no_dist=True)
    shutil.copy(hub / "config.json", tmp_path / "dcp")
    with pytest.raises(moeglot.UnknownFormat, match=r"those of qwen3-moe/hub(.|\n)*torch\.distributed\.checkpoint(.|\n)*pass --format qwen3-moe/hub"):
        moeglot.open(tmp_path / "dcp")
    moeglot.convert(tmp_path / "dcp", "qwen3-moe/transformers-5", tmp_path / "out", format=HUB)
    assert moeglot.compare(tmp_path / "out", hub).verdict == "holds"


def test_the_folder_of_all_iterations(dist: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for number in (5, 15):
        shutil.copytree(dist, root / f"iter_{number:07}")
    with pytest.raises(moeglot.CheckpointError, match=r"iter_0000005, iter_0000015(.|\n)*pass .*root/iter_0000015, with the model's config\.json"):
        moeglot.open(root)
    for said, named in (("5\n", "iter_0000005"), ("release", "release")):
        (root / "latest_checkpointed_iteration.txt").write_text(said)
        with pytest.raises(moeglot.CheckpointError, match=rf"says {said.strip()}(.|\n)*pass .*root/{named}, with"):
            moeglot.open(root)


def test_what_lacks_its_metadata_and_what_never_had_any(dist: Path) -> None:
    (dist / ".metadata").unlink()
    with pytest.raises(moeglot.BrokenFile, match=r"\.metadata is missing(.|\n)*hidden files"):
        moeglot.open(dist)
    (dist / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    with pytest.raises(moeglot.CheckpointError, match=r"an older form(.|\n)*zarr(.|\n)*--ckpt-format torch_dist"):
        moeglot.open(dist)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_nothing_in_a_pickle_is_run(dist: Path, tmp_path: Path) -> None:
    bomb, said = Bomb(tmp_path / "was run"), described(dist)
    said.planner_data = bomb
    (dist / ".metadata").write_bytes(pickle.dumps(said))
    assert moeglot.open(dist).format.name == TARGET
    (dist / ".metadata").write_bytes(pickle.dumps(bomb))
    with pytest.raises(moeglot.BrokenFile, match="does not say which tensors"):
        moeglot.open(dist)
    assert not bomb.marker.exists()
    pickle.loads((dist / ".metadata").read_bytes())  # what it would have done
    assert bomb.marker.exists()


def test_training_state_is_left_aside_and_other_objects_are_not(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a", TARGET)
    whole = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in described(folder).state_dict_metadata.items()}
    load(whole, checkpoint_id=folder, no_dist=True)
    trained = {"rng_state/shard_0_1": torch.zeros(3), "optimizer.state.exp_avg.output_layer.weight": torch.zeros(32, 64)}
    for name, found in {"trained": trained, "odd": {"history": ["what is this"]}}.items():
        save({**whole, **found}, checkpoint_id=tmp_path / name, no_dist=True)
        shutil.copy(folder / "config.json", tmp_path / name)
    assert moeglot.compare(tmp_path / "trained", folder).verdict == "holds"
    with pytest.raises(moeglot.BrokenFile, match=r"history.*an object that is no tensor"):
        moeglot.open(tmp_path / "odd")


def test_more_exact_weights_of_a_training_run_are_told_and_not_read(dist: Path, hub: Path, tmp_path: Path) -> None:
    masters = {f"optimizer.state.{kind}.output_layer.weight": torch.zeros(32, 64) for kind in ("fp32_param", "exp_avg")}
    trained = written_by_torch(dist, tmp_path / "trained", lambda found: found.update(masters))
    (found,) = (finding for finding in moeglot.lint(trained) if finding.about == "more exact weights")
    assert found.figures == {"tensors": 1}
    assert "1 tensors such as optimizer.state.fp32_param.output_layer.weight hold weights in float32" in found.what
    assert found.what.endswith("which are BF16")
    assert moeglot.compare(trained, hub).verdict == "holds"
    assert not [finding for finding in moeglot.lint(dist) if finding.about == "more exact weights"]


def test_the_tokenizer_travels_and_nothing_of_the_checkpoint(dist: Path, tmp_path: Path) -> None:
    (dist / "tokenizer.json").write_text("{}")
    moeglot.convert(dist, HUB, tmp_path / "back")
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["config.json", "model.safetensors", "moeglot.json", "tokenizer.json"]


def test_fp8_goes_there_as_floats_and_comes_back_byte_for_byte(tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain", HUB, {"e": 3, "h": 128, "i": 192}, dtype=torch.bfloat16)
    moeglot.convert(plain, f"{HUB}+fp8-block", tmp_path / "fp8", encode="fp8-block", allow_loss=True)
    with pytest.raises(MoeglotError, match="changes"):
        moeglot.convert(tmp_path / "fp8", TARGET, tmp_path / "refused", encode="bfloat16")  # bfloat16 does not hold code × scale
    moeglot.convert(tmp_path / "fp8", TARGET, tmp_path / "dist", encode="float32")
    moeglot.convert(tmp_path / "dist", f"{HUB}+fp8-block", tmp_path / "back", encode="fp8-block")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("fp8", "back"))
    assert before.keys() == after.keys()
    assert all(before[key].dtype == after[key].dtype and tensor_bytes(before[key]) == tensor_bytes(after[key]) for key in before)
