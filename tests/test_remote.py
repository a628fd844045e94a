"""Checkpoints by URL: read by ranges, exactly what is asked for, to the same bytes as from a disk."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from counting import READ, total, upload
from synthetic import write_checkpoint

import moeglot
from moeglot.errors import BrokenFile, CheckpointError, OutputExists, PickleRefused, UsageError
from moeglot.remote import Remote, local_only, location
from moeglot.source import read_source
from moeglot.stream import threads

TO, SHARD_SIZE = "gpt-oss/transformers", 100_000


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("remote") / "source", "gpt-oss/openai", {"e": 8}, layers=2, shards=2)
    (folder / "tokenizer.json").write_text('{"carried": "over"}')
    return folder


@pytest.fixture
def store(source: Path) -> Iterator[str]:
    """The same in memory://models/gpt-oss, whose reads are counted under counted://."""
    fs = fsspec.filesystem("memory")
    upload(fs, source, "/models/gpt-oss")
    READ.clear()
    yield "counted://models/gpt-oss"
    fs.rm("/models", recursive=True)


def headers(source: Path) -> int:
    return sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in source.glob("*.safetensors"))


@pytest.mark.parametrize("url", ["memory://models/gpt-oss", "file://{source}", "counted://models/gpt-oss/", "counted://models/gpt-oss"])
def test_a_conversion_from_a_url_is_that_from_a_disk(url: str, source: Path, store: str, tmp_path: Path) -> None:
    """Every file, the certificate too."""
    moeglot.convert(source, TO, tmp_path / "disk", shard_size=SHARD_SIZE)
    moeglot.convert(url.format(source=source), TO, tmp_path / "url", shard_size=SHARD_SIZE)
    assert tree(tmp_path / "url") == tree(tmp_path / "disk")
    assert (tmp_path / "url" / "tokenizer.json").exists()


def test_looking_reads_headers_alone(source: Path, store: str) -> None:
    """To the byte: headers, the index and config.json."""
    found = moeglot.open(store)
    assert found.format.name == "gpt-oss/openai"
    weights = sum(count for file, count in READ if file.endswith(".safetensors"))
    assert weights == headers(source)
    assert total() == weights + sum((source / name).stat().st_size for name in ("config.json", "model.safetensors.index.json"))


def test_an_expert_is_read_by_its_bytes_alone(source: Path, store: str) -> None:
    """And it is that of the disk."""
    found, disk = moeglot.open(store), moeglot.open(source)
    READ.clear()
    expert = found.experts(1)["down"][5]
    numbers = expert.decode(torch.float32)
    assert total() == 64 * 64 // 2 + 64 * 64 // 32  # blocks and scales of one matrix
    assert torch.equal(numbers, disk.experts(1)["down"][5].decode(torch.float32))


def test_no_request_is_for_a_file(source: Path, store: str, tmp_path: Path) -> None:
    """A conversion asks for slices; the checksums of its certificate, which need every byte, in pieces too. No byte of a weight is fetched to be kept."""
    plan = moeglot.plan(store, TO)
    READ.clear()
    folder = tmp_path / "files"
    folder.mkdir()
    for shard in plan.shards:
        (folder / shard.file).write_bytes(bytes(shard.nbytes))
    assert len(list(threads(2)(plan, folder, plan.units, True))) == len(plan.units)
    largest = max(entry.nbytes for entry in plan.source.source.entries.values())
    assert max(count for _, count in READ) < largest, "no tensor of all experts was read as a whole"
    assert total() == sum(entry.nbytes for entry in plan.source.source.entries.values()), "each byte once"


def test_a_live_model_from_a_url(store: str, source: Path) -> None:
    pytest.importorskip("transformers")
    tokens = torch.arange(8)[None]
    found, disk = (moeglot.load(path, dtype="float32", native=True)(input_ids=tokens).logits for path in (store, source))
    assert torch.equal(found, disk)


def test_a_single_file(store: str, source: Path) -> None:
    file = "model-00001-of-00002.safetensors"
    found, disk = read_source(f"{store}/{file}"), read_source(source / file)
    assert found.entries.keys() == disk.entries.keys()
    assert found.single
    assert found.config == disk.config


# --- what is refused -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["memory://out", "s3://bucket/out", Path("s3://bucket/out")])
def test_an_output_is_not_a_url(out: str | Path, source: Path) -> None:
    with pytest.raises(UsageError, match="is a URL"):
        moeglot.convert(source, TO, out)
    assert local_only("plain/path", "OUT") == Path("plain/path")


def test_the_command_line_refuses_it_too(source: Path) -> None:
    ran = subprocess.run([sys.executable, "-m", "moeglot.cli", "convert", str(source), "s3://bucket/out", "--to", TO], capture_output=True, text=True)
    assert ran.returncode == 2
    assert "is a URL" in ran.stderr
    assert not Path("s3:").exists()


@pytest.mark.parametrize(
    ("url", "error", "match"),
    [
        ("memory://nothing/here", CheckpointError, "nothing is there"),
        ("nonsense://x/y", UsageError, "no store that could be opened"),
        ("memory://models", CheckpointError, "no safetensors file is here"),
    ],
)
def test_what_is_not_there(url: str, error: type[Exception], match: str, store: str) -> None:
    with pytest.raises(error, match=match):
        moeglot.open(url)


def test_a_store_of_pickles(store: str) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/models/old/pytorch_model.bin", b"x")
    with pytest.raises(PickleRefused, match="only pickle files"):
        moeglot.open("memory://models/old")


def test_a_file_that_is_cut_off(store: str, source: Path) -> None:
    fs = fsspec.filesystem("memory")
    file = "model-00002-of-00002.safetensors"
    fs.pipe_file(f"/models/gpt-oss/{file}", (source / file).read_bytes()[:-10])
    with pytest.raises(BrokenFile, match="truncated"):
        moeglot.open(store)


def test_a_file_that_shrinks_while_it_is_read(store: str, source: Path) -> None:
    found = moeglot.open(store)
    fs = fsspec.filesystem("memory")
    for path in source.glob("*.safetensors"):
        fs.pipe_file(f"/models/gpt-oss/{path.name}", path.read_bytes()[:9000])
    with pytest.raises(CheckpointError, match="asked for"):
        list(moeglot.verify(found).checks)


def test_a_source_that_changed_in_its_store_is_another(store: str, source: Path, tmp_path: Path) -> None:
    moeglot.write_part(moeglot.plan(store, TO), tmp_path / "out", "1/2")
    fs = fsspec.filesystem("memory")
    upload(fs, source, "/models/gpt-oss")  # the same bytes; their store says that they are new
    with pytest.raises(OutputExists, match="belongs to another conversion"):
        moeglot.write_part(moeglot.plan(store, TO), tmp_path / "out", "2/2")


def test_what_is_a_url() -> None:
    assert isinstance(location("s3://bucket/key"), Remote)
    assert isinstance(location("blockcache::s3://bucket/key"), Remote)
    assert location("file:///data/x") == Path("/data/x")
    assert location("openai/gpt-oss-20b") == Path("openai/gpt-oss-20b")
    assert location("/data/a:/b") == Path("/data/a:/b")
