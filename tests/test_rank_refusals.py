"""What is refused of the state dict of one process: options and targets that cannot be, files that do not say whose they are, wrong comparisons."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from ranked import ALONE, LAYERS, RANKS, SIZES, marks_of, of_rank, read, write
from refusing import refused
from synthetic import write_checkpoint

import moeglot
from moeglot import Contradiction, TensorMismatch, UnknownFormat, UsageError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("ranks") / "qwen", "qwen3-moe/hub", SIZES["h=i"], LAYERS)


@pytest.fixture(scope="module")
def made(source: Path) -> Path:
    return of_rank(source, "qwen3-moe/megatron-te", source.with_name("states"))


@pytest.fixture
def states(made: Path, tmp_path: Path) -> Path:
    """Of rank 1, with transformer-engine's names; a copy, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "states"))


STATE_DICTS = ("qwen3-moe/megatron, ", "qwen3-moe/megatron-te, ", "qwen3-moe/megatron-grouped")


@pytest.mark.parametrize(
    ("to", "options", "wrong", "known", "do"),
    [
        ("qwen3-moe/megatron", {"ep_rank": 0, "ep_size": 4}, "6 experts on 4 processes", "as many as the others", "a divisor of 6"),
        ("qwen3-moe/megatron", {"ep_rank": 3, "ep_size": 3}, "--ep-rank 3 --ep-size 3", "the last of 3 is 2", "--ep-rank 0 to 2"),
        ("qwen3-moe/megatron", {"ep_rank": -1, "ep_size": 3}, "--ep-rank -1 --ep-size 3", "counted from 0", "--ep-rank 0 to 2"),
        ("qwen3-moe/megatron", {"ep_rank": 0, "ep_size": 0}, "--ep-rank 0 --ep-size 0", "at least one", "--ep-size 1 or more"),
        ("qwen3-moe/megatron", {"ep_rank": 1}, "--ep-rank without --ep-size", "one of several", "pass --ep-size too"),
        ("qwen3-moe/megatron", {"ep_size": 3}, "--ep-size without --ep-rank", "one of several", "pass --ep-rank too"),
        ("qwen3-moe/transformers-5", {"ep_rank": 0, "ep_size": 3}, "with what ep rank 0 of 3 holds alone", STATE_DICTS, "leave the ranks and sizes out"),
        ("qwen3-moe/hub+fp8-block", {"ep_rank": 0, "ep_size": 3}, "with what ep rank 0 of 3 holds alone", STATE_DICTS, "leave the ranks and sizes out"),
        ("qwen3-moe/megatron-torch-dist", {"ep_rank": 0, "ep_size": 3}, "rank 0 of 3", "reads its own part from one torch_dist", "leave the ranks"),
        ("qwen3-moe/hub", {"ep_rank": 0, "ep_size": 1}, "rank 0 of 1", STATE_DICTS, "leave the ranks"),
    ],
)
def test_what_cannot_be_asked_for(to: str, options: dict[str, Any], wrong: str, known: str, do: str, source: Path, tmp_path: Path) -> None:
    with refused(UsageError, wrong, known, do):
        moeglot.convert(source, to, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_family_without_such_a_file(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "olmoe/hub", SIZES["h=i"], LAYERS)
    with refused(UsageError, "olmoe/hub", "none of olmoe's formats", "leave the ranks and sizes out"):
        moeglot.plan(source, "olmoe/hub", ep_rank=0, ep_size=3)


@pytest.mark.parametrize("to", ["qwen3-moe/hub", "qwen3-moe/megatron-torch-dist"])
def test_it_is_no_whole_model(to: str, states: Path) -> None:
    with refused(UsageError, "has what ep rank 1 of 3 holds alone", STATE_DICTS, "the folder that holds the folders of all ranks"):
        moeglot.plan(states, to)


def test_it_is_no_model_to_load(states: Path) -> None:
    pytest.importorskip("transformers")
    for options in ({}, {"native": True}):
        with refused(UsageError, "has what ep rank 1 of 3 holds alone", STATE_DICTS, "the folder that holds the folders of all ranks"):
            moeglot.load(states, **options)


def test_it_is_that_of_no_other_process(source: Path, states: Path, tmp_path: Path) -> None:
    other = of_rank(source, "qwen3-moe/megatron-te", tmp_path / "other", 2)
    for asked in ((0, 3), (0, 1), (1, 2)):
        with refused(
            UsageError, ("has what ep rank 1 of 3 holds, not what", f"rank {asked[0]} of {asked[1]}"), f"moeglot.share = {ALONE.format(1)}", "the whole model"
        ):
            moeglot.plan(states, "qwen3-moe/megatron-te", ep_rank=asked[0], ep_size=asked[1])
    with refused(UsageError, "has what ep rank 2 of 3 holds, not what ep rank 1 of 3 does"):
        moeglot.compare(states, other)
    with refused(Contradiction, ("has the whole model", "what ep rank 1 of 3 holds"), "what the first one has", "first"):
        moeglot.verify(source, states)


def test_no_adapter_on_some_of_the_experts(source: Path, states: Path, tmp_path: Path) -> None:
    with refused(UsageError, "an adapter for", "its factors are those of the whole model", "merge it into the whole model"):
        moeglot.open_adapter(tmp_path / "adapter", states)
    with refused(UsageError, "an adapter, and what ep rank 0 of 3 holds", "its factors are those of the whole model", "merge it into the whole model"):
        moeglot.plan(source, "qwen3-moe/megatron", adapter=tmp_path / "adapter", ep_rank=0, ep_size=3)


@pytest.mark.parametrize("format", [None, "qwen3-moe/megatron-te"])
def test_without_the_mark_experts_are_missing(format: str | None, states: Path) -> None:
    marks = marks_of(states)
    assert marks.pop("moeglot.share") == ALONE.format(1)
    for kept in (marks, {}):
        write(states, read(states), kept)
        with refused(TensorMismatch, "weight2: missing", (), "where the safetensors header says moeglot.share"):
            moeglot.open(states, format)


def test_without_the_mark_the_legacy_shapes_contradict(source: Path, tmp_path: Path) -> None:
    out = of_rank(source, "qwen3-moe/megatron-grouped", tmp_path / "out")
    write(out, read(out), {"moeglot.format": "qwen3-moe/megatron-grouped"})
    with refused(Contradiction, "the files contradict it", "weight1 is [64, 256]"):
        moeglot.open(out)
    write(out, read(out), {})
    with refused(UnknownFormat, "in no format that moeglot knows", "weight1 is [64, 256]"):
        moeglot.open(out)
    with refused(TensorMismatch, "weight1"):
        moeglot.open(out, "qwen3-moe/megatron-grouped")


@pytest.mark.parametrize(
    ("said", "wrong", "known"),
    [
        ("rank 3 of 3", "moeglot.share = rank 3 of 3", "each R below its N"),
        ("1/3", "moeglot.share = 1/3", "ep rank R of N'"),
        ("rank 1 of 4", "6 experts on 4 processes", ("ep rank 1 of 4", "config.json")),
    ],
)
def test_a_mark_that_cannot_be(said: str, wrong: str, known: str, states: Path) -> None:
    write(states, read(states), marks_of(states) | {"moeglot.share": said})
    with refused(Contradiction, wrong, known):
        moeglot.open(states)


def test_a_mark_of_fewer_experts_than_there_are(states: Path) -> None:
    write(states, read(states), marks_of(states) | {"moeglot.share": "rank 1 of 6"})
    with refused(TensorMismatch, "weight1: extra"):
        moeglot.open(states)


def test_shards_of_two_processes(source: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "0", tmp_path / "1"]
    for rank, folder in enumerate(folders):
        moeglot.convert(source, "qwen3-moe/megatron", folder, ep_rank=rank, ep_size=RANKS, shard_size=60_000)
    name = sorted(path.name for path in folders[0].glob("*.safetensors"))[0]
    (folders[0] / name).write_bytes((folders[1] / name).read_bytes())
    with refused(Contradiction, "different processes", ("ep rank 0 of 3 and ", "ep rank 1 of 3")):
        moeglot.open(folders[0])


def test_a_mark_in_a_format_for_all_experts(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    write(folder, read(source), {"moeglot.format": "qwen3-moe/hub", "moeglot.share": "rank 1 of 3"})
    with refused(Contradiction, "qwen3-moe/hub", f"moeglot.share = {ALONE.format(1)}, and qwen3-moe/hub is for whole models"):
        moeglot.open(folder)
