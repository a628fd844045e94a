"""Checkpoints by URL: read by ranges, exactly what is asked for, to the same bytes as from a disk."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from counting import READ, total, upload
from reading import tree
from synthetic import write_checkpoint

import moeglot
from moeglot.conversion.store import Store, shards_of
from moeglot.conversion.stream import Engine, stream, threads
from moeglot.errors import BrokenFile, CheckpointError, NotVerified, OutputError, OutputExists, PickleRefused, UsageError
from moeglot.files.digests import CHUNK, REQUEST, digests
from moeglot.files.remote import Remote, local_only, location
from moeglot.files.source import read_source

TO, SHARD_SIZE, SMALL = "gpt-oss/transformers", 100_000, 30_000
"""The small one cuts between the parts of a layer."""


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


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, REQUEST, 2 * REQUEST + CHUNK // 2 + 1])
def test_the_digest_of_a_file_is_that_of_all_of_its_bytes(size: int, tmp_path: Path) -> None:
    """Whatever is read of it at a time, here and in a store."""
    data = (b"moeglot" * (size // 7 + 1))[:size]
    expected = hashlib.sha256(data).hexdigest()
    (tmp_path / "file").write_bytes(data)
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/digests/file", data)
    places = [location(tmp_path / "file"), location("memory://digests/file")]
    assert digests(places, 2) == dict.fromkeys(places, expected)
    fs.rm("/digests", recursive=True)


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


# --- an output in a store -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def out() -> Iterator[str]:
    yield "memory://made/out"
    fs = fsspec.filesystem("memory")
    if fs.exists("/made"):
        fs.rm("/made", recursive=True)


def stored(folder: str) -> dict[str, bytes]:
    fs = fsspec.filesystem("memory")
    return {path.rsplit("/", 1)[-1]: fs.cat_file(path) for path in fs.find(folder)}


def failing(after: int) -> Engine:
    """Threads that die after so many units."""
    inner = threads(1)

    def run(*arguments: Any) -> Iterator[Any]:
        nonlocal after
        for unit in inner(*arguments):
            yield unit
            after -= 1
            if after == 0:
                raise RuntimeError("died")

    return run


def begun(source: Path, out: str, after: int) -> None:
    """An output of which some units were made when its run died."""
    plan, work = moeglot.plan(source, TO, shard_size=SMALL), Store(Remote(out))
    with work.session(plan, False) as done, pytest.raises(RuntimeError, match="died"):
        stream(plan, work, done, plan.units, work.engine(failing(after)), False, None)


def test_a_live_model_goes_to_a_store(source: Path, out: str, tmp_path: Path) -> None:
    """With the options of `convert` that mean something there."""
    pytest.importorskip("transformers")
    model = moeglot.load(source, dtype="float32", native=True)
    with pytest.raises(UsageError, match="nothing can be decoded on 'nowhere'"):
        moeglot.save(model, out, to=TO, device="nowhere")
    for place in (tmp_path / "disk", out):
        moeglot.save(model, place, to=TO, shard_size="500KB", device="cpu")
    assert stored("/made/out") == tree(tmp_path / "disk")
    assert stored("/made") == stored("/made/out")


@pytest.mark.parametrize("size", [SHARD_SIZE, SMALL, 5_000_000])
def test_an_output_in_a_store_is_that_on_a_disk(size: int, source: Path, out: str, tmp_path: Path) -> None:
    """Every file; and it is a checkpoint that can be read there."""
    moeglot.convert(source, TO, tmp_path / "disk", shard_size=size)
    certificate = moeglot.convert(source, TO, out, shard_size=size)
    assert stored("/made/out") == tree(tmp_path / "disk")
    assert stored("/made") == stored("/made/out"), "nothing else is left"
    assert str(certificate.out) == out
    assert moeglot.compare(out, source).verdict == "holds"


def test_a_folder_of_templates_goes_to_a_store(source: Path, out: str, tmp_path: Path) -> None:
    """What lies deeper is moved as well; and nothing is removed that was not."""
    with_templates = Path(shutil.copytree(source, tmp_path / "source"))
    (with_templates / "additional_chat_templates").mkdir()
    (with_templates / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    moeglot.convert(with_templates, TO, tmp_path / "disk")
    moeglot.convert(with_templates, TO, out)
    fs = fsspec.filesystem("memory")
    assert {path.removeprefix("/made/out/"): fs.cat_file(path) for path in fs.find("/made")} == tree(tmp_path / "disk")


def test_what_could_not_be_moved_is_not_removed(source: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Remote, "move", lambda *_: None)
        with pytest.raises(OutputError, match="was not moved to"):
            moeglot.convert(source, TO, out)
    moeglot.convert(source, TO, out, resume=True)
    assert stored("/made") == stored("/made/out")


def test_an_empty_work_folder_beside_the_output_of_another_model(source: Path, out: str, tmp_path: Path) -> None:
    """It is not said to be the output of this one; of the model that it was made of, it is."""
    other = write_checkpoint(tmp_path / "other", "gpt-oss/openai", {"e": 8}, layers=2, seed=1)
    moeglot.convert(other, TO, out)
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/made/out.partial/nothing", b"")
    with pytest.raises(OutputExists, match="overwrites nothing"):
        moeglot.convert(source, TO, out, resume=True)
    assert moeglot.convert(other, TO, out, resume=True).report.verdict == "holds"
    assert stored("/made") == stored("/made/out")


@pytest.mark.parametrize("text", ['{"pl', "[]", '{"plan": "x"}', '{"plan": "PLAN", "units": {"x": [0]}}'])
def test_a_damaged_journal_in_a_store(text: str, source: Path, out: str) -> None:
    begun(source, out, 60)
    fs = fsspec.filesystem("memory")
    digest = moeglot.plan(source, TO, shard_size=SMALL).digest
    fs.pipe_file(fs.find("/made/out.partial/journal")[0], text.replace("PLAN", digest).encode())
    with pytest.raises(OutputExists, match="this journal is damaged"):
        moeglot.convert(source, TO, out, shard_size=SMALL, resume=True)


@pytest.mark.parametrize("after", [1, 9, 30, 60])
def test_an_upload_that_died_goes_on(after: int, source: Path, out: str, tmp_path: Path) -> None:
    """Shards that are there are neither made nor sent again."""
    moeglot.convert(source, TO, tmp_path / "disk", shard_size=SMALL)
    begun(source, out, after)
    fs = fsspec.filesystem("memory")
    assert not fs.exists("/made/out")
    before = {path: fs.modified(path) for path in fs.find("/made") if path.endswith(".safetensors")}
    assert bool(before) == (after > 1)
    if before:  # else there is nothing to go on with
        with pytest.raises(OutputExists, match=r"or goes on now: a store has no locks.*\n.*--resume"):
            moeglot.convert(source, TO, out, shard_size=SMALL)
        with pytest.raises(OutputExists, match="belongs to another conversion"):
            moeglot.convert(source, "gpt-oss/original", out, resume=True)
    told: list[int] = []
    moeglot.convert(source, TO, out, shard_size=SMALL, resume=True, progress=lambda what, done, _: told.append(done) if what == "writing" else None)
    plan, there = moeglot.plan(source, TO, shard_size=SMALL), {path.rsplit("/", 1)[-1] for path in before}
    assert len(told) == sum(not files <= there for files in shards_of(plan).values()) < len(plan.units) + (after == 1)
    assert stored("/made/out") == tree(tmp_path / "disk")
    assert stored("/made") == stored("/made/out")


def _die_while_it_gets_its_name(at: str, source: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its last file, before its certificate, or before what is left was removed."""
    move = Remote.move

    def dying(path: Remote, *to: Remote) -> None:
        if path.name == at or not to:
            raise RuntimeError("died")
        move(path, *to)

    with monkeypatch.context() as patched:
        patched.setattr(Remote, "move", dying)
        patched.setattr(Remote, "remove", dying)
        with pytest.raises(RuntimeError, match="died"):
            moeglot.convert(source, TO, out, shard_size=SMALL)


