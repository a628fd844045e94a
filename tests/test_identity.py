"""Folders of processes say of which source they were made: the same, whoever wrote them; and those of two runs are not one model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import run, told
from divisions import model
from ranked import Tensors, marks_of, read, write
from reading import differing
from refusing import refused
from safetensors.torch import load_file, save_file

import moeglot
from moeglot import Contradiction
from moeglot.files import identity
from moeglot.files.shards import Entry
from moeglot.files.source import read_source

TO = "qwen3-moe/megatron"
SOURCE = "moeglot.source"
FIRST = "decoder.layers.0.mlp.experts.local_experts.0.linear_fc2.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("identity") / "base", "qwen3-moe", {"e": 4, "h": 64, "i": 64}, 2)


def changed(source: Path, out: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    shutil.copytree(source, out)
    found = {name: change(name, tensor) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(found, out / "model.safetensors", {"format": "pt"})
    return out


EXPERTS_ALONE = {"ep": {"ep_size": 2}, "pp": {"pp_size": 2}}


@pytest.mark.parametrize("kind", EXPERTS_ALONE)
def test_folders_of_a_base_and_of_what_was_tuned_from_it(kind: str, source: Path, tmp_path: Path) -> None:
    """They differ in what no two processes share, so that nothing else tells."""
    tuned = changed(source, tmp_path / "tuned", lambda name, tensor: tensor * 1.5 if ".experts." in name else tensor)
    for rank, given in enumerate((source, tuned)):
        moeglot.convert(given, TO, tmp_path / "ranks" / str(rank), **EXPERTS_ALONE[kind], **{f"{kind}_rank": rank})
    with refused(Contradiction, "folders of different sources", ("moeglot.source says", "ranks/0", "ranks/1"), "write them again, of one model"):
        moeglot.open(tmp_path / "ranks")


def test_it_is_the_same_whoever_writes_it(source: Path, tmp_path: Path) -> None:
    """In one go, in parts, in a process of its own; of a copy under another name; by way of another format."""
    copy = shutil.copytree(source, tmp_path / "copy")
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    moeglot.convert(source, TO, tmp_path / "ranks" / "0", ep_rank=0, ep_size=2)
    run("convert", copy, tmp_path / "engine", "--to", "qwen3-moe/megatron-te", "--ep-rank", 1, "--ep-size", 2, "--part", "1/1")
    moeglot.finalize(moeglot.plan(copy, "qwen3-moe/megatron-te", ep_rank=1, ep_size=2), tmp_path / "engine")
    moeglot.convert(tmp_path / "engine", TO, tmp_path / "ranks" / "1")
    said = {marks_of(folder)[SOURCE] for folder in (*(tmp_path / "ranks").iterdir(), tmp_path / "engine")}
    assert said == {moeglot.open(source).source.identity}
    assert moeglot.convert(tmp_path / "ranks", "qwen3-moe/hub", tmp_path / "again").report.verdict == "holds"
    assert differing(tmp_path / "again", source) == []
    assert f"moeglot.source = {said.pop()}" in str(told("inspect", tmp_path / "ranks")["evidence"])


def test_a_sample_of_a_large_file_is_a_sample_of_all_of_it(tmp_path: Path) -> None:
    """Whatever is another in every tensor is seen, though few bytes are read."""
    tensors = {f"t{n}": torch.randn(64, 1024) for n in range(64)}
    found = []
    for out, factor in (("a", 1.0), ("b", 1.001)):
        (tmp_path / out).mkdir()
        save_file({name: tensor * factor for name, tensor in tensors.items()}, tmp_path / out / "model.safetensors")
        found.append(read_source(tmp_path / out))
    assert found[0].nbytes > 10 * identity.PLACES * identity.PIECE
    assert found[0].identity != found[1].identity
    places = [(at, at + count) for _, at, count in identity._places(found[0].shards, [found[0].shards[0].stat().st_size])]
    touched = {e.name for e in found[0].entries.values() if any(start < e.end and e.start < end for start, end in places)}
    assert touched == tensors.keys()
    assert len(places) == identity.PLACES


def test_a_sample_of_several_files_is_a_sample_of_each(tmp_path: Path) -> None:
    """And what the headers say is in it, of which a sample sees little."""
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file in files:
        file.write_bytes(bytes(500_000))
    entry = Entry("t", "F32", (2, 3), files[0], 0, 24)
    found = {identity.identity(files, {"t": one}) for one in (entry, entry._replace(name="u"), entry._replace(dtype="I32"), entry._replace(shape=(3, 2)))}
    for file in files:
        file.write_bytes(bytes(400_000) + b"1" * 100_000)
        found.add(identity.identity(files, {"t": entry}))
        file.write_bytes(bytes(500_000))
    assert len(found) == 7
    files[1].write_bytes(bytes(500_001))
    assert identity.identity(files, {"t": entry}) not in found


def test_folders_that_do_not_say_it_are_read_and_that_is_told(source: Path, tmp_path: Path) -> None:
    """As earlier releases wrote them. One that says it beside one that does not was written at another time."""
    for rank in (0, 1):
        moeglot.convert(source, TO, tmp_path / "ranks" / str(rank), ep_rank=rank, ep_size=2)
    strip(tmp_path / "ranks" / "1")
    with refused(Contradiction, "folders of different sources", ("moeglot.source says", "and nothing in")):
        moeglot.open(tmp_path / "ranks")
    strip(tmp_path / "ranks" / "0")
    assert "no moeglot.source: that they were made of one source, only what several of them hold alike tells" in moeglot.open(tmp_path / "ranks").known
    assert moeglot.convert(tmp_path / "ranks", "qwen3-moe/hub", tmp_path / "again").report.verdict == "holds"


def strip(folder: Path) -> None:
    write(folder, read(folder), {key: value for key, value in marks_of(folder).items() if key != SOURCE})
    (folder / "moeglot.json").unlink()


def test_shards_of_two_sources(source: Path, tmp_path: Path) -> None:
    tuned = changed(source, tmp_path / "tuned", lambda _, tensor: tensor * 1.5)
    folders = [tmp_path / "0", tmp_path / "1"]
    for given, folder in zip((source, tuned), folders, strict=True):
        moeglot.convert(given, TO, folder, ep_rank=0, ep_size=2, shard_size=60_000)
    name = sorted(path.name for path in folders[0].glob("*.safetensors"))[0]
    (folders[0] / name).write_bytes((folders[1] / name).read_bytes())
    with refused(Contradiction, "the shards were made of different sources", "moeglot.source = "):
        moeglot.plan(folders[0], "qwen3-moe/megatron-te")


def negate(found: Tensors) -> None:
    found[FIRST] = -found[FIRST]


def test_a_file_that_was_changed_after_it_was_certified(source: Path, tmp_path: Path) -> None:
    """Its mark and all that others hold are as they were."""
    for rank in (0, 1):
        moeglot.convert(source, TO, tmp_path / "ranks" / str(rank), ep_rank=rank, ep_size=2)
    found = read(tmp_path / "ranks" / "1")
    negate(found)
    write(tmp_path / "ranks" / "1", found, marks_of(tmp_path / "ranks" / "1"))
    with refused(Contradiction, "1/model.safetensors is not as moeglot.json beside it certifies it", "changed after it was written", "remove moeglot.json"):
        moeglot.convert(tmp_path / "ranks", "qwen3-moe/hub", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "ranks" / "1" / "moeglot.json").unlink()
    shutil.rmtree(tmp_path / "out.partial")
    assert moeglot.convert(tmp_path / "ranks", "qwen3-moe/hub", tmp_path / "out").report.verdict == "holds"