@pytest.mark.parametrize("at", ["tokenizer.json", "moeglot.json", "the journal"])
def test_an_upload_that_died_while_it_got_its_name(at: str, source: Path, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moeglot.convert(source, TO, tmp_path / "disk", shard_size=SMALL)
    _die_while_it_gets_its_name(at, source, out, monkeypatch)
    assert stored("/made/out.partial")
    moeglot.convert(source, TO, out, shard_size=SMALL, resume=True)
    assert stored("/made/out") == tree(tmp_path / "disk")
    assert stored("/made") == stored("/made/out")


@pytest.mark.parametrize("at", ["tokenizer.json", "moeglot.json", "the journal"])
def test_an_upload_that_died_while_it_got_its_name_and_was_changed_since(at: str, source: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has read those bytes, so nobody may say that they hold; what is told to be removed is all that is in the way."""
    _die_while_it_gets_its_name(at, source, out, monkeypatch)
    fs = fsspec.filesystem("memory")
    shard = max(path for path in fs.find("/made") if path.endswith(".safetensors"))
    data = bytearray(fs.cat_file(shard))
    data[-1] ^= 1
    fs.pipe_file(shard, bytes(data))
    before = stored("/made/out")
    with pytest.raises(NotVerified, match=f"{shard.rsplit('/', 1)[-1]} is not as moeglot.json certifies it") as refused:
        moeglot.convert(source, TO, out, shard_size=SMALL, resume=True)
    assert before.items() <= stored("/made/out").items()
    assert refused.value.do == f"remove {out} and {out}.partial, and begin again"
    for folder in ("/made/out", "/made/out.partial"):
        fs.rm(folder, recursive=True)
    assert moeglot.convert(source, TO, out, shard_size=SMALL).report.verdict == "holds"


def test_an_upload_that_died_before_it_was_noted(source: Path, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first shard is there and no journal is: the folder says all the same whose it is, and without that it may be anybody's."""
    moeglot.convert(source, TO, tmp_path / "disk", shard_size=SMALL)
    write = Remote.write_text

    def dying(path: Remote, text: str, encoding: str = "utf-8") -> None:
        if path.parent.name == "journal":
            raise RuntimeError("died")
        write(path, text, encoding)

    with monkeypatch.context() as patched:
        patched.setattr(Remote, "write_text", dying)
        with pytest.raises(RuntimeError, match="died"):
            moeglot.convert(source, TO, out, shard_size=SMALL)
    fs = fsspec.filesystem("memory")
    assert [path.rsplit(".", 1)[-1] for path in fs.find("/made/out.partial")] == ["safetensors", "partial/plan"]
    with pytest.raises(OutputExists, match="belongs to another conversion"):
        moeglot.convert(source, "gpt-oss/original", out, resume=True)
    said = fs.cat_file("/made/out.partial/plan")
    fs.rm("/made/out.partial/plan")
    with pytest.raises(OutputExists, match="has files and no journal"):
        moeglot.convert(source, TO, out, shard_size=SMALL, resume=True)
    fs.pipe_file("/made/out.partial/plan", b"{")
    with pytest.raises(OutputExists, match="this journal is damaged"):
        moeglot.convert(source, TO, out, shard_size=SMALL, resume=True)
    fs.pipe_file("/made/out.partial/plan", said)
    moeglot.convert(source, TO, out, shard_size=SMALL, resume=True)
    assert stored("/made/out") == tree(tmp_path / "disk")
    assert stored("/made") == stored("/made/out")


def test_a_journal_of_an_older_release_goes_on(source: Path, out: str, tmp_path: Path) -> None:
    """It has no more than an object for each shard."""
    moeglot.convert(source, TO, tmp_path / "disk", shard_size=SMALL)
    begun(source, out, 60)
    fs = fsspec.filesystem("memory")
    fs.rm("/made/out.partial/plan")
    moeglot.convert(source, TO, out, shard_size=SMALL, resume=True)
    assert stored("/made/out") == tree(tmp_path / "disk")
    assert stored("/made") == stored("/made/out")


def test_wrong_bytes_in_a_store_do_not_hold(source: Path, out: str) -> None:
    """The journal says that the shard is there; it is read again all the same."""
    begun(source, out, 60)
    fs = fsspec.filesystem("memory")
    shard = max((path for path in fs.find("/made") if path.endswith(".safetensors")), key=lambda path: fs.size(path))
    data = bytearray(fs.cat_file(shard))
    data[-3000:-1000] = bytes(2000)
    fs.pipe_file(shard, bytes(data))
    with pytest.raises(moeglot.MoeglotError):
        moeglot.convert(source, TO, out, shard_size=SMALL, resume=True)
    assert not fs.exists("/made/out")


def test_nothing_in_a_store_is_overwritten(source: Path, out: str) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/made/out/notes.txt", b"mine")
    with pytest.raises(OutputExists, match="overwrites nothing"):
        moeglot.convert(source, TO, out)
    assert stored("/made") == {"notes.txt": b"mine"}


# --- what is refused -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["memory://out", "s3://bucket/out", Path("s3://bucket/out")])
def test_parts_are_not_written_to_a_url(out: str | Path, source: Path) -> None:
    """Nor is what a cluster does; and a path that was a URL once is no folder."""
    with pytest.raises(UsageError, match="is a URL"):
        moeglot.write_part(moeglot.plan(source, TO), out, "1/2")
    with pytest.raises(UsageError, match="is a URL"):
        moeglot.convert(source, TO, out, engine=threads(1))
    assert local_only("plain/path", "OUT") == Path("plain/path")
    assert not Path("s3:").exists()


def test_the_command_line_takes_the_url_as_it_is(source: Path) -> None:
    ran = subprocess.run([sys.executable, "-m", "moeglot.cli.main", "convert", str(source), "nowhere://bucket/out", "--to", TO], capture_output=True, text=True)
    assert ran.returncode == 2
    assert "nowhere://bucket/out" in ran.stderr
    assert not Path("nowhere:").exists()


@pytest.mark.parametrize(
    ("url", "error", "match"),
    [
        ("memory://nothing/here", CheckpointError, "nothing is there"),
        ("nonsense://x/y", UsageError, "no store that could be opened"),
        ("memory://models", CheckpointError, "no safetensors file is here"),
        ("blockcache::memory://models/gpt-oss", UsageError, "a cache of blocks may be wrong"),
        ("simplecache::cached::memory://models/gpt-oss", UsageError, "a cache of blocks may be wrong"),
    ],
)
def test_what_is_not_there(url: str, error: type[Exception], match: str, store: str) -> None:
    with pytest.raises(error, match=match):
        moeglot.open(url)


@pytest.mark.parametrize(("path", "match"), [("", "no folders that could be listed"), ("/model-00001-of-00002.safetensors", "gives no ranges")])
def test_a_server_of_plain_http(path: str, match: str, source: Path) -> None:
    """Python's own lists no folder as a store does, and sends whole files."""
    pytest.importorskip("aiohttp")
    handler = partial(SimpleHTTPRequestHandler, directory=str(source.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever, 0.01)
        with pytest.raises(CheckpointError, match=match):
            moeglot.open(f"http://127.0.0.1:{server.server_address[1]}/{source.name}{path}")
        server.shutdown()


@pytest.mark.parametrize("header", [{"a\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}, {"__metadata__": {"a": "\udfff"}}])
def test_half_a_character_in_a_header(header: dict[str, Any], store: str) -> None:
    """On a disk, the library refuses it."""
    text = json.dumps(header).encode()
    fsspec.filesystem("memory").pipe_file("/models/half/model.safetensors", len(text).to_bytes(8, "little") + text)
    with pytest.raises(BrokenFile, match="the header is no JSON object"):
        moeglot.open("memory://models/half")


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
    assert isinstance(location("simplecache::s3://bucket/key"), Remote)
    assert location("file:///data/x") == Path("/data/x")
    assert location("openai/gpt-oss-20b") == Path("openai/gpt-oss-20b")
    assert location("/data/a:/b") == Path("/data/a:/b")
